"""Checkpoints of a run in progress: when one is due, and what goes into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safer_fast.config.schema import Config
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.weights_file import BEST_WEIGHTS
from safer_fast.runs.checkpoints.file import Checkpoint
from safer_fast.runs.checkpoints.folder import CheckpointFolder
from safer_fast.runs.folder import CHECKPOINTS
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runs.progress import FORMAT, RunProgress
from safer_fast.runtime.kept_folder import KeptFolder
from safer_fast.runtime.ranks import Ranks
from safer_fast.training.optimizers import AveragedWeights
from safer_fast.training.step import Step


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

    def save(self, progress: RunProgress, parts: Parts) -> None:
        """Takes what the run goes on from, and writes it while the run goes on.

        Once layers are selected, only parameters that have moved since are taken, if the others
        are on the disk already. Best weights that are no longer there are forgotten.
        """
        if self.ranks.is_first:
            self.store.try_again()
        if progress.start_file is not None and not self._has(progress.start_file):
            progress = replace(progress, start_file=None)
        if progress.best_file is not None and not self._has(progress.best_file):
            progress = replace(progress, best_file=None, best=RunProgress().best)
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
        self, progress: RunProgress, last: Callable[[], Mapping[str, Tensor]] | None = None
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

    def restore(self, checkpoint: Checkpoint, progress: RunProgress, parts: Parts) -> None:
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


@dataclass
class Parts:
    """The parts of a run that change while it trains."""

    network: nn.Module
    arenas: ParameterArenas
    average: AveragedWeights | None
    step: Step | None
    factors: ParameterArenas | None = None


def take_tensors(parts: Parts, moved: list[str] | None, ranks: Ranks) -> dict[str, Tensor]:
    """Copies of all tensors that decide how the run goes on, on their devices.

    moved: the parameters that are worth copying, None for all. Waits for nothing; all ranks must
    take them at the same point.
    """
    arenas, taken = parts.arenas, {}
    names = list(arenas.places) if moved is None else moved
    sources = {"master": arenas.master}
    if parts.average is not None:
        sources["average"] = parts.average.average
    for kind, source in sources.items():
        for name in names:
            taken[f"{kind}.{name}"] = arenas.view(name, source).detach().clone()
    if parts.factors is not None:
        for name, value in parts.factors.state_dict().items():
            taken[f"factor.{name}"] = value
    for name, buffer in _buffers(parts.network).items():
        taken[f"buffer.{name}"] = buffer.clone()
    if parts.step is not None:
        for name, value in optimizer_tensors(parts.step.optimizer).items():
            taken[f"optimizer.{name}"] = value.clone()
        health = parts.step.health
        taken["skips"] = torch.stack([health.skips.in_a_row, health.skips.longest])
        taken["sums"] = ranks.gather(health.sums.values())
    return taken


def put_tensors(
    parts: Parts, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], ranks: Ranks
) -> None:
    """The run has the tensors that were taken; `start` has the parameters that were not.

    With another number of ranks than they were taken from, the first rank has all the sums.
    """
    arenas = parts.arenas
    arenas.master.copy_(arenas.vector_of({**start, **_of_kind(tensors, "master")}))
    arenas.load_compute()
    if parts.average is not None:
        parts.average.average.copy_(arenas.vector_of({**start, **_of_kind(tensors, "average")}))
    if parts.factors is not None:
        parts.factors.master.copy_(parts.factors.vector_of(_of_kind(tensors, "factor")))
        parts.factors.load_compute()
    for name, buffer in _of_kind(tensors, "buffer").items():
        _buffers(parts.network)[name].copy_(buffer)
    if parts.step is None:
        return
    load_optimizer(parts.step.optimizer, _of_kind(tensors, "optimizer"))
    skips = parts.step.health.skips
    skips.in_a_row.copy_(tensors["skips"][0])
    skips.longest.copy_(tensors["skips"][1])
    sums = tensors["sums"]
    if len(sums) == ranks.num_ranks:
        own = sums[ranks.rank]
    else:
        own = sums.sum(0) if ranks.is_first else torch.zeros_like(sums[0])
    if own.numel():  # a step was taken
        health = parts.step.health
        health.sums.load(health.shapes, own.to(arenas.master.device))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, by number of the parameter and name; counts of steps among it."""
    taken = {}
    for group_number, group in enumerate(optimizer.param_groups):
        if "step" in group:  # apex counts for the group
            taken[f"group.{group_number}"] = torch.as_tensor(group["step"])
        for number, parameter in enumerate(group["params"]):
            for name, value in optimizer.state.get(parameter, {}).items():
                if value is None:  # SGD without momentum
                    continue
                taken[f"{group_number}.{number}.{name}"] = torch.as_tensor(value)
    return taken


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The optimizer, whose parameters are those of before, has the state that was taken."""
    for name, value in tensors.items():
        group_number, _, rest = name.partition(".")
        if group_number == "group":
            optimizer.param_groups[int(rest)]["step"] = value.item()
            continue
        number, _, key = rest.partition(".")
        parameter = optimizer.param_groups[int(group_number)]["params"][int(number)]
        # counts lie where the optimizer would make them: on the device if it may be captured
        stays = key == "step" and not optimizer.param_groups[int(group_number)].get("fused")
        optimizer.state[parameter][key] = value if stays else value.to(parameter.device)


def _of_kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Those of one kind, by their names within it."""
    prefix = f"{kind}."
    return {
        name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)
    }


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the state, such as the statistics of batch norms."""
    parameters = dict(network.named_parameters())
    return {name: value for name, value in network.state_dict().items() if name not in parameters}
