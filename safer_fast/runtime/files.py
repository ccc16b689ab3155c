"""Files written whole or not at all, never through a link, and read with clear errors."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from safer_fast.config.untrusted import MOST_JSON, read_text


class NotPlainError(OSError):
    """A name of a run folder is taken by something other than a plain file."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(errno.EINVAL, f"expected a plain file, got {kind}", str(path))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically and durably: a reader never sees half of it.

    A link of that name is replaced, and its target stays as it is.
    """
    replace(path, partial(write_new, chunks=[content]))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by `write` under a temporary name beside it, then rename it to `path`.

    `write` must create the file: see `write_new`.
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
    """Create a file of these chunks, synced to disk; raises FileExistsError if it exists."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def open_plain(path: Path, flags: int) -> IO[bytes]:
    """Open a plain file; raises NotPlainError for a link, a pipe and the like.

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
    """Raise ValueError if the folder is a link: files written in it would be elsewhere."""
    if folder.is_symlink():
        raise ValueError(f"{folder}: expected a folder of the run, got a link")


def check_writable(folder: Path, flag: str, remedy: str) -> None:
    """Raise ValueError with a remedy if files cannot be made in a folder that exists."""
    if not folder.is_dir():
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            return
        raise ValueError(
            f"{flag}: expected a folder that can be written, got {folder} ({error.strerror}); "
            f"{remedy}"
        ) from None


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that the names in it survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object to a file, atomically."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raises ValueError naming the file if it is none."""
    with naming(path):
        try:
            text = read_text(path, MOST_JSON)
        except (OSError, ValueError) as error:
            raise ValueError(f"expected a JSON object: {reason(error)}") from None
        return json_object(text)


def is_at(descriptor: int, path: Path, *, follow_links: bool = False) -> bool:
    """True if `path` is the open file or folder, or with `follow_links` a link to it."""
    try:
        found = os.stat(path, follow_symlinks=follow_links)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def link_or_copy(path: Path, other: Path) -> None:
    """Make `other` a hard link to the file, or a copy where the file system has no hard links."""
    try:
        os.link(path, other)
    except OSError:
        with path.open("rb") as file:
            write_new(other, iter(partial(file.read, 1 << 20), b""))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn any exception into a ValueError of one line that names the path."""
    try:
        yield
    except Exception as error:  # on crafted files readers raise any exception
        raise ValueError(f"{path}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The message of an exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if not isinstance(error, ValueError | SafetensorError):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; raises ValueError if the text is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object: {reason(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content
