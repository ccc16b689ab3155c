"""One step of SAFER: attack the images, find the worst weights nearby, learn from both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.schema import SAMConfig
from safer_fast.models.arenas import TrainedWeights, requiring_gradients
from safer_fast.models.batch_norm import BatchNormStatistics
from safer_fast.models.families import STEM
from safer_fast.models.perturbation import gradient_squares, restore_
from safer_fast.models.robust_model import RobustModel, training_mode
from safer_fast.runtime.cuda_graphs import PartBuffers, Replays
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.timing import StepTimer
from safer_fast.training.health import Health
from safer_fast.training.objectives import Objective, Targets
from safer_fast.training.optimizers import clip_, load_optimizer, optimizer_state, step_unless
from safer_fast.training.sam import ascend_as_set_

RECORDED = ("first pass", "ascent", "second pass", "update")


@dataclass
class Step:
    """The SAFER step over one selection of layers; it stays on the device and never waits for it.

    Masters change only in `update`; the network reads cast(masters) before and after a step. Passes
    work on tensors that never move, so that `replays` may record them as CUDA graphs.
    """

    model: RobustModel
    selection: TrainedWeights
    optimizer: torch.optim.Optimizer
    objective: Objective
    sam: SAMConfig
    attack: ReplayedAttack
    relative_radius: bool = False
    reuses_prefix: bool = True
    clip_norm: float | None = None
    micro_batch: MicroBatch = field(default_factory=MicroBatch)
    replays: Replays = field(default_factory=Replays)
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        names = self.model.names_of(self.selection.parameters)
        self.cut = self.model.cut_of(names) if self.reuses_prefix else STEM
        self.modules = self.model.random_modules(names)
        self.statistics = BatchNormStatistics(self.modules)
        flat, steps = self.selection.flat, len(self.attack.hits) - 1
        self.health = Health(flat, self.sam.rho > 0, steps, self.ranks)
        self.timer = StepTimer(flat.device)
        self.features = PartBuffers()
        self.replays.forget(*RECORDED)

    def __call__(
        self, images: Tensor, targets: Targets, epsilon: Tensor, step_size: Tensor
    ) -> None:
        """Learn from float images [B, C, H, W] in [0, 1]; radii are 0-d device tensors."""
        with self.replays.step():
            self.timer.begin()
            attack, loss = self.attack, self.objective.attack_loss
            hold = attack.buffers.hold
            inputs = [attack(images, targets.labels, epsilon, step_size, targets.counted, loss)]
            self.timer.end("attack")
            if self.objective.needs_clean:
                inputs.append(hold("clean", self.model.arrange(images)))
            held = Targets(hold("labels", targets.labels), hold("weights", targets.weights))
            self.statistics.keep()
            self._pass("first pass", inputs, held)
            if self.sam.rho > 0:
                if self.sam.sync == "global":
                    self.ranks.sum_(self.selection.flat)
                self.replays(("ascent",), self.ascend)
                self.timer.end("ascent")
                self._pass("second pass", inputs, held)
            self.ranks.sum_(self.selection.flat)
            self.timer.end("descent")
            self.statistics.average(self.ranks)
            self.replays(("update", held.labels.shape), lambda: self.update(held))
            self.timer.end("update")

    def _pass(self, name: str, inputs: Sequence[Tensor], targets: Targets) -> None:
        """Run a pass in micro-batches that fit into memory, replayed where it is recorded."""
        key = (name, inputs[0].shape, targets.labels.shape, targets.labels.dtype)
        work = partial(self.differentiate_at, inputs, targets, name == "second pass")
        self.micro_batch.run(
            len(targets.labels), lambda size: self.replays((*key, size), partial(work, size))
        )

    def differentiate_at(
        self, inputs: Sequence[Tensor], targets: Targets, is_second: bool, size: int
    ) -> None:
        """Store gradients at the weights the network reads; both passes share prefix features."""
        compute, shape = partial(self.prefix, inputs, size), inputs[0].shape
        features = self.features.hold(shape, size, compute, anew=not is_second)
        loss, num_right = self.differentiate(features, targets.split(size), is_second)
        self.selection.extra.copy_(self.health.note_pass(loss, num_right, is_second))

    @torch.no_grad()
    def prefix(self, inputs: Sequence[Tensor], size: int) -> list[Tensor]:
        """Features [size, N, D] below the first selected layer, for each micro-batch of inputs."""
        parts = zip(*(torch.split(whole, size) for whole in inputs), strict=True)
        return [self.model.prefix(torch.cat(part), self.cut) for part in parts]

    def differentiate(
        self, features: Sequence[Tensor], targets: Sequence[Targets], is_second: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return loss and number of images classified right, 0-d; store the loss's gradient."""
        results: list[tuple[Tensor, Tensor]] = []
        with training_mode(self.modules, is_second), requiring_gradients(self.selection.parameters):
            for part, part_targets in zip(features, targets, strict=True):
                logits = self.model.suffix(part, self.cut)
                loss = self.objective.loss(logits, part_targets)
                gradients = self.selection.gradients_of(loss)
                self.selection.store_gradients(gradients, adds=bool(results))
                results.append((loss.detach(), self.objective.num_right(logits, part_targets)))
        losses, hits = zip(*results, strict=True)
        return torch.stack(losses).sum(), torch.stack(hits).sum()

    def ascend(self) -> None:
        """Move the weights the network reads to w + e, the worst within the radius."""
        self.health.keep_gradient()
        ascend_as_set_(self.selection, self.sam, self.relative_radius)

    def update(self, targets: Targets) -> None:
        """Apply the gradients to the masters, unless loss or gradient is not finite."""
        squares = gradient_squares(self.selection.ranges)
        is_skipped = 1.0 - torch.isfinite(self.selection.extra + squares).float()
        self.health.record(targets, self.attack.hits, squares, is_skipped)
        clip_(self.selection.ranges, squares, self.clip_norm)
        self.statistics.undo_where(is_skipped)
        step_unless(is_skipped, self.optimizer)
        restore_(self.selection.ranges)

    def state_dict(self) -> dict[str, Tensor]:
        """Copy the state of optimizer and counts; all ranks must call it at the same point."""
        return optimizer_state(self.optimizer) | self.health.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the state to that of a step over the same weights; other names are ignored."""
        load_optimizer(self.optimizer, state)
        self.health.load_state_dict(state)
