"""Files of a run folder: written whole or not at all, and never through a link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO


class NotPlainError(OSError):
    """A name of a run folder is taken by something other than a plain file."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(errno.EINVAL, f"expected a plain file, got {kind}", str(path))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def write_whole(path: Path, content: bytes) -> None:
    """`path` holds the content, on the disk; a reader never sees half of it.

    A link of that name is replaced, and what it leads to stays as it is.
    """
    replace(path, partial(write_new, chunks=[content]))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """`path` is what `write` made of a temporary name beside it; a reader never sees half of it.

    `write` must make a new file: see `write_new`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        write(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_new(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """A new file holds the chunks, on the disk; raises FileExistsError where the name is taken."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def open_plain(path: Path, flags: int) -> IO[bytes]:
    """The file; raises NotPlainError for a link, a pipe and the like.

    flags: such as os.O_RDWR | os.O_CREAT.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotPlainError(path, "a link") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotPlainError(path, "another kind")
    mode = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "r+b"}[flags & os.O_ACCMODE]
    return os.fdopen(descriptor, mode)


def check_no_link(folder: Path) -> None:
    """Raises ValueError where the folder is a link: what is written in it would lie elsewhere."""
    if folder.is_symlink():
        raise ValueError(f"{folder}: expected a folder of the run, got a link")


def sync_folder(folder: Path) -> None:
    """The names in the folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
