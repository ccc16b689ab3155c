"""Data that a claim for RobustBench is of: the run's test split, or data that the user names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.config.messages import meant, printable, shortened
from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats import SkippedFiles, Source, open_splits
from safer_fast.data.formats.splits import split_of
from safer_fast.data.overlap import notes_on_overlap
from safer_fast.data.splits import columns_of, open_all
from safer_fast.runs.accuracies import OWN_SPLITS

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun

Event = Mapping[str, Any]
DATASETS = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
"""Data sets of the leaderboards, and their numbers of classes."""


def of_claimed_data(candidates: Sequence[Event], name: str | None) -> list[Event]:
    """Evaluations of the data that may be claimed.

    name: of the data, or their path, as `evaluate` took them; None: the run's own test split.
    Raises ValueError for a name that none of them has.
    """
    if name is None:
        return [event for event in candidates if _is_own(event) and event["split"] == "test"]
    path = str(Path(name).expanduser().absolute())
    found = [e for e in candidates if name == e["split"] or e.get("path") in (name, path)]
    if not found:
        names = sorted({str(event["split"]) for event in candidates})
        expected = ", ".join(map(printable, names)) or "none so far"
        got = shortened(repr(name)) + meant(name, names)
        raise ValueError(
            f"--claim-data: expected data evaluated under clean,autoattack: {expected}, got {got}"
        )
    return found


def was_trained_on(loaded: LoadedRun, event: Event) -> bool:
    """True for training images, an accuracy on which claims nothing.

    Paths are compared and, where the data can be read, labels and a few images.
    """
    return _is_training_path(loaded, event) or _holds_training_images(loaded, event)


def describe_claimed(event: Event) -> str:
    """The words for the data of a claim and the number of images."""
    count, of_images = event["num_images"], event.get("of_images") or event["num_images"]
    images = f"{count} of {of_images} images" if count < of_images else f"{count} images"
    own = "the run's own " if _is_own(event) else ""
    return f"{own}{name_claimed(event)}, {images}"


def name_claimed(event: Event) -> str:
    """The words for the data of a claim: a split of the run, or a name with its path."""
    if _is_own(event):
        return f"{event['split']} split"
    path = f" ({printable(str(event['path']))})" if event.get("path") else ""
    return printable(str(event["split"])) + path


def dataset_of(loaded: LoadedRun, event: Event | None = None) -> str:
    """The name that the leaderboards have for the data; of other data the name of their file.

    event: the evaluation whose data are meant, if not those of the run.
    """
    path = loaded.config.data.path or "digits"
    if event is not None and not _is_own(event):
        path = event.get("path") or str(event["split"])
    stem, num_classes = Path(path).stem, len(loaded.class_names)
    word = "".join(c for c in stem.lower() if c.isalnum())
    known = (name for name, count in DATASETS.items() if count == num_classes and name in word)
    return next(known, printable(stem))


def _is_own(event: Event) -> bool:
    return not event.get("path") and event["split"] in OWN_SPLITS


def _is_training_path(loaded: LoadedRun, event: Event) -> bool:
    """True for a path within the run's data, and for the data, whose name says training."""
    own, path = loaded.config.data.path, event.get("path")
    if own is None or path is None or split_of(Path(path).stem) != "train":
        return False
    place, folder = (Path(os.path.realpath(Path(one).expanduser())) for one in (path, own))
    return place == folder or folder in place.parents


def _holds_training_images(loaded: LoadedRun, event: Event) -> bool:
    """True where the data can be read and hold the training images, or the extra ones."""
    bad = BadImages("skip", lambda _: None)
    try:
        splits = open_all(loaded.config.data, bad, SkippedFiles(), loaded.needs_labels)
        own = {"test": splits.test, "validation": splits.validation}
        source = own[event["split"]] if _is_own(event) else _opened(loaded, event)
        trained_on = [one for one in (splits.train, splits.extra) if one is not None]
        return any(notes_on_overlap(one, {"claimed": source}) for one in trained_on)
    except (ValueError, OSError):  # it is not on this machine any more
        return False


def _opened(loaded: LoadedRun, event: Event) -> Source | None:
    """The images that were evaluated, opened as an evaluation opens them."""
    if not event.get("path"):
        return None
    bad, columns = BadImages("skip", lambda _: None), columns_of(loaded.config.data)
    found = open_splits(event["path"], "data.path", bad, None, columns)
    return found.get("test") or found.get("validation") or found.get("all")
