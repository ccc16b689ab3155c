"""What a run lets others know: metrics.jsonl, lines, progress bars; of all ranks the first does."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from safer_fast.distributed import Ranks
from safer_fast.metrics import Event, MetricsLog

T = TypeVar("T")


class RunLog:
    """Says everything once, whatever the number of ranks.

    resume_at: bytes of metrics.jsonl to go on from, None for a new run.
    """

    def __init__(self, folder: Path, ranks: Ranks, resume_at: int | None = None) -> None:
        self._ranks = ranks
        self._metrics: MetricsLog | None = None
        if ranks.is_first:
            self._metrics = MetricsLog(folder, resume_at=resume_at, report=self.say)

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl; 0 where nothing is written."""
        return 0 if self._metrics is None else self._metrics.size

    def write(self, event: Event, *, epoch: int, step: int, **values: Any) -> None:
        """See `MetricsLog.write`."""
        if self._metrics is not None:
            self._metrics.write(event, epoch=epoch, step=step, **values)

    def say(self, line: str) -> None:
        """Shows a line above the progress bars; a log on a full disk does not end the run."""
        if self._ranks.is_first:
            with suppress(OSError):
                tqdm.write(line)

    def bar(
        self, values: Iterable[T], total: int | None, label: str, initial: int = 0
    ) -> Iterable[T]:
        """The values, with a progress bar on a terminal."""
        disable = None if self._ranks.is_first else True
        return tqdm(values, total=total, desc=label, initial=initial, leave=False, disable=disable)

    def sync(self) -> None:
        """See `MetricsLog.sync`."""
        if self._metrics is not None:
            self._metrics.sync()

    def close(self) -> None:
        """See `MetricsLog.close`."""
        if self._metrics is not None:
            self._metrics.close()
