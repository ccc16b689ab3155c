"""A folder of images: one folder per class, below one folder per split or none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safer_fast.data.formats.source import EncodedSource, Source
from safer_fast.data.machine import missing

SPLIT_NAMES = {"train": ["train"], "validation": ["val", "validation"], "test": ["test"]}


class FolderSource(EncodedSource):
    """DIR/CLASS/*.jpg with the classes and files of torchvision's ImageFolder, sorted by name."""

    def __init__(self, path: Path, flag: str) -> None:
        names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        if not names:
            raise ValueError(f"{flag}: expected a folder for each class, got none in {path}")
        files = [_find_images(os.path.join(path, name), flag) for name in names]
        self.flag, self.class_names = flag, names
        self.labels = np.repeat(np.arange(len(names)), [len(found) for found in files])
        # One buffer: worker processes would copy a list of strings page by page as they count
        # references in it.
        encoded = [os.fsencode(file) for found in files for file in found]
        self.files = np.array(encoded, dtype=np.bytes_)

    def encoded(self, index: int) -> NDArray[np.uint8]:
        file = self.describe(index)
        try:
            return np.frombuffer(Path(file).read_bytes(), dtype=np.uint8)
        except FileNotFoundError:
            if os.path.lexists(file):  # a link that leads nowhere
                raise
            raise missing(self.flag, file) from None

    def describe(self, index: int) -> str:
        return os.fsdecode(self.files[index])


def _find_images(folder: str, flag: str) -> list[str]:
    """The image files below the folder of a class, at least one, by folder and name.

    Links are followed, but no folder is entered twice: links may form circles.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found, waiting, seen = [], [folder], set()
    while waiting:
        status = os.stat(parent := waiting.pop())
        if (place := (status.st_dev, status.st_ino)) in seen:
            continue
        seen.add(place)
        with os.scandir(parent) as entries:
            folders, files = _sort_out(entries, flag)
        waiting += sorted(folders)
        found += [(parent, name) for name in files if name.lower().endswith(IMG_EXTENSIONS)]
    if not found:
        raise ValueError(f"{flag}: expected images in every class folder, got none in {folder}")
    return [os.path.join(parent, name) for parent, name in sorted(found)]


def _sort_out(entries: Iterable[os.DirEntry[str]], flag: str) -> tuple[list[str], list[str]]:
    """The paths of folders and the names of files, links that lead nowhere among them.

    Raises ValueError for pipes and devices, which could be read for ever.
    """
    folders, files = [], []
    for entry in entries:
        if entry.is_dir():
            folders.append(entry.path)
        elif entry.is_file() or not os.path.exists(entry.path):
            files.append(entry.name)
        else:
            raise ValueError(
                f"{flag}: expected files of images, got a pipe or device: {entry.path}"
            )
    return folders, files


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
