"""Errors of the machine (descriptors, memory, disks), in contrast to errors of bad data."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Error numbers about a single file, which may be left out; all others are about the machine.
ABOUT_ONE_FILE = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
FULL = {errno.ENOSPC, errno.EDQUOT}


class MachineError(ValueError):
    """The machine failed to read or hold data; one line that names the limit and a remedy."""


def machine_error(error: BaseException, flag: str, where: str) -> MachineError | None:
    """The error to end a run with; None for an error of the data.

    flag: the setting that names the data. where: the image or file that was being read.
    """
    for cause in _causes(error):
        if isinstance(cause, MachineError):
            return MachineError(str(cause))
        if isinstance(cause, MemoryError):
            return _line(flag, errno.ENOMEM, where)
        if isinstance(cause, ConnectionError):  # a worker process that has ended
            return None
        number = cause.errno if isinstance(cause, OSError) else None
        if number is not None and number not in ABOUT_ONE_FILE:
            return _line(flag, number, where)
    return None


def missing(flag: str, file: str) -> MachineError:
    """The error for a file that has disappeared since the data was opened."""
    return MachineError(
        f"{flag}: expected the files that were there at the start, got none: {file} "
        "(was it moved, or is its disk no longer mounted?)"
    )


def physical_memory() -> int:
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit() -> int:
    """Memory in bytes that this process may use: that of the machine, ulimit or container."""
    limits = [resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text()))
    allowed = [limit for limit in limits if limit != resource.RLIM_INFINITY and limit > 0]
    return min([physical_memory(), *allowed])


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: libraries wrap errors of the system in their own."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _line(flag: str, number: int, where: str) -> MachineError:
    return MachineError(
        f"{flag}: expected data that this machine can read, got {os.strerror(number)}: {where} "
        f"({_advice(number)})"
    )


def _advice(number: int) -> str:
    """The limit that was reached, and a remedy."""
    if number == errno.EMFILE:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"ulimit -n allows {most} open files: raise it, or lower --data.num_workers "
            "and --data.prefetch"
        )
    if number == errno.ENFILE:
        return "the system's limit fs.file-max: raise it, or end what holds so many files open"
    if number == errno.ENOMEM:
        return (
            f"{physical_memory() / 2**30:.1f} GiB of memory, less by ulimit -v or a container: "
            "lower --data.num_workers, --data.prefetch or --batch-size"
        )
    if number == errno.EAGAIN:
        return (
            "no more processes or threads are allowed (ulimit -u, memory): lower --data.num_workers"
        )
    if number in FULL:
        return "no room is left on a disk or in /dev/shm: make room"
    return "no image is left out for this: repair the disk or network, then resume with --resume"
