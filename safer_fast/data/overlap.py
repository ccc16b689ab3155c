"""Splits that hold the training images again, on which accuracies say nothing about others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from safer_fast.data.formats import Source
from safer_fast.data.formats.synthetic import SyntheticSource

NUM_COMPARED = 4


def notes_on_overlap(train: Source, others: Mapping[str, Source | None]) -> list[str]:
    """A note for each split whose labels and images are those of the training data.

    A few images are compared. others: by the name of the split.
    """
    return [
        f"{source.flag}: the {split} split holds the training images; accuracies on it say nothing "
        "about others"
        for split, source in others.items()
        if source is not None and _is_same(train, source)
    ]


def _is_same(one: Source, other: Source) -> bool:
    if isinstance(one, SyntheticSource) or not np.array_equal(one.labels, other.labels):
        return False
    rows = np.linspace(0, len(one) - 1, min(NUM_COMPARED, len(one)))
    try:
        images = [[np.asarray(source.read(int(row))) for row in rows] for source in (one, other)]
    except Exception:  # broken images are reported when they are decoded
        return False
    return all(map(np.array_equal, *images))
