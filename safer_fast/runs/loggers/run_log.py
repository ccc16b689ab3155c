"""What a run lets others know: metrics.jsonl, lines, progress bars; of all ranks the first does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from safer_fast.runs.loggers.metrics_file import Event, MetricsLog
from safer_fast.runs.loggers.wandb import WandbRun
from safer_fast.runtime.ranks import Ranks

T = TypeVar("T")


class RunLog:
    """Says everything once, whatever the number of ranks.

    resume_at: bytes of metrics.jsonl to go on from, None for a new run. wandb: the settings that
    Weights & Biases is to show, None to leave it out.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        resume_at: int | None = None,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        self._ranks = ranks
        self._metrics: MetricsLog | None = None
        self._wandb: WandbRun | None = None
        self._bar: tqdm[Any] | None = None
        if ranks.is_first:
            self._metrics = MetricsLog(folder, resume_at=resume_at, report=self.say)
            self._wandb = None if wandb is None else WandbRun(folder, wandb, self.say)

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl; 0 where nothing is written."""
        return 0 if self._metrics is None else self._metrics.size

    def write(self, event: Event, *, epoch: int, step: int, **values: Any) -> None:
        """See `MetricsLog.write`."""
        if self._metrics is not None:
            line = self._metrics.write(event, epoch=epoch, step=step, **values)
            if self._wandb is not None:
                self._wandb.add(line)

    def add_images(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """TensorBoard and Weights & Biases show a PNG file of this many pixels under `tag`."""
        if self._metrics is not None:
            self._metrics.add_images(tag, png, width, height, step)
        if self._wandb is not None:
            self._wandb.add_image(tag, png, step)

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
        self._bar = tqdm(
            values,
            total=total,
            desc=label,
            initial=initial,
            leave=False,
            disable=disable,
            unit="batch",
        )
        return self._bar

    def show(self, line: str, figures: Mapping[str, str], *, only_on_terminals: bool) -> None:
        """The figures stand beside the progress bar; without one the line says them.

        only_on_terminals: whether nothing is said where there is no bar.
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
        if self._wandb is not None:
            self._wandb.close()
