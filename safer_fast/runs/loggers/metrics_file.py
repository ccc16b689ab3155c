"""metrics.jsonl: the measurements of a run, one JSON object a line."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, NoReturn

from safer_fast.runs.layout import METRICS
from safer_fast.runtime.files import open_plain

Event = Literal["run", "step", "epoch", "selection", "evaluation", "end"]

MOST_LINE = 2**24  # bytes; an evaluation of 20,000 classes takes a thirtieth


class MetricsFile:
    """A file that grows by whole lines; lines that cannot be written wait in memory.

    It is opened for each write, so that nothing half-written stays in a buffer and a removed file
    is noticed. Other processes may append whole lines too, as an evaluation of a running run does.
    A last line that a killed run left half-written is removed first. `report` gets one note when
    writing begins to fail, and one when it succeeds again.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        open_plain(path, os.O_RDWR | os.O_CREAT).close()
        _mend_last_line(path)
        self._path = path.absolute()
        self._report = report
        self._lock = threading.RLock()
        self._waiting: list[bytes] = []
        self._end = path.stat().st_size  # of the last line written; what follows is part of a line
        self._is_torn = False
        self._is_failing = False

    @property
    def size(self) -> int:
        """Bytes of all lines up to now, with those that wait: where a resumed run continues."""
        with self._lock:
            return self._end + sum(map(len, self._waiting))

    def append(self, line: bytes) -> None:
        """Write the line, behind all that wait, or let it wait too."""
        with self._lock:
            self._waiting.append(line)
            self._try_to_write()

    def sync(self) -> None:
        """Bring all lines up to now to the disk, or raise OSError; any thread may call it."""
        with uninterrupted(), self._lock:
            if self._waiting and (error := self._try_to_write()):
                raise error
            end = self._end
        with self._path.open("rb") as file:  # without the lock: writing does not wait for the disk
            if os.fstat(file.fileno()).st_size < end:
                raise OSError(f"{self._path}: lines that were written are gone")
            os.fsync(file.fileno())

    def close(self) -> None:
        """Try a last time to write lines that wait; report how many are lost."""
        with self._lock:
            if self._waiting and (error := self._try_to_write()):
                lost = f"lines lost: {len(self._waiting)}"
                self._report(f"{METRICS} could not be written: {_reason(error)}; {lost}")
                self._waiting.clear()

    def _try_to_write(self) -> OSError | None:
        """Write all lines that wait, or return the error; report its beginning and its end."""
        num_lines = len(self._waiting)
        try:
            self._write()
        except OSError as error:
            if not self._is_failing:
                problem = f"{METRICS} cannot be written: {_reason(error)}"
                self._report(f"{problem}; lines are kept and written later")
            self._is_failing = True
            return error
        if self._is_failing:
            self._report(f"{METRICS} can be written again; lines written late: {num_lines}")
        self._is_failing = False
        return None

    def _write(self) -> None:
        content = b"".join(self._waiting)
        self._find_end()
        self._is_torn = True
        try:
            with open_plain(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
                file.write(content)
        except OSError:
            with suppress(OSError):  # else it is removed before the next try
                self._remove_part()
            raise
        self._waiting.clear()
        self._end += len(content)
        self._is_torn = False

    def _find_end(self) -> None:
        """End the file with a whole line and set `_end` to its size, whatever others did to it."""
        self._path.parent.mkdir(exist_ok=True)
        self._remove_part()
        if self._size_on_disk() == self._end:
            return
        _mend_last_line(self._path)
        size = self._size_on_disk()
        if size < self._end:
            gone = f"{self._end - size} bytes that were written are gone"
            self._report(f"{METRICS} was removed or cut short: {gone}; it continues from here")
        self._end = size

    def _remove_part(self) -> None:
        """Remove the part of a line that a write which failed left behind."""
        if self._is_torn and self._size_on_disk() > self._end:
            _truncate(self._path, self._end)
        self._is_torn = False

    def _size_on_disk(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the block ends, so that a line and its scalars are written once."""
    is_ours = signal.getsignal(signal.SIGINT) is not None  # else a host program handles it
    if threading.current_thread() is not threading.main_thread() or not is_ours:
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received and callable(handler):
        handler(*received[0])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a metrics.jsonl, in order; a last line cut short by a kill is left out.

    Raise ValueError naming file and line for any other damage, OSError where there is no file.
    """
    with path.open("rb") as file:
        return _events(path, file)


def truncate_to(path: Path, size: int) -> list[dict[str, Any]]:
    """End the file after `size` bytes, which are whole lines, and return their events.

    Raise ValueError, and change nothing, where the file cannot be the one of the checkpoint.
    """
    assert size >= 0
    if not path.is_file():
        raise ValueError(f"{path}: expected the {size} bytes of the checkpoint, got no file")
    with path.open("rb") as file:
        kept = file.read(size)
    if len(kept) < size:
        raise ValueError(f"{path}: expected the {size} bytes of the checkpoint, got {len(kept)}")
    if kept and not kept.endswith(b"\n"):
        end = kept.rpartition(b"\n")[2]
        raise ValueError(f"{path}: expected a line to end at byte {size}, got {_shown(end)}")
    events = _events(path, io.BytesIO(kept))
    _truncate(path, size)
    return events


def _events(path: Path, file: IO[bytes]) -> list[dict[str, Any]]:
    events = []
    for number, line in enumerate(iter(partial(file.readline, MOST_LINE + 1), b""), start=1):
        event = parse_event(line.removesuffix(b"\n"))
        if event is not None:
            events.append(event)
        elif line.endswith(b"\n") or len(line) > MOST_LINE:
            shown = _shown(line.removesuffix(b"\n"))
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, got {shown}; remove the line, or "
                "resume the run, which does"
            )
    return events


def last_time_s(path: Path) -> float:
    """`time_s` of the last line; 0 where there is none."""
    event = parse_event(path.read_bytes()[:-1].rpartition(b"\n")[2]) or {}
    time_s = event.get("time_s")
    return time_s if isinstance(time_s, int | float) else 0.0


def _mend_last_line(path: Path) -> None:
    """End the file's last line, or remove it where it is only a part of one."""
    content = path.read_bytes() if path.exists() else b""
    complete, newline, unfinished = content.rpartition(b"\n")
    if not unfinished:
        return
    with open_plain(path, os.O_RDWR) as file:
        if parse_event(unfinished) is None:
            file.truncate(len(complete) + len(newline))
        else:
            file.seek(0, 2)
            file.write(b"\n")


def _truncate(path: Path, size: int) -> None:
    with open_plain(path, os.O_RDWR) as file:
        os.truncate(file.fileno(), size)


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The JSON object in the line, or None where there is none, or it is longer than any is."""
    if len(line) > MOST_LINE:
        return None
    try:
        event = _DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
