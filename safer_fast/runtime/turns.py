"""Processes that write one file take turns: each locks it, and lets go when it has written."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safer_fast.runtime.files import open_plain

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


@contextmanager
def turn_at(path: Path) -> Iterator[None]:
    """No other process has its turn at the file meanwhile; it is made where there is none.

    Others wait. The lock ends with the process, however that ends. Where the file system has no
    locks there are no turns. Raises OSError for a link and for what is no plain file.
    """
    while True:
        with open_plain(path, os.O_RDWR | os.O_CREAT) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if _is_at(file.fileno(), path):  # nobody removed or replaced it while this one waited
                yield
                return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))
