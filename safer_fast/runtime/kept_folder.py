"""Folders that belong to a process: known to be there still, or known to be left over."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_UNFINISHED = ".unfinished"
_LEFTOVER = re.compile(rf"\..+-[a-z0-9_]{{8}}{re.escape(_UNFINISHED)}")


class KeptFolder:
    """A folder that was there when this was made, and that others may delete or move."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._descriptor = _opened(
            self._path.resolve()
        )  # while it is open no other folder is taken for it

    def is_there(self) -> bool:
        """Whether the folder is where it was; also where the file system does not tell."""
        try:
            return _is_at(self._descriptor, self._path)
        except OSError:
            return True

    def close(self) -> None:
        """Whether it is there is of no interest any more."""
        os.close(self._descriptor)


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which is gone afterwards unless it was renamed.

    Such folders of processes that were killed are removed first. Each is locked by its process, so
    that none of a living one is; where the file system has no locks, all stay.
    """
    for path in folder.parent.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _remove_if_left(path)
    path, descriptor = _made(folder)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _made(folder: Path) -> tuple[Path, int]:
    """A folder that is locked, and its descriptor."""
    while True:
        prefix = f".{folder.name}-"
        path = Path(tempfile.mkdtemp(_UNFINISHED, prefix, folder.parent))
        with suppress(FileNotFoundError):  # another export took it for left over: once more
            descriptor = _opened(path)
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                return path, descriptor
            os.close(descriptor)


def _remove_if_left(path: Path) -> None:
    with suppress(OSError):
        descriptor = _opened(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
