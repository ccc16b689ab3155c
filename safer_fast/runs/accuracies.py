"""Text of an evaluation: a table of all attacks, warnings about it, a table by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
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


OWN_SPLITS = ("test", "validation")
"""Names of the splits of a run's own data."""


def distinct_names(paths: Sequence[str]) -> list[str]:
    """A name for each path: its last part without the ending, with more of the path where others
    would have the same, or that of a run's own split."""
    parts = [_parts(path) for path in paths]
    counts = [1] * len(parts)
    while True:
        names = ["/".join(one[-count:]) for one, count in zip(parts, counts, strict=True)]
        short = [
            place
            for place, name in enumerate(names)
            if (names.count(name) > 1 or name in OWN_SPLITS) and counts[place] < len(parts[place])
        ]
        if not short:
            return [
                name if names.count(name) == 1 else path
                for name, path in zip(names, paths, strict=True)
            ]
        for place in short:
            counts[place] += 1


def named_apart(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations of a run, whose data are named with as much of their path as tells them apart.

    Events of the run's own data, and of earlier versions, name no path: their data keep the name.
    A damaged name, which is no text, counts as none.
    """
    events = [
        event if isinstance(event.get("split"), str | None) else {**event, "split": None}
        for event in events
    ]
    places: dict[str, dict[str | None, None]] = {}
    for event in events:
        places.setdefault(str(event.get("split")), {})[_path_of(event)] = None
    renamed: dict[tuple[str, str], str] = {}
    for split, found in places.items():
        paths = [path for path in found if path is not None]
        if len(found) > 1:
            names = distinct_names(paths) if len(paths) > 1 else [_with_folder(paths[0])]
            renamed |= {(split, path): n for path, n in zip(paths, names, strict=True)}
    return [
        {**event, "split": _renamed(event, renamed)} if _path_of(event) else dict(event)
        for event in events
    ]


def _path_of(event: Mapping[str, Any]) -> str | None:
    """The path that an event names; None for none, and for a damaged one."""
    path = event.get("path")
    return path if isinstance(path, str) and path else None


def _with_folder(path: str) -> str:
    return "/".join(_parts(path)[-2:])


def _parts(path: str) -> tuple[str, ...]:
    """Parts of a path without its ending; of one without a name, such as `.`, itself."""
    return Path(path).with_suffix("").parts if Path(path).name else (path,)


def _renamed(event: Mapping[str, Any], names: Mapping[tuple[str, str], str]) -> str:
    """The name of an event's data; a corruption stands behind it."""
    split = str(event.get("split"))
    stem = Path(event["path"]).stem
    rest = split.removeprefix(stem) if split.startswith(f"{stem}, ") else ""
    return names[split, event["path"]] + rest if (split, event["path"]) in names else split


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
