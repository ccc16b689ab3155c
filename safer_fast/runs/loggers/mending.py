"""A metrics.jsonl that was damaged: what is whole in it is kept, and a run can go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safer_fast.runs.loggers.metrics_file import MOST_LINE, parse_event
from safer_fast.runtime.files import open_plain, write_whole


def mend_metrics(path: Path, size: int, report: Callable[[str], None]) -> int:
    """The bytes of a metrics.jsonl of which a checkpoint knows `size`; normally just these.

    Where some are gone or damaged, the file is rebuilt of the lines that are whole, and `report`
    told. A file that is gone is begun anew.
    """
    open_plain(path, os.O_RDWR | os.O_CREAT).close()
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        kept = file.read(size)
    lines = kept.split(b"\n")
    whole = b"".join(line + b"\n" for line in lines if parse_event(line) is not None)
    if whole == kept and len(kept) == size:
        return size
    num_lost = len(lines) - 1 - whole.count(b"\n")
    lost = f"{num_lost} damaged lines left out" if num_lost > 0 else "its end is gone"
    report(f"{path}: {size} bytes expected, {num_bytes} found, {lost}; the others are kept")
    write_whole(path, whole)
    return len(whole)


def has_ended(path: Path) -> bool:
    """Whether a metrics.jsonl holds a run's last line, also among damaged ones."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        lines = iter(partial(file.readline, MOST_LINE + 1), b"")
        events = (parse_event(line.removesuffix(b"\n")) for line in lines)
        return any(event is not None and event.get("event") == "end" for event in events)
