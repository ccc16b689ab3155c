"""A folder of images: one folder per class, below one folder per split or none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safer_fast.data.formats.skipped import (
    SkippedFiles,
    find_dead_links,
    is_hidden,
    visible_folders,
)
from safer_fast.data.formats.source import (
    EncodedSource,
    OpenRequest,
    Source,
    image_endings,
    is_image,
)
from safer_fast.runtime.machine_errors import missing

# Endings of metadata files, which are not opened: there may be one beside every image.
TEXT_ENDINGS = {".csv", ".json", ".txt", ".xml", ".yaml"}


class FolderSource(EncodedSource):
    """Images in DIR/CLASS/*.jpg, sorted by name.

    Classes and files are those of torchvision's ImageFolder, but without hidden ones, and with
    images whose ending is not that of an image. Without needs_labels the images of a folder that
    holds no folders are taken too.
    """

    def __init__(
        self, path: Path, flag: str, skipped: SkippedFiles, needs_labels: bool = True
    ) -> None:
        if dead := find_dead_links(path):
            link = path / dead[0]
            raise ValueError(f"{flag}: expected class folders, got a link to nowhere: {link}")
        names = visible_folders(path)
        self.has_labels = bool(names)
        if not names and needs_labels:
            raise ValueError(f"{flag}: expected a folder for each class, got none in {path}")
        if names:
            skipped.skip_rest(path, map(Path, names))
        folders = [os.path.join(path, name) for name in names] or [os.fspath(path)]
        files = [_find_images(folder, flag, skipped) for folder in folders]
        self.flag, self.class_names = flag, names or None
        self.labels = np.repeat(np.arange(len(files)), [len(found) for found in files])
        # one buffer: counting references, worker processes would copy a list of strings page by
        # page
        encoded = [os.fsencode(file) for found in files for file in found]
        self.files = np.array(encoded, dtype=np.bytes_)

    def encoded(self, index: int) -> NDArray[np.uint8]:
        file = self.describe(index)
        try:
            return np.frombuffer(Path(file).read_bytes(), dtype=np.uint8)
        except FileNotFoundError:
            if os.path.lexists(file):  # a broken link
                raise
            raise missing(self.flag, file) from None

    def describe(self, index: int) -> str:
        return os.fsdecode(self.files[index])


def _find_images(folder: str, flag: str, skipped: SkippedFiles) -> list[str]:
    """Find the image files below a folder, at least one, sorted by folder and name.

    Links are followed, but no folder is entered twice: links may form cycles.
    """
    found, waiting, seen = [], [folder], set()
    while waiting:
        status = os.stat(parent := waiting.pop())
        if (place := (status.st_dev, status.st_ino)) in seen:
            skipped.skip(parent, is_folder=True)
            continue
        seen.add(place)
        with os.scandir(parent) as entries:
            by_name = sorted(entries, key=lambda entry: entry.name)
        folders, files = _sort_out(by_name, flag, skipped)
        waiting += sorted(folders)
        found += [(parent, name) for name in files]
    if not found:
        raise ValueError(
            f"{flag}: expected images in every class folder, got none in {folder}; remove the "
            "folder if it is no class"
        )
    for deeper in sorted({parent for parent, _ in found} - {folder}):
        skipped.count_deeper(deeper)
    return [os.path.join(parent, name) for parent, name in sorted(found)]


def _sort_out(
    entries: Iterable[os.DirEntry[str]], flag: str, skipped: SkippedFiles
) -> tuple[list[str], list[str]]:
    """Return the paths of folders and the names of images, including broken links.

    Raises ValueError for pipes and devices, from which reading might never end.
    """
    folders, images = [], []
    for entry in entries:
        is_folder = entry.is_dir()
        if is_hidden(entry.name):
            skipped.skip(entry.path, is_folder)
        elif is_folder:
            folders.append(entry.path)
        elif not entry.is_file() and os.path.exists(entry.path):
            raise ValueError(
                f"{flag}: expected files of images, got a pipe or device: {entry.path}"
            )
        elif _is_image_file(entry):
            images.append(entry.name)
        else:
            skipped.skip(entry.path)
    return folders, images


def _is_image_file(entry: os.DirEntry[str]) -> bool:
    """True for an image, recognised by its ending, or else by its first bytes."""
    ending = os.path.splitext(entry.name)[1].lower()
    if ending in image_endings():
        return True
    return ending not in TEXT_ENDINGS and is_image(entry.path)


def open_folders(folders: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """Open the folder of each split."""
    return {
        split: FolderSource(folder, request.flag, request.skipped, request.needs_labels)
        for split, (folder,) in folders.items()
    }
