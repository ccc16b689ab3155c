"""Repair of a damaged metrics.jsonl: its whole lines are kept, so that a run can be resumed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safer_fast.runs.layout import RunFolder
from safer_fast.runs.loggers.metrics_file import MOST_LINE, parse_event
from safer_fast.runtime.files import open_plain, write_whole


def mend_metrics(path: Path, size: int, report: Callable[[str], None]) -> int:
    """Make a metrics.jsonl one to resume from, and return its bytes: `size`, unless it is damaged.

    size: bytes when the checkpoint was made. Where some of them are gone or damaged, the file is
    rewritten with the whole lines, and `report` gets a note. A missing file is created empty.
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
    count = "a damaged line" if num_lost == 1 else f"{num_lost} damaged lines"
    lost = f"{count} left out" if num_lost > 0 else "its end is gone"
    sizes = "" if num_bytes == size else f" ({size} bytes expected, {num_bytes} found)"
    report(f"{path}: {lost}{sizes}; all other lines are kept")
    write_whole(path, whole)
    return len(whole)


def has_ended(path: Path) -> bool:
    """True where a metrics.jsonl, even a damaged one, has the line that ends a run."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        lines = iter(partial(file.readline, MOST_LINE + 1), b"")
        events = (parse_event(line.removesuffix(b"\n")) for line in lines)
        return any(event is not None and event.get("event") == "end" for event in events)


def keep_evaluations(files: RunFolder) -> None:
    """Copy the lines of metrics.jsonl from after the run's end, which resuming cuts off."""
    found: list[bytes] = []
    for line in files.metrics.read_bytes().split(b"\n"):
        event = parse_event(line)
        if event is not None and event.get("event") == "end":
            found = []
        elif event is not None:
            found.append(line + b"\n")
    if found:
        write_whole(files.later_metrics, b"".join(found))


def restore_evaluations(files: RunFolder) -> bool:
    """Append what `keep_evaluations` kept to metrics.jsonl; False where there is nothing."""
    if not files.later_metrics.is_file():
        return False
    with open_plain(files.metrics, os.O_WRONLY) as file:
        file.seek(0, os.SEEK_END)
        file.write(files.later_metrics.read_bytes())
    files.later_metrics.unlink()
    return True
