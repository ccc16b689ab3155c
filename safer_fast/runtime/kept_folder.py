"""Folders of a process: watched for removal by others, or temporary and cleaned up."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safer_fast.runtime.files import is_at

_UNFINISHED = ".unfinished"
_LEFTOVER = re.compile(rf"\..+-[a-z0-9_]{{8}}{re.escape(_UNFINISHED)}")


class KeptFolder:
    """An existing folder that others may delete or move."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        # while it is open no other folder has its inode
        self._descriptor = _opened(self._path.resolve())

    def is_there(self) -> bool:
        """True if the folder is still at its path, or if the file system raises an error."""
        try:
            return is_at(self._descriptor, self._path, follow_links=True)
        except OSError:
            return True

    def close(self) -> None:
        """Stop watching the folder."""
        os.close(self._descriptor)


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Make a temporary folder beside `folder`, removed at the end unless it was renamed.

    Those left over by killed processes are removed first. Each is locked by its process, so that
    those of running processes stay; without locks in the file system, all stay.
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
    """Make and lock a temporary folder; returns its path and descriptor."""
    while True:
        prefix = f".{folder.name}-"
        path = Path(tempfile.mkdtemp(_UNFINISHED, prefix, folder.parent))
        with suppress(FileNotFoundError):  # another process took it for left over: try again
            descriptor = _opened(path)
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_at(descriptor, path):
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
