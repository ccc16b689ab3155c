"""The log of a run: each line in metrics.jsonl, and shown by all loggers that are asked for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from safer_fast.config.schema import LogConfig
from safer_fast.runs.layout import RunFolder
from safer_fast.runs.loggers import asked_loggers
from safer_fast.runs.loggers.logger import LoggedRun
from safer_fast.runs.loggers.metrics_file import (
    Event,
    MetricsFile,
    last_time_s,
    truncate_to,
    uninterrupted,
)

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
    """Lines of `<run>/metrics.jsonl`, shown by loggers such as TensorBoard; a context manager.

    The run folder is created if need be. With `resume_at`, the `size` when a checkpoint was made,
    lines after it are removed, and loggers show only what is left; raises ValueError, and changes
    nothing, where the file cannot be that of the checkpoint. `report` gets one note of each file
    that cannot be written: lines are kept and written later, TensorBoard is left out.

    config: asks for loggers besides TensorBoard. settings: of the run, for loggers that show them.
    """

    def __init__(
        self,
        run: Path,
        *,
        resume_at: int | None = None,
        report: Callable[[str], None] = print,
        config: LogConfig | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        path = RunFolder(run).metrics
        kept = None if resume_at is None else truncate_to(path, resume_at)
        run.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(path, report)
        logged = LoggedRun(run, report, kept, settings or {})
        self._loggers = [kind.open(logged) for kind in asked_loggers(config or LogConfig())]
        self._opened = time.monotonic() - last_time_s(path)

    @property
    def size(self) -> int:
        """Bytes of all lines up to now: `resume_at` of a checkpoint that is made now."""
        return self._file.size

    def write(self, event: Event, *, epoch: int, step: int, **values: Any) -> None:
        """Write one line; its `time_s` counts seconds on from the last that was there.

        Values are what JSON knows: None, bool, int, float, str, lists and dictionaries with names
        as keys; a float that is not finite becomes null. Raise TypeError naming any other value.
        """
        assert event in get_args(Event), f"unknown event {event!r}"
        missing = [key for key in _REQUIRED.get(event, ()) if key not in values]
        assert not missing, f"{event} lacks {', '.join(missing)}"
        assert "time_s" not in values, "time_s is the log's own"
        time_s = round(time.monotonic() - self._opened, 3)
        line = {"event": event, "epoch": epoch, "step": step, "time_s": time_s}
        line |= {key: _json_value(value, f"{event}.{key}") for key, value in values.items()}
        with uninterrupted():
            self._file.append(json.dumps(line, allow_nan=False).encode() + b"\n")
            for logger in self._loggers:
                logger.add(line)

    def add_image(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """Show a PNG file of this many pixels under `tag` in all loggers."""
        with uninterrupted():
            for logger in self._loggers:
                logger.add_image(tag, png, width, height, step)

    def sync(self) -> None:
        """Bring all lines up to now to the disk, or raise OSError; any thread may call it."""
        self._file.sync()

    def close(self) -> None:
        """Try a last time to write lines that wait, report how many are lost; close the loggers."""
        with uninterrupted():
            self._file.close()
        for logger in self._loggers:  # Ctrl-C ends one that waits for a network
            logger.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
