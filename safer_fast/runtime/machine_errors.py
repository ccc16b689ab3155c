"""Errors of the machine - descriptors, memory, disks - which are never taken for bad data."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Of one file: it may be left out. Any other error number speaks of the machine.
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
    """Data that may be sound could not be read or held; one line that names limit and remedy."""


def machine_error(error: BaseException, flag: str, where: str) -> MachineError | None:
    """The line that a run ends with; None for an error that the data is to blame for.

    flag: the setting that names the data. where: the image or file that was read.
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
    """The line on a file that was there when the data was opened."""
    return MachineError(
        f"{flag}: expected the files that were there at the start, got none: {file} "
        "(was it moved, or is its disk no longer mounted?)"
    )


def physical_memory() -> int:
    """The memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit() -> int:
    """The memory that this process may take in bytes: less than the machine's by ulimit -v or -d,
    or in a container."""
    limits = [resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text()))
    allowed = [limit for limit in limits if limit != resource.RLIM_INFINITY and limit > 0]
    return min([physical_memory(), *allowed])


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came of: libraries hide what the system said behind their own."""
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
    """The limit that was met, and what helps."""
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
    return "no image is left out for this: see to the disk or network, then go on with --resume"
