"""Data that a run was trained on: accuracies on them say nothing about other images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats import SkippedFiles, Source, open_splits
from safer_fast.data.formats.given import WORD
from safer_fast.data.formats.splits import split_of
from safer_fast.data.overlap import notes_on_overlap
from safer_fast.data.splits import columns_of, open_all
from safer_fast.runs.accuracies import OWN_SPLITS

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun

TRAINED_ON = " (training images)"
"""Ending of the names of such data in evaluations."""


def was_trained_on(loaded: LoadedRun, event: Mapping[str, Any]) -> bool:
    """True for an evaluation of the images that the run was trained on, or of its extra ones.

    Paths are compared and, where the data can be read, labels and a few images.
    """
    return is_training_path(loaded, event.get("path")) or _holds_training_images(loaded, event)


def is_own(event: Mapping[str, Any]) -> bool:
    """True for an evaluation of a split of the run's own data."""
    return not event.get("path") and event["split"] in OWN_SPLITS


def is_training_path(loaded: LoadedRun, path: str | None) -> bool:
    """True for a path within the run's data, and for the data, whose name says training."""
    if path is None or split_of(Path(path).stem) != "train":
        return False
    return any(is_within(path, own) for own in _own_paths(loaded))


def may_be_training_path(loaded: LoadedRun, path: str) -> bool:
    """True for a path of the run's own training data, or within it, or around it.

    False for data that Python holds: they have no path.
    """
    own = _own_paths(loaded)
    return any(is_within(path, one) or is_within(one, path) for one in own)


def is_within(path: str, folder: str) -> bool:
    """True for the path itself too."""
    place, around = (Path(os.path.realpath(Path(one).expanduser())) for one in (path, folder))
    return place == around or around in place.parents


def holds_training_images(loaded: LoadedRun, source: Source) -> bool:
    """True for images that are the run's training images, or its extra ones.

    False where those cannot be read any more.
    """
    try:
        splits = _own_splits(loaded)
        trained_on = [one for one in (splits.train, splits.extra) if one is not None]
        return any(notes_on_overlap(one, {"data": source}) for one in trained_on)
    except (ValueError, OSError):  # it is not on this machine any more
        return False


def _own_paths(loaded: LoadedRun) -> list[str]:
    data = loaded.config.data
    return [path for path in (data.path, data.extra_path) if path not in (None, WORD)]


def _own_splits(loaded: LoadedRun) -> Any:
    bad = BadImages("skip", lambda _: None)
    return open_all(loaded.config.data, bad, SkippedFiles(), loaded.needs_labels)


def _holds_training_images(loaded: LoadedRun, event: Mapping[str, Any]) -> bool:
    try:
        source = _own_split(loaded, event) if is_own(event) else _opened(loaded, event)
    except (ValueError, OSError):
        return False
    return source is not None and holds_training_images(loaded, source)


def _own_split(loaded: LoadedRun, event: Mapping[str, Any]) -> Source | None:
    splits = _own_splits(loaded)
    own: dict[str, Source | None] = {"test": splits.test, "validation": splits.validation}
    return own[event["split"]]


def _opened(loaded: LoadedRun, event: Mapping[str, Any]) -> Source | None:
    """The images that were evaluated, opened as an evaluation opens them."""
    if not event.get("path"):
        return None
    bad, columns = BadImages("skip", lambda _: None), columns_of(loaded.config.data)
    found = open_splits(event["path"], "data.path", bad, None, columns)
    return found.get("test") or found.get("validation") or found.get("all")
