"""Data that a claim for RobustBench is of: the run's test split, or data that the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.config.messages import meant, printable, shortened
from safer_fast.data.formats.hugging_face import PREFIX
from safer_fast.runs.trained_on import TRAINED_ON, is_own

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun

Event = Mapping[str, Any]
DATASETS = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
"""Data sets of the leaderboards, and their numbers of classes."""
HUB_IDS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet": "ILSVRC/imagenet-1k",
}
"""Names that the Hugging Face Hub has for these data sets."""


def of_claimed_data(candidates: Sequence[Event], name: str | None) -> list[Event]:
    """Evaluations of the data that may be claimed.

    name: of the data, or their path, as `evaluate` took them; None: the run's own test split.
    Raises ValueError for a name that none of them has.
    """
    if name is None:
        return [event for event in candidates if is_own(event) and event["split"] == "test"]
    path = str(Path(name).expanduser().absolute())
    found = [e for e in candidates if name == _name(e) or e.get("path") in (name, path)]
    if not found:
        names = sorted({str(event["split"]) for event in candidates})
        names = [name for name in names if not name.endswith(TRAINED_ON)]
        expected = ", ".join(map(printable, names)) or "none so far"
        got = shortened(repr(name)) + meant(name, names)
        raise ValueError(
            f"--claim-data: expected data evaluated under clean,autoattack: {expected}, got {got}"
        )
    return found


def describe_claimed(event: Event) -> str:
    """The words for the data of a claim and the number of images."""
    count, of_images = event["num_images"], event.get("of_images") or event["num_images"]
    images = f"{count} of {of_images} images" if count < of_images else f"{count} images"
    own = "the run's own " if is_own(event) else ""
    return f"{own}{name_claimed(event)}, {images}"


def name_claimed(event: Event) -> str:
    """The words for the data of a claim: a split of the run, or a name with its path."""
    if is_own(event):
        return f"{event['split']} split"
    path = f" ({printable(str(event['path']))})" if event.get("path") else ""
    return printable(_name(event)) + path


def dataset_of(loaded: LoadedRun, event: Event | None = None) -> str:
    """The name that the leaderboards have for the data; of other data the name of their file.

    event: the evaluation whose data are meant, if not those of the run.
    """
    path = loaded.config.data.path or "digits"
    if event is not None and not is_own(event):
        path = event.get("path") or str(event["split"])
    stem, num_classes = Path(path).stem, len(loaded.class_names)
    word = "".join(c for c in stem.lower() if c.isalnum())
    known = (name for name, count in DATASETS.items() if count == num_classes and name in word)
    return next(known, printable(stem))


def hub_id_of(loaded: LoadedRun) -> str | None:
    """The name that the Hugging Face Hub has for the run's data; None: they are not known there."""
    path = loaded.config.data.path or ""
    if path.startswith(PREFIX):
        return path.split(":")[1]
    return HUB_IDS.get(dataset_of(loaded))


def _name(event: Event) -> str:
    return str(event["split"]).removesuffix(TRAINED_ON)
