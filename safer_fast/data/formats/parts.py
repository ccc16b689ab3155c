"""Random access to parts of large files, with few files open at a time."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safer_fast.runtime.machine_errors import MachineError, machine_error, missing

MOST_OPEN = 256
# Share 1/16 of the files that this process may open; three splits may be read in turns.
SHARE_OPEN = 16


class FileParts:
    """Reads parts of files into arrays that own their memory.

    Files are not mapped into memory: a map keeps its file open while any image needs it, and a disk
    failure would kill the process without a message. flag: the setting named in errors. Every
    process opens files of its own. Not thread-safe.
    """

    def __init__(self, files: Sequence[Path], flag: str) -> None:
        self.files, self.flag = files, flag
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def read(self, number: int, offset: int, size: int) -> NDArray[np.uint8]:
        """Read a part of file `number`, [size] bytes, read-only.

        Raises MachineError if that fails: a single image is not to blame for its file.
        """
        file = self.files[number]
        part = np.empty(size, dtype=np.uint8)
        try:
            num_read = _read_into(part, self._descriptor(number), offset)
        except FileNotFoundError:
            raise missing(self.flag, str(file)) from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise machine_error(error, self.flag, str(file)) or MachineError(
                f"{self.flag}: expected a file that can be read, got {reason}: {file}"
            ) from error
        if num_read < size:
            raise MachineError(
                f"{self.flag}: expected {file} as it was at the start, got a shorter file"
            )
        part.flags.writeable = False
        return part

    def close(self) -> None:
        """Close all files; they are reopened on demand."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, number: int) -> int:
        """Descriptor of a file, opened if necessary; the most recently read files stay open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        try:
            descriptor = os.open(self.files[number], os.O_RDONLY)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                raise
            self.close()
            descriptor = os.open(self.files[number], os.O_RDONLY)
        self._open[number] = descriptor
        if len(self._open) > _most_open():
            os.close(self._open.popitem(last=False)[1])
        return descriptor


def _most_open() -> int:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        MOST_OPEN if most == resource.RLIM_INFINITY else min(MOST_OPEN, max(1, most // SHARE_OPEN))
    )


def _read_into(part: NDArray[np.uint8], descriptor: int, offset: int) -> int:
    """Fill the array with the bytes at `offset`; returns the number of bytes read."""
    view, num_read = part.data, 0
    while num_read < len(part):
        count = os.preadv(descriptor, [view[num_read:]], offset + num_read)
        if not count:
            break
        num_read += count
    return num_read
