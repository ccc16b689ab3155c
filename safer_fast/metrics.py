"""What a run measured: one JSON object per line, TensorBoard beside it, sums kept on the device."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

if TYPE_CHECKING:  # torch is imported where it is used: the report reads metrics without it
    from torch import Tensor

Event = Literal["run", "step", "epoch", "selection", "evaluation", "end"]

FILE_NAME = "metrics.jsonl"
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
    """Appends events to `<run>/metrics.jsonl` and writes their scalars for TensorBoard.

    The run folder is created if need be. A last line that a killed run left half-written is cut off
    first. Close it, or use it as a context manager.
    """

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        path = run / FILE_NAME
        _mend_last_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run))
        self._opened = time.monotonic()

    def write(self, event: Event, *, epoch: int, step: int, **values: Any) -> None:
        """Writes one line and flushes it; `time_s` counts seconds since the log was opened.

        Values are what JSON knows: None, bool, int, float, str, lists and dictionaries with names
        as keys; a float that is not finite becomes null. Raises TypeError naming any other value.
        """
        assert event in get_args(Event), f"unknown event {event!r}"
        missing = [key for key in _REQUIRED.get(event, ()) if key not in values]
        assert not missing, f"{event} lacks {', '.join(missing)}"
        assert "time_s" not in values, "time_s is the log's own"
        time_s = round(time.monotonic() - self._opened, 3)
        line = {"event": event, "epoch": epoch, "step": step, "time_s": time_s}
        values = {key: _json_value(value, f"{event}.{key}") for key, value in values.items()}
        with uninterrupted():
            self._file.write(json.dumps(line | values, allow_nan=False) + "\n")
            self._file.flush()
            for name, scalar in _scalars(event, values).items():
                self._tensorboard.add_scalar(name, scalar, step)

    def close(self) -> None:
        """Ends both files; a second call does nothing."""
        with uninterrupted():
            self._file.close()
            self._tensorboard.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C comes after it: TensorBoard's queue, interrupted while it is locked, stays locked."""
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
    *lines, unfinished = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, start=1):
        event = _event(line)
        if event is None:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {_shown(line)}")
        events.append(event)
    last = _event(unfinished)
    return events if last is None else [*events, last]


class DeviceSums:
    """Running sums of scalars that stay on the device until they are asked for.

    They stay where they are, so that recordings of a step may add to them. Sums are fp64 on every
    device: one element costs nothing there, and counts and losses of a whole epoch stay exact where
    fp32 would drop the last digits.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Adds each 0-d tensor to the sum of its name, without waiting for the device."""
        for name, value in values.items():
            assert value.dim() == 0, f"{name}: expected a 0-d tensor, got {tuple(value.shape)}"
            if name in self._sums:
                self._sums[name].add_(value.detach())
            else:
                self._sums[name] = value.detach().clone().double()

    def take(self) -> dict[str, float]:
        """The sums as floats, in one transfer to the host; all of them start again from 0."""
        import torch

        if not self._sums:
            return {}
        values = torch.stack(list(self._sums.values())).tolist()
        for total in self._sums.values():
            total.zero_()
        return dict(zip(self._sums, values, strict=True))


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


def _scalars(event: str, values: Mapping[str, Any]) -> dict[str, float]:
    """What TensorBoard plots of an event, by `group/name`."""
    if event == "evaluation":
        name = f"{values['weights']}-{values['split']}-{values['attack']}"
        values = {name: values["accuracy"]}
    elif event == "selection":
        values = values["scores"]
    elif event in ("run", "end"):
        return {}
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return {f"{event}/{key}": float(value) for key, value in numbers.items()}


def _mend_last_line(path: Path) -> None:
    """Ends the file's last line, or cuts it off where it is only a part of one."""
    content = path.read_bytes() if path.exists() else b""
    complete, newline, unfinished = content.rpartition(b"\n")
    if not unfinished:
        return
    with path.open("r+b") as file:
        if _event(unfinished) is None:
            file.truncate(len(complete) + len(newline))
        else:
            file.seek(0, 2)
            file.write(b"\n")


def _event(line: bytes) -> dict[str, Any] | None:
    """The JSON object in the line, or None where there is none."""
    try:
        event = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 40 else text[:40] + "...")
