"""CPU time of this process and of every process that it started."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cpu_seconds() -> float | None:
    """CPU time so far of this process and all below it, whether they live or have ended.

    In steps of the system's clock, 10 ms as a rule. Worker processes may outlive an epoch, and the
    time of one that ended counts for its parent only once that has waited for it, so the system's
    table of processes is read: None where it has none (anything but Linux).
    """
    if sys.platform != "linux":
        return None
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the name in brackets, which comes before these fields, may hold anything
            fields = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended since it was listed
        number = int(file.parent.name)
        parents[number] = int(fields[1])
        # its own and that of children it has waited for, each in user and in system mode
        seconds[number] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return sum(value for number, value in seconds.items() if _is_below(number, parents))


def _is_below(number: int, parents: dict[int, int]) -> bool:
    """True if the process is this one or descends from it."""
    while number in parents and number != os.getpid():
        number = parents[number]
    return number == os.getpid()
