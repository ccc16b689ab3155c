"""Checkpoints of a run in progress: when one is due, what it contains, and how a run resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from safer_fast.config.schema import Config
from safer_fast.models.weights_file import load_tensors
from safer_fast.runs.checkpoints.file import Checkpoint, fitting
from safer_fast.runs.checkpoints.folder import CheckpointFolder
from safer_fast.runs.layout import RunFolder
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runs.progress import FORMAT, RunProgress
from safer_fast.runtime.kept_folder import KeptFolder
from safer_fast.runtime.ranks import Ranks
from safer_fast.training.learner import Learner


class Saver:
    """Writes checkpoints, and resumes a run from one; rank 0 writes, all ranks take part.

    numerics: all but settings that decides the computed bits, by name. log: is synced to disk
    before each checkpoint that refers to it, and reports what cannot be written.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        ranks: Ranks,
        numerics: Mapping[str, Any],
        log: RunLog,
    ) -> None:
        self.config, self.ranks, self.numerics, self.log = config, ranks, numerics, log
        self.folder, self.best = folder, RunFolder(folder).weights("best")
        self._kept = KeptFolder(folder) if ranks.is_first else None
        self.store = CheckpointFolder(
            RunFolder(folder).checkpoints,
            keep=config.checkpoint.keep,
            report=log.say,
            is_writer=ranks.is_first,
        )
        self._last_step, self._last_time = 0, time.monotonic()

    def is_due(self, num_steps: int) -> bool:
        """Return true on rank 0 if a checkpoint is due now; the interval then starts again."""
        every, minutes = self.config.checkpoint.every_steps, self.config.checkpoint.every_minutes
        steps, elapsed = num_steps - self._last_step, time.monotonic() - self._last_time
        is_due = every is not None and steps >= every
        is_due |= minutes is not None and elapsed >= 60 * minutes and steps > 0
        if not self.ranks.is_first or not is_due or self.store.is_busy:
            return False
        self._last_step, self._last_time = num_steps, time.monotonic()
        return True

    def save(self, progress: RunProgress, learner: Learner) -> None:
        """Copy the state of the run, and write it as a checkpoint in the background.

        Once layers are selected, only parameters that have moved since are copied, if the others
        are on disk already. Best weights that are no longer there are forgotten.
        """
        if self.ranks.is_first:
            self.store.try_again()
        if progress.start_file is not None and not self._has(progress.start_file):
            progress = replace(progress, start_file=None)
        if progress.best_file is not None and not self._has(progress.best_file):
            progress = replace(progress, best_file=None, best=RunProgress().best)
        moved = None if progress.start_file is None else progress.moved
        tensors = learner.state_dict(moved)
        if not self.ranks.is_first:
            return
        state = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "facts": dict(self.numerics),
            "progress": asdict(progress),
        }
        needs = [name for name in (progress.start_file, progress.best_file) if name is not None]
        self.store.save(progress.num_steps, state, tensors, needs=needs, before=self.log.sync)
        self._last_step, self._last_time = progress.num_steps, time.monotonic()

    def keep_start(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Write the weights that checkpoints refer to as `start_file`."""
        if self.ranks.is_first:
            self.store.save_companion(name, weights)

    def keep_best(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Write the weights that checkpoints refer to as `best_file`, and link `best` to them."""
        if self.ranks.is_first:
            self.store.save_companion(name, weights, link=self.best)

    def provide_best(
        self, progress: RunProgress, last: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> None:
        """Make `best` hold the best weights so far; raises ValueError where that fails.

        last: returns the weights to write in their place if they are lost; None: writes nothing.
        """
        name = progress.best_file
        if name is None and last is not None:
            name = f"best-{progress.num_steps:08d}"
            self.log.say("the best weights are not known any more: the last stand in their place")
            self.keep_best(name, last())
        if name is not None and self.ranks.is_first:
            self.store.provide(name, self.best)
        self.ranks.share(None)

    def best_weights(self) -> dict[str, Tensor]:
        """Read the best weights, by timm's names."""
        return load_tensors(self.best)

    def restore(self, checkpoint: Checkpoint, progress: RunProgress, learner: Learner) -> None:
        """Set the run to the state it had when the checkpoint was taken.

        Raises ValueError, one line, for a checkpoint of another run.
        """
        with fitting(checkpoint.path):
            self.store.resume_from(checkpoint)
            # the run may have written better weights later, which this resumed run has not reached
            self.provide_best(progress)
            start = {}
            if progress.start_file is not None:
                start = self.store.read_companion(progress.start_file)
            learner.resume(progress, checkpoint.tensors, start)
        self._last_step = progress.num_steps
        self.log.say(
            f"resumed from {checkpoint.path}: step {progress.num_steps}, epoch {progress.epoch}, "
            f"batch {progress.index}"
        )

    def wait(self) -> None:
        """Wait, on all ranks, until everything is written or has failed."""
        if self.ranks.is_first:
            self.store.wait()
        self.ranks.share(None)

    def close(self) -> None:
        """Wait until everything is written or has failed, and end the writing thread."""
        self.store.close()
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def check_folder(self) -> None:
        """Raise OSError, on all ranks, if the run folder was deleted or moved."""
        if not self.ranks.share(self._kept is None or self._kept.is_there()):
            raise OSError(
                f"{self.folder}: expected the run folder, which was deleted or moved meanwhile: "
                "the run ends"
            )

    def _has(self, name: str) -> bool:
        """Return true if rank 0 has written the companion, or is about to."""
        return bool(self.ranks.share(self.ranks.is_first and self.store.holds(name)))
