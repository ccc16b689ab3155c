"""A folder of images: one folder per class, below one folder per split or none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safer_fast.data.formats.source import EncodedSource, Source

SPLIT_NAMES = {"train": ["train"], "validation": ["val", "validation"], "test": ["test"]}


class FolderSource(EncodedSource):
    """DIR/CLASS/*.jpg with the classes and files of torchvision's ImageFolder, sorted by name."""

    def __init__(self, path: Path, flag: str) -> None:
        from torchvision.datasets import ImageFolder

        if not any(entry.is_dir() for entry in path.iterdir()):
            raise ValueError(f"{flag}: expected a folder for each class, got none in {path}")
        folder = ImageFolder(str(path), allow_empty=True)
        self.flag, self.class_names = flag, list(folder.classes)
        self.labels = np.array(folder.targets, dtype=np.int64)
        # One buffer: worker processes would copy a list of strings page by page as they count
        # references in it.
        self.files = np.array([os.fsencode(file) for file, _ in folder.samples], dtype=np.bytes_)
        self._refuse_empty_classes(path)

    def _refuse_empty_classes(self, path: Path) -> None:
        counts = np.bincount(self.labels, minlength=len(self.class_names or []))
        if len(empty := np.flatnonzero(counts == 0)):
            name = (self.class_names or [])[int(empty[0])]
            raise ValueError(
                f"{self.flag}: expected images in every class folder, got none in {path / name}"
            )

    def encoded(self, index: int) -> NDArray[np.uint8]:
        return np.fromfile(self.describe(index), dtype=np.uint8)

    def describe(self, index: int) -> str:
        return os.fsdecode(self.files[index])


def open_folder(path: Path, flag: str) -> dict[str, Source]:
    """The splits below a folder, or all of it where no subfolder is named after a split."""
    folders = find_split_folders(path) or {"all": path}
    return {split: FolderSource(folder, flag) for split, folder in folders.items()}


def find_split_folders(path: Path) -> dict[str, Path]:
    """The subfolders that are named after splits."""
    return {
        split: path / name
        for split, names in SPLIT_NAMES.items()
        for name in names
        if (path / name).is_dir()
    }
