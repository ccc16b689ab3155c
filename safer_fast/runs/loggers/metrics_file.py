"""What a run measured: one JSON object per line, and TensorBoard beside it."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, NoReturn, get_args

from safer_fast.runtime.files import open_plain

Event = Literal["run", "step", "epoch", "selection", "evaluation", "end"]

FILE_NAME = "metrics.jsonl"
MOST_LINE = 2**24  # bytes; an evaluation of 20,000 classes takes a thirtieth
_REQUIRED: dict[str, tuple[str, ...]] = {
    "epoch": (
        "train_loss",
        "train_robust_accuracy",
        "clean_accuracy",
        "robust_accuracy",
        "learning_rate",
        "epsilon",
        "images_per_second",
        "data_wait_fraction",
        "peak_memory_mib",
        "skipped_steps",
        "skipped_images",
    ),
    "selection": ("criterion", "scores", "selected", "cut"),
    "evaluation": ("split", "attack", "epsilon", "accuracy", "num_images", "weights"),
}


class MetricsLog:
    """Appends events to `<run>/metrics.jsonl` and shows their scalars to TensorBoard.

    The run folder is created if need be. A last line that a killed run left half-written is cut off
    first. With `resume_at`, the `size` when a checkpoint was made, what was logged after it is cut
    off, and TensorBoard sees only what is left; raises ValueError, and changes nothing, where the
    file cannot be that of the checkpoint. `report` is told, once, what cannot be written: lines are
    kept and written later, and TensorBoard is done without. Close it, or use it as a context
    manager.
    """

    def __init__(
        self, run: Path, *, resume_at: int | None = None, report: Callable[[str], None] = print
    ) -> None:
        from safer_fast.runs.loggers.tensorboard import EventFile

        path = run / FILE_NAME
        kept = None if resume_at is None else _truncate_to(path, resume_at)
        run.mkdir(parents=True, exist_ok=True)
        self._lines = _Lines(path, report)
        self._event_file = EventFile(run, report, kept)
        self._opened = time.monotonic() - _last_time_s(path)

    @property
    def size(self) -> int:
        """Bytes of all lines up to now: where a run resumed from a checkpoint of now goes on."""
        return self._lines.size

    def write(self, event: Event, *, epoch: int, step: int, **values: Any) -> dict[str, Any]:
        """Writes one line, and gives it; `time_s` counts seconds on from the last that was there.

        Values are what JSON knows: None, bool, int, float, str, lists and dictionaries with names
        as keys; a float that is not finite becomes null. Raises TypeError naming any other value.
        """
        assert event in get_args(Event), f"unknown event {event!r}"
        missing = [key for key in _REQUIRED.get(event, ()) if key not in values]
        assert not missing, f"{event} lacks {', '.join(missing)}"
        assert "time_s" not in values, "time_s is the log's own"
        time_s = round(time.monotonic() - self._opened, 3)
        line = {"event": event, "epoch": epoch, "step": step, "time_s": time_s}
        line |= {key: _json_value(value, f"{event}.{key}") for key, value in values.items()}
        with uninterrupted():
            self._lines.append(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._event_file.add(line)
        return line

    def add_images(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """TensorBoard shows a PNG file of this many pixels under `tag`."""
        with uninterrupted():
            self._event_file.add_images(tag, png, width, height, step)

    def sync(self) -> None:
        """All lines up to now are on the disk, or OSError is raised; any thread may call it."""
        self._lines.sync()

    def close(self) -> None:
        """Lines that could not be written are tried a last time; says how many are lost."""
        with uninterrupted():
            self._lines.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Lines:
    """A file that grows by whole lines; those that cannot be written wait in memory.

    It is opened for each write, so that nothing half-written stays in a buffer and a removed file
    is noticed. Others may append whole lines too, as an evaluation of a running run does.
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
        with self._lock:
            return self._end + sum(map(len, self._waiting))

    def append(self, line: bytes) -> None:
        """The line is in the file, behind all that wait, or waits itself."""
        with self._lock:
            self._waiting.append(line)
            self._try_to_write()

    def sync(self) -> None:
        with uninterrupted(), self._lock:
            if self._waiting and (error := self._try_to_write()):
                raise error
            end = self._end
        with self._path.open("rb") as file:  # without the lock: writing does not wait for the disk
            if os.fstat(file.fileno()).st_size < end:
                raise OSError(f"{self._path}: lines that were written are gone")
            os.fsync(file.fileno())

    def close(self) -> None:
        with self._lock:
            if self._waiting and (error := self._try_to_write()):
                lost = f"lines lost: {len(self._waiting)}"
                self._report(f"{FILE_NAME} could not be written: {_reason(error)}; {lost}")
                self._waiting.clear()

    def _try_to_write(self) -> OSError | None:
        """Writes all lines that wait, or gives the error; reports its beginning and its end."""
        num_lines = len(self._waiting)
        try:
            self._write()
        except OSError as error:
            if not self._is_failing:
                problem = f"{FILE_NAME} cannot be written: {_reason(error)}"
                self._report(f"{problem}; lines are kept and written later")
            self._is_failing = True
            return error
        if self._is_failing:
            self._report(f"{FILE_NAME} can be written again; lines written late: {num_lines}")
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
            with suppress(OSError):  # then it is cut off before the next try
                self._cut_off_part()
            raise
        self._waiting.clear()
        self._end += len(content)
        self._is_torn = False

    def _find_end(self) -> None:
        """The file ends with a whole line, `_end` says where, whatever was done to it meanwhile."""
        self._path.parent.mkdir(exist_ok=True)
        self._cut_off_part()
        if self._size_on_disk() == self._end:
            return
        _mend_last_line(self._path)
        size = self._size_on_disk()
        if size < self._end:
            gone = f"{self._end - size} bytes that were written are gone"
            self._report(f"{FILE_NAME} was removed or cut short: {gone}; it goes on from here")
        self._end = size

    def _cut_off_part(self) -> None:
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
    """Ctrl-C comes after it, so that a line and its scalars are written, and written once."""
    is_ours = signal.getsignal(signal.SIGINT) is not None  # else it is that of a host program
    if threading.current_thread() is not threading.main_thread() or not is_ours:
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came and callable(handler):
        handler(*came[0])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a metrics.jsonl, in order; a last line cut short by a kill is left out.

    Raises ValueError naming file and line for any other damage, OSError where there is no file.
    """
    with path.open("rb") as file:
        return _events(path, file)


def _json_value(value: Any, name: str) -> Any:
    """The value as strict JSON has it; raises TypeError with the name where there is no way."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _json_value(item, f"{name}.{key}") for key, item in value.items()}
    raise TypeError(f"{name}: expected a JSON value, got {type(value).__name__}")


def _truncate_to(path: Path, size: int) -> list[dict[str, Any]]:
    """The file ends after `size` bytes, which are whole lines; gives the events of these."""
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
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {shown}")
    return events


def _last_time_s(path: Path) -> float:
    """`time_s` of the last line; 0 where there is none."""
    event = parse_event(path.read_bytes()[:-1].rpartition(b"\n")[2]) or {}
    time_s = event.get("time_s")
    return time_s if isinstance(time_s, int | float) else 0.0


def _mend_last_line(path: Path) -> None:
    """Ends the file's last line, or cuts it off where it is only a part of one."""
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
