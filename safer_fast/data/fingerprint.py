"""A short hash of the data set, so that a resumed run can check it got the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from safer_fast.data.batch import Loader
from safer_fast.data.formats import Source
from safer_fast.data.images import ImageFormat
from safer_fast.data.subset import Indices


def fingerprint(
    rows: Mapping[str, tuple[Source, Indices]],
    loaders: Mapping[str, Loader],
    class_names: list[str],
    image_format: ImageFormat,
) -> str:
    """Hash the data set to sixteen hexadecimal digits that do not depend on where it is stored.

    It covers the rows of each split, their labels, the number of images of its loader, the class
    names, and the size and channels of the images, but no pixels.
    rows, loaders: by the names of the splits.
    """
    facts = {
        "class_names": class_names,
        "image_size": image_format.size,
        "num_channels": image_format.num_channels,
        "num_images": {split: loader.num_images for split, loader in loaders.items()},
        "num_rows": {split: len(numbers) for split, (_, numbers) in rows.items()},
    }
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8)
    for source, numbers in rows.values():
        for values in (numbers, source.labels[numbers]):
            digest.update(np.ascontiguousarray(values, dtype="<i8").data)
    return digest.hexdigest()
