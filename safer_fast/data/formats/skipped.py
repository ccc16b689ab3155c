"""Files that are not read as data: hidden and system files, and files without images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from safer_fast.config.messages import printable

# Names of classes, one on a line, beside shards.
CLASS_NAMES = "classnames.txt"
# Files and folders that macOS, Windows, Linux, Synology and Python create in any folder.
SYSTEM_NAMES = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "$recycle.bin",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
}


class SkippedFiles:
    """Counts files and folders that are not read as data, and folders below those of classes."""

    def __init__(self) -> None:
        self._num_files = self._num_folders = self._num_deep = 0
        self._example = self._hidden_example = self._deep_example = ""
        self._unlabelled: list[str] = []
        self._num_contradicting, self._contradiction = 0, ""

    def skip(self, path: str, is_folder: bool = False) -> None:
        """Count a file or folder that is not read."""
        self._num_folders += is_folder
        self._num_files += not is_folder
        if is_hidden(os.path.basename(path)):
            self._hidden_example = self._hidden_example or path
        else:
            self._example = self._example or path

    def skip_rest(self, folder: Path, used: Iterable[Path]) -> None:
        """Count everything in a folder except the paths that are used."""
        names = {path.name for path in used}
        with os.scandir(folder) as entries:
            rest = sorted(
                (entry.path, entry.is_dir()) for entry in entries if entry.name not in names
            )
        for path, is_folder in rest:
            self.skip(path, is_folder)

    def skip_unlabelled(self, split: str) -> None:
        """Note a split without labels, on which nothing can be measured."""
        self._unlabelled.append(split)

    def contradict(self, sample: str) -> None:
        """Count a sample whose .json names another class than its .cls, which is taken."""
        self._num_contradicting += 1
        self._contradiction = self._contradiction or sample

    def count_deeper(self, folder: str) -> None:
        """Count a folder below that of a class, whose images belong to the class."""
        self._num_deep += 1
        self._deep_example = self._deep_example or folder

    def add(self, other: SkippedFiles) -> None:
        """Add the counts of another object."""
        self._num_files += other._num_files
        self._num_folders += other._num_folders
        self._num_deep += other._num_deep
        self._unlabelled += other._unlabelled
        self._num_contradicting += other._num_contradicting
        self._contradiction = self._contradiction or other._contradiction
        self._example = self._example or other._example
        self._hidden_example = self._hidden_example or other._hidden_example
        self._deep_example = self._deep_example or other._deep_example

    def lines(self) -> list[str]:
        """Notes on files that were passed over and on deeper folders, if there are any."""
        found = []
        if counts := [*_count(self._num_files, "file"), *_count(self._num_folders, "folder")]:
            example = printable(self._example or self._hidden_example)
            found.append(f"data: passed over {' and '.join(counts)}, such as {example}")
        for count in _count(self._num_deep, "folder"):
            example = printable(self._deep_example)
            found.append(f"data: classes have images in {count} below their own, such as {example}")
        found += [
            f"data: {printable(split)} is not used, all its labels are -1"
            for split in self._unlabelled
        ]
        for count in _count(self._num_contradicting, "sample"):
            example = printable(self._contradiction)
            found.append(f"data: .cls counts in {count} whose .json has another class: {example}")
        return found


def is_hidden(name: str) -> bool:
    """True for hidden names and for files that systems and tools create for themselves."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def visible_folders(path: str | Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden and system folders."""
    with os.scandir(path) as entries:
        return sorted(
            entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir()
        )


def find_dead_links(path: str | Path) -> list[str]:
    """Names of broken links in a folder, sorted, without hidden ones."""
    with os.scandir(path) as entries:
        links = [entry.name for entry in entries if entry.is_symlink()]
    dead = [name for name in links if not os.path.exists(os.path.join(path, name))]
    return sorted(name for name in dead if not is_hidden(name))


def _count(number: int, noun: str) -> list[str]:
    return [f"{number:,} {noun}{'' if number == 1 else 's'}"] if number else []
