"""Text of an evaluation: a table of all attacks, warnings about it, a table by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from safer_fast.config.messages import printable
from safer_fast.runtime.terminal import aligned

MOST_CLASSES = 20
"""Classes that a table names: the ones with the lowest accuracy under the last attack."""


def accuracy_table(accuracies: Sequence[Mapping[str, Any]]) -> str:
    """Lines of text, one for each weights, split and attack, with 95 % intervals (Wilson, 1927).

    <=: an upper bound, see `attacks/masking.py`. no gradient: how many images gave the attack none.
    distance: squared, of embeddings to those of clean images by the original network.
    """
    titles = ["weights", "split", "attack", "norm", "epsilon", "accuracy", "95 %", "images"]
    titles += ["no gradient", "s", "distance"]
    cells = [_cells(row) for row in accuracies]
    used = [index for index in range(len(titles)) if any(row[index] for row in cells)]
    rows = [[row[index] for index in used] for row in [titles, *cells]]
    return aligned(rows, num_left=sum(index < 4 for index in used))


def notes(accuracies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about accuracies of a table that are less than they seem."""
    lines = []
    for row in accuracies:
        place = f"{row['weights']}, {printable(row['split'])}, {row['attack']}"
        if reasons := row.get("gradient_masking"):
            lines.append(
                f"WARNING: {place}: gradient masking suspected ({'; '.join(reasons)}): "
                f"{row['accuracy']:.4f} is an upper bound of the robust accuracy"
            )
        if count := row.get("num_not_finite"):
            lines.append(
                f"WARNING: {place}: the logits of {count} of {row['num_images']} images are not "
                "finite; they count as wrong"
            )
    return lines


def class_table(accuracies: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> str:
    """Lines of text, one for each class that has images, under each attack.

    Of many classes, the ones with the lowest accuracy under the last attack.
    """
    columns = [row["per_class_accuracy"] for row in accuracies]
    present = [index for index, value in enumerate(columns[-1]) if value is not None]
    shown = sorted(sorted(present, key=lambda index: columns[-1][index])[:MOST_CLASSES])
    names = {index: printable(str(class_names[index]))[:24] for index in shown}
    title = "class" if len(shown) == len(present) else "worst"
    rows = [[names[index], *(f"{column[index]:.4f}" for column in columns)] for index in shown]
    return aligned([[title, *(row["attack"] for row in accuracies)], *rows], least=(5, 8))


def _cells(row: Mapping[str, Any]) -> list[str]:
    seconds, distance, share = row.get("seconds"), row.get("embedding_distance"), row["accuracy"]
    shown = ["", ""]
    if share is not None:
        low, high = interval(share, row["num_images"])
        bound = "<=" if row.get("upper_bound") else ""
        shown = [f"{bound}{share:.4f}", f"{low:.4f}-{high:.4f}"]
    return [
        row["weights"],
        printable(row["split"]),
        row["attack"],
        row.get("norm") or "",
        f"{row['epsilon']:.4f}",
        *shown,
        _images(row),
        str(row.get("num_zero_gradients") or ""),
        "" if seconds is None else f"{seconds:.1f}",
        "" if distance is None else f"{distance:.4g}",
    ]


def _images(row: Mapping[str, Any]) -> str:
    """The number of images, and of how many they are a subset."""
    num_images, of_images = row["num_images"], row.get("of_images") or 0
    return f"{num_images} of {of_images}" if num_images < of_images else str(num_images)


_Z = 1.959964  # standard deviations to each side that hold 95 % of a normal distribution


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` trials, at least one (Wilson, 1927)."""
    squares = _Z**2 / count
    centre = (share + squares / 2) / (1 + squares)
    half = _Z * sqrt(share * (1 - share) / count + squares / (4 * count)) / (1 + squares)
    return max(0.0, centre - half), min(1.0, centre + half)
