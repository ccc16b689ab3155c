"""Lock file of a run folder: opened, locked, and read for its owner."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from safer_fast.runs.layout import LOCK

_SIZE = 512
_IS_LOCKED = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

# POSIX locks belong to the process: forked workers do not hold them, but a second lock of the same
# process is granted, and closing any descriptor of the file ends them all.
_HELD: set[tuple[int, int]] = set()


@dataclass(frozen=True)
class Owner:
    """The process that writes the folder; `beats` counts its signs of life."""

    host: str
    machine: str
    pid: int
    since: str
    claim: str
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def claim(descriptor: int) -> Owner:
    """Write this process into the file as its owner, and return the owner."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    owner = Owner(_host(), _machine(), os.getpid(), since, uuid4().hex)
    write_owner(descriptor, owner)
    return owner


def open_lock(path: Path) -> tuple[int, bool]:
    """Open the file; return its descriptor, and True where it was made.

    Raise OSError for a link and for what is no plain file.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    with suppress(FileExistsError):
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
    descriptor = os.open(path, flags | os.O_CREAT, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{LOCK} is no plain file")
    return descriptor, False


def try_lock(descriptor: int) -> bool | None:
    """Lock the file: False where another process has; None where the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IS_LOCKED:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def read_owner(descriptor: int) -> Owner | None:
    """Owner that the file names, None where it names none."""
    try:
        values = json.loads(os.pread(descriptor, _SIZE, 0))
        owner = Owner(**values)
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = {"pid": int, "beats": int}
    is_one = all(type(value) is kinds.get(name, str) for name, value in values.items())
    return owner if is_one and str(owner).isprintable() else None


def write_owner(descriptor: int, owner: Owner) -> None:
    """Write the owner, in one write of one size, so that nobody reads a part of it."""
    os.pwrite(descriptor, json.dumps(asdict(owner)).encode().ljust(_SIZE - 1) + b"\n", 0)


def note_held(descriptor: int) -> None:
    """Remember that this process holds the lock of the open file."""
    _HELD.add(_identity(descriptor))


def close_lock(descriptor: int) -> None:
    """Close the file, which ends this process's lock on it."""
    _HELD.discard(_identity(descriptor))
    os.close(descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def is_at(descriptor: int, path: Path) -> bool:
    """True where the open file is the one of this name."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == _identity(descriptor)


def is_held_here(path: Path) -> bool:
    """True where this very process holds the lock of the file."""
    with suppress(FileNotFoundError):
        found = os.stat(path, follow_symlinks=False)
        return (found.st_dev, found.st_ino) in _HELD
    return False


def is_of_this_machine(owner: Owner | None) -> bool:
    """True where the operating system can say if the owner has ended; False for none."""
    return owner is not None and owner.machine == _machine()


def _machine() -> str:
    """Identifier of the machine; containers on one share it, as they share its locks."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return _host()


def _host() -> str:
    return socket.gethostname().encode("ascii", "replace").decode()[:80]
