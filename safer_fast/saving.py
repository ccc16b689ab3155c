"""Checkpoints of a run in progress: when one is due, and what goes into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from safer_fast.checkpoint import BEST_WEIGHTS
from safer_fast.checkpoint_file import Checkpoint
from safer_fast.checkpoint_folder import CheckpointFolder
from safer_fast.config import Config
from safer_fast.distributed import Ranks
from safer_fast.kept_folder import KeptFolder
from safer_fast.run_folder import CHECKPOINTS
from safer_fast.run_log import RunLog
from safer_fast.run_state import FORMAT, Parts, Progress, put_tensors, take_tensors


class Saver:
    """Writes what a run goes on from; of several ranks the first writes, and all take part.

    facts: what else decides the bits that are computed, by name. log: is on the disk before each
    checkpoint that refers to it, and told what cannot be written.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        ranks: Ranks,
        facts: Mapping[str, Any],
        log: RunLog,
    ) -> None:
        self.config, self.ranks, self.facts, self.log = config, ranks, facts, log
        self.folder, self.best = folder, folder / BEST_WEIGHTS
        self._kept = KeptFolder(folder) if ranks.is_first else None
        self.store = CheckpointFolder(
            folder / CHECKPOINTS,
            keep=config.checkpoint.keep,
            report=log.say,
            is_writer=ranks.is_first,
        )
        self._last_step, self._last_time = 0, time.monotonic()

    def is_due(self, num_steps: int) -> bool:
        """Whether the first rank wants a checkpoint now; it is told so once."""
        every, minutes = self.config.checkpoint.every_steps, self.config.checkpoint.every_minutes
        steps, elapsed = num_steps - self._last_step, time.monotonic() - self._last_time
        is_due = every is not None and steps >= every
        is_due |= minutes is not None and elapsed >= 60 * minutes and steps > 0
        if not self.ranks.is_first or not is_due or self.store.is_busy:
            return False
        self._last_step, self._last_time = num_steps, time.monotonic()
        return True

    def save(self, progress: Progress, parts: Parts) -> None:
        """Takes what the run goes on from, and writes it while the run goes on.

        Once layers are selected, only parameters that have moved since are taken, if the others
        are on the disk already. Best weights that are no longer there are forgotten.
        """
        if self.ranks.is_first:
            self.store.try_again()
        if progress.start_file is not None and not self._has(progress.start_file):
            progress = replace(progress, start_file=None)
        if progress.best_file is not None and not self._has(progress.best_file):
            progress = replace(progress, best_file=None, best=Progress().best)
        moved = None if progress.start_file is None else progress.moved
        tensors = take_tensors(parts, moved, self.ranks)
        if not self.ranks.is_first:
            return
        state = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "facts": dict(self.facts),
            "progress": asdict(progress),
        }
        needs = [name for name in (progress.start_file, progress.best_file) if name is not None]
        self.store.save(progress.num_steps, state, tensors, needs=needs, before=self.log.sync)
        self._last_step, self._last_time = progress.num_steps, time.monotonic()

    def keep_start(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Writes the weights that checkpoints refer to as `start_file`."""
        if self.ranks.is_first:
            self.store.save_companion(name, weights)

    def keep_best(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Writes the weights that checkpoints refer to as `best_file`, and users to as the best."""
        if self.ranks.is_first:
            self.store.save_companion(name, weights, link=self.best)

    def provide_best(
        self, progress: Progress, last: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> None:
        """`best` holds the best weights so far; raises ValueError where that cannot be.

        last: gives the weights that stand in their place where none are known, None for nothing.
        """
        name = progress.best_file
        if name is None and last is not None:
            name = f"best-{progress.num_steps:08d}"
            self.log.say("the best weights are not known any more: the last stand in their place")
            self.keep_best(name, last())
        if name is not None and self.ranks.is_first:
            self.store.provide(name, self.best)
        self.ranks.share(None)

    def restore(self, checkpoint: Checkpoint, progress: Progress, parts: Parts) -> None:
        """The run is where it was when the checkpoint was taken."""
        start = {}
        self.store.go_on_from(checkpoint)
        # a run that went further may have found better ones, which are not those of this run
        self.provide_best(progress)
        if progress.start_file is not None:
            start = self.store.read_companion(progress.start_file)
        put_tensors(parts, checkpoint.tensors, start, self.ranks)
        self._last_step = progress.num_steps

    def wait(self) -> None:
        """All ranks go on when everything is written that is going to be."""
        if self.ranks.is_first:
            self.store.wait()
        self.ranks.share(None)

    def close(self) -> None:
        """Waits, and ends the writing."""
        self.store.close()
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def check_folder(self) -> None:
        """Raises OSError, on all ranks, where somebody has deleted the run folder, or moved it."""
        if not self.ranks.share(self._kept is None or self._kept.is_there()):
            raise OSError(
                f"{self.folder}: expected the run folder, which was deleted or moved meanwhile: "
                "the run ends"
            )

    def _has(self, name: str) -> bool:
        """Whether the first rank has the file, or is about to."""
        return bool(self.ranks.share(self.ranks.is_first and self.store.holds(name)))
