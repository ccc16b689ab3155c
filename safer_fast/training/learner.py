"""The weights of a run and all that changes them: the step, its schedule, and their average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from safer_fast.attacks.pgd import placed_start
from safer_fast.config.resolution import Resolution
from safer_fast.config.schema import Config
from safer_fast.data import Batch, Data, Mixing
from safer_fast.data.batch import resized
from safer_fast.models.batch_norm import buffers_state, load_buffers_state
from safer_fast.runs.progress import RunProgress
from safer_fast.runtime.cuda_graphs import PartBuffers
from safer_fast.runtime.seeds import derive_seed
from safer_fast.training.engine import Engine
from safer_fast.training.objectives import Targets
from safer_fast.training.optimizers import AveragedWeights, set_learning_rate
from safer_fast.training.schedule import Stage, settings_at, stage_of
from safer_fast.training.step import Step


class Learner:
    """Trains the weights of an engine, one batch at a time.

    `average` is the moving average of the weights, None without `optim.ema_decay`. `epsilon` and
    `step_size` are the radii of the attack in the last step, 0-d on the device.
    """

    def __init__(self, config: Config, engine: Engine, data: Data) -> None:
        self.config, self.engine, self.arenas = config, engine, engine.arenas
        self.average: AveragedWeights | None = None
        self.epsilon, self.step_size = torch.zeros(2, device=engine.runtime.device)
        self.resolution = Resolution.of(config)
        self._mixing = Mixing(config.data, data.num_classes, config.seed)
        self._step: Step | None = None
        self._size: int | None = None
        self._known_unread: set[str] = set()

    @property
    def step(self) -> Step:
        """The step over the layers that were selected last."""
        assert self._step is not None, "no epoch has begun"
        return self._step

    def train_layers(self, names: list[str] | None, stage: Stage, seed: int = 0) -> None:
        """Train these layers from now on (None: every parameter), with a new optimizer.

        seed: of low-rank factors, with `selection.lora_rank`.
        """
        rho = 0.0 if stage.name == "warm-up" else self.config.sam.rho
        self._step = self.engine.step_over(names, rho, seed)
        self.engine.audit.begin_phase()

    def start_average(self) -> None:
        """Begin a new average at the current weights, if `optim.ema_decay` asks for one."""
        decay = self.config.optim.ema_decay
        self.average = None if decay is None else AveragedWeights(self.arenas, decay)

    def take_step(
        self, stage: Stage, epoch: int, index: int, num_batches: int, batch: Batch, num_steps: int
    ) -> float:
        """Learn from a batch on the device, number `index` (from 0) of an epoch.

        Everything random in it depends on the seed, the epoch, the batch and the rank alone.
        num_steps: steps taken before, of all epochs. Returns the learning rate.
        """
        seed, ranks, audit = self.config.seed, self.engine.ranks, self.engine.audit
        loss = self.step.objective.attack_loss
        self._change_size(epoch, index)
        batch = self._mixing(resized(batch, self._size), epoch, index)
        labels = self.engine.tower.labels(batch.images, batch.labels)
        done = epoch - 1 + index / num_batches
        audit.choose_steps(num_steps, batch.images, labels, done, loss)
        place = stage, epoch, index, num_batches
        settings = settings_at(self.config, *place, audit.attack_steps)
        self.step.attack.steps = settings.attack_steps
        self.epsilon.fill_(settings.epsilon)
        self.step_size.fill_(settings.step_size)
        set_learning_rate(self.step.optimizer, settings.learning_rate)
        torch.manual_seed(derive_seed(seed, "step", epoch, index, ranks.rank))
        seed_of = partial(derive_seed, seed, "attack", epoch)
        self.step.attack.draw = partial(placed_start, position=batch.position, seed_of=seed_of)
        targets = Targets(labels, ranks.mean_weights(batch.weights()))
        radii = self.epsilon, self.step_size
        audit(num_steps, batch.images, labels, *radii, loss)
        self.step(batch.images, targets, *radii)
        if self.average is not None:
            self.average.update()
        return settings.learning_rate

    def _change_size(self, epoch: int, index: int) -> None:
        """Train on images of the epoch's size; what is kept for another size is freed."""
        size = self.resolution.at(epoch)
        if size != self._size:
            self._size = size
            self.engine.replays.forget()
            self.step.attack.release()
            self.step.features = PartBuffers()
        if index == 0 and self.resolution.begins_at(epoch):
            self.engine.audit.begin_phase()

    def check_health(self, epoch: int, last_checkpoint: Path | None) -> None:
        """Raise FloatingPointError after too many skipped steps in a row, or where ranks differ."""
        limit = self.config.runtime.max_skipped_steps
        if self.step.health.skips.most_in_a_row() >= limit:
            kept = f"last checkpoint: {last_checkpoint}"
            raise FloatingPointError(
                f"runtime.max_skipped_steps: the loss or its gradient was not finite in {limit} "
                f"steps in a row, at epoch {epoch}; lower the learning rate or clip the gradient; "
                + ("no checkpoint was written" if last_checkpoint is None else kept)
            )
        if self.engine.ranks.num_ranks > 1:
            self.engine.ranks.check_same_bits(self.engine.weights(), f"at epoch {epoch}")

    def new_unread(self) -> list[str]:
        """Names of trained parameters that the network does not read, each returned once."""
        found = self.engine.model.names_of(self.step.selection.unread)
        new = [name for name in found if name not in self._known_unread]
        self._known_unread.update(new)
        return new

    def evaluated_weights(self) -> Tensor:
        """The weights that are evaluated, flat as the masters: the average if there is one."""
        return self.engine.weights() if self.average is None else self.average.average

    def network_state(self) -> dict[str, Tensor]:
        """The network's state dict, in timm's names, with the weights that are evaluated."""
        return self.engine.network_state(self.evaluated_weights())

    def state_dict(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Copy all tensors that training changes, without waiting for the device.

        They are named `master.NAME`, `average.NAME`, `factor.NAME`, `buffer.NAME`, and as
        `Step.state_dict` names them. names: parameters to copy, default all. All ranks must call it
        at the same point.
        """
        parts = {
            "master": self.arenas.state_dict(names=names),
            "buffer": buffers_state(self.engine.model.network),
        }
        if self.average is not None:
            parts["average"] = self.average.state_dict(names)
        if self.engine.adapters is not None:
            parts["factor"] = self.engine.adapters.state_dict()
        state = {} if self._step is None else self._step.state_dict()
        for kind, part in parts.items():
            state |= {f"{kind}.{name}": value for name, value in part.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
        """Set everything to what `state_dict` returned; `start` has the parameters it left out."""
        self.arenas.load_state_dict({**start, **_of_kind(state, "master")})
        if self.average is not None:
            self.average.load_state_dict({**start, **_of_kind(state, "average")})
        if self.engine.adapters is not None:
            self.engine.adapters.load_state_dict(_of_kind(state, "factor"))
        load_buffers_state(self.engine.model.network, _of_kind(state, "buffer"))
        if self._step is not None:
            self._step.load_state_dict(state)

    def resume(
        self, progress: RunProgress, state: Mapping[str, Tensor], start: Mapping[str, Tensor]
    ) -> None:
        """Resume at `progress`: make the step and the average of then, and load their state."""
        epoch = progress.epoch if progress.has_begun else progress.epoch - 1
        if epoch > 0:  # layers were selected
            self.train_layers(progress.selected, stage_of(self.config, epoch))
        if _of_kind(state, "average"):
            self.start_average()
        self.engine.audit.load_state_dict(progress.audit)
        self.load_state_dict(state, start)


def _of_kind(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors named `kind.NAME`, by NAME."""
    prefix = f"{kind}."
    return {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
