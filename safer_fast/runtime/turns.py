"""Locks on files that several processes write: each holds the lock while it writes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safer_fast.runtime.files import is_at, open_plain

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


@contextmanager
def turn_at(path: Path) -> Iterator[None]:
    """Lock a file, which is created if it is missing; other processes wait.

    The lock ends with the process. Without locks in the file system nothing is locked. Raises
    OSError for a link and anything else but a plain file.
    """
    while True:
        with open_plain(path, os.O_RDWR | os.O_CREAT) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if is_at(file.fileno(), path):  # not removed or replaced in the meantime
                yield
                return
