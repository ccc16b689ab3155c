"""Output of a run: metrics.jsonl, lines and progress bars, of rank 0 alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from safer_fast.config.schema import LogConfig
from safer_fast.runs.loggers.metrics_file import Event
from safer_fast.runs.loggers.metrics_log import MetricsLog
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.terminal import progress_bar

T = TypeVar("T")


class RunLog:
    """The log and the terminal of a run; ranks other than 0 write and show nothing.

    resume_at: bytes of metrics.jsonl to resume from, None for a new run. config, settings: see
    `MetricsLog`.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        resume_at: int | None = None,
        config: LogConfig | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._ranks = ranks
        self._metrics: MetricsLog | None = None
        self._bar: tqdm[Any] | None = None
        if ranks.is_first:
            self._metrics = MetricsLog(
                folder, resume_at=resume_at, report=self.say, config=config, settings=settings
            )

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl; 0 on ranks other than 0."""
        return 0 if self._metrics is None else self._metrics.size

    def write(self, event: Event, *, epoch: int, step: int, **values: Any) -> None:
        """See `MetricsLog.write`."""
        if self._metrics is not None:
            self._metrics.write(event, epoch=epoch, step=step, **values)

    def add_image(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """See `MetricsLog.add_image`."""
        if self._metrics is not None:
            self._metrics.add_image(tag, png, width, height, step)

    def say(self, line: str) -> None:
        """Show a line above the progress bars; a full disk of the terminal's log ends no run."""
        if self._ranks.is_first:
            with suppress(OSError):
                tqdm.write(line)

    def bar(
        self, values: Iterable[T], total: int | None, label: str, initial: int = 0
    ) -> Iterable[T]:
        """The values, with a progress bar on a terminal or in a notebook."""
        self._bar = progress_bar(
            values,
            is_shown=self._ranks.is_first,
            total=total,
            desc=label,
            initial=initial,
            unit="batch",
        )
        return self._bar

    def show(self, line: str, figures: Mapping[str, str], *, only_on_terminals: bool) -> None:
        """Show figures beside the progress bar; without one, the line followed by them.

        only_on_terminals: show nothing where there is no bar.
        """
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix(figures)
        elif not only_on_terminals:
            self.say("  ".join([line, *(f"{name} {value}" for name, value in figures.items())]))

    def sync(self) -> None:
        """See `MetricsLog.sync`."""
        if self._metrics is not None:
            self._metrics.sync()

    def close(self) -> None:
        """See `MetricsLog.close`."""
        if self._metrics is not None:
            self._metrics.close()
