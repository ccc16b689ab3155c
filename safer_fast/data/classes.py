"""Classes of a data set: the same in all splits, at least two of them, matched by name."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np

from safer_fast.data.formats import Source, check_labels, empty_classes
from safer_fast.data.subset import Indices

NUM_NAMED = 3


def agree_on_classes(train: Source, others: list[Source], needs_several: bool = True) -> list[str]:
    """Return the class names of the training data, or its label numbers as text if it has none.

    Raises ValueError if another split differs, and with `needs_several` for training data of a
    single class.
    """
    names = train.class_names or [str(number) for number in range(int(train.labels.max()) + 1)]
    if needs_several:
        check_several(train, np.arange(len(train)), names)
    for source in others:
        check_classes(source, train.class_names, len(names))
    return names


def check_classes(source: Source, names: list[str] | None, num_classes: int) -> None:
    """Raise ValueError if class names (where both are known) or labels do not fit."""
    if names is not None:
        source.adopt(names)
    given = source.class_names
    if given is not None and names is not None and given != names:
        raise ValueError(
            f"{source.flag}: expected the class names of the training data, "
            f"got {_first_difference(names, given)}: {source.describe(0)}"
        )
    check_labels(source, num_classes)


def check_several(source: Source, rows: Indices, names: list[str], flag: str | None = None) -> None:
    """Raise ValueError if these rows have a single class, on which any model would be right.

    flag: the setting that chose the rows; default: the one that named the data.
    """
    first = source.labels[rows[0]]
    if (source.labels[rows] == first).all():
        raise ValueError(
            f"{flag or source.flag}: expected training images of at least two classes, "
            f"got one class, {names[first]}: {source.describe(int(rows[0]))}"
        )


def relabel(source: Source, names: list[str]) -> None:
    """Renumber the labels of a source that has all or some of these classes, matched by name."""
    own = source.class_names
    if own is not None and own != names and set(own) <= set(names):
        numbers = np.array([names.index(name) for name in own])
        source.labels, source.class_names = numbers[source.labels], names


def notes_on_classes(source: Source, rows: Indices, names: list[str]) -> list[str]:
    """A note on classes without any image among these rows, as a list of at most one line."""
    empty = [names[number] for number in empty_classes(source.labels[rows], len(names))]
    if not empty:
        return []
    more = f" and {len(empty) - NUM_NAMED} more" if len(empty) > NUM_NAMED else ""
    return [f"{source.flag}: no training image of class {', '.join(empty[:NUM_NAMED])}{more}"]


def _first_difference(expected: list[str], got: list[str]) -> str:
    if got[: len(expected)] == expected:
        return f"{got[len(expected)]} as well"
    pairs = zip_longest(expected, got, fillvalue="nothing")
    wanted, name = next(pair for pair in pairs if pair[0] != pair[1])
    return f"{name} in place of {wanted}"
