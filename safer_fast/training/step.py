"""One step of SAFER: attack the images, find the worst weights nearby, learn from both."""

from __future__ import annotations

from collections.abc import Sequence
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
from safer_fast.runtime.cuda_graphs import Key, Replays
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.timing import StepTimer
from safer_fast.training.health import Health
from safer_fast.training.objectives import Objective, Targets
from safer_fast.training.optimizers import clip_, step_unless
from safer_fast.training.sam import ascend_as_set_

RECORDED = ("first pass", "ascent", "second pass", "update")


@dataclass
class Step:
    """The method, over one selection of layers; everything stays on the device, nothing waits.

    Masters change only in `update`; the network reads cast(masters) before and after a step. Passes
    work on tensors that stay where they are, so that `replays` may repeat them from a recording.
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
        self.health = Health(flat, self.sam.rho > 0, steps, self.ranks.is_first)
        self.stages = StepTimer(flat.device)
        self.features: dict[Key, list[Tensor]] = {}
        self.replays.forget(*RECORDED)

    def __call__(
        self, images: Tensor, targets: Targets, epsilon: Tensor, step_size: Tensor
    ) -> None:
        """Learns from float images [B, C, H, W] in [0, 1]; radii are 0-d device tensors."""
        self.stages.begin()
        hold, loss = self.attack.buffers.hold, self.objective.attack_loss
        inputs = [self.attack(images, targets.labels, epsilon, step_size, targets.counted, loss)]
        self.stages.end("attack")
        if self.objective.needs_clean:
            inputs.append(hold("clean", self.model.arrange(images)))
        held = Targets(hold("labels", targets.labels), hold("weights", targets.weights))
        self.statistics.keep()
        self._pass("first pass", inputs, held)
        if self.sam.rho > 0:
            if self.sam.sync == "global":
                self.ranks.sum_(self.selection.flat)
            self.replays(("ascent",), self.ascend)
            self.stages.end("ascent")
            self._pass("second pass", inputs, held)
        self.ranks.sum_(self.selection.flat)
        self.stages.end("descent")
        self.statistics.average(self.ranks)
        self.replays(("update", held.labels.shape), lambda: self.update(held))
        self.stages.end("update")

    def _pass(self, name: str, inputs: Sequence[Tensor], targets: Targets) -> None:
        """Does a pass, recorded where that is possible, on as many images as memory holds."""
        key = (name, inputs[0].shape, targets.labels.shape, targets.labels.dtype)
        work = partial(self.differentiate_at, inputs, targets, name == "second pass")
        self.micro_batch.run(
            len(targets.labels), lambda size: self.replays((*key, size), partial(work, size))
        )

    def differentiate_at(
        self, inputs: Sequence[Tensor], targets: Targets, is_second: bool, size: int
    ) -> None:
        """The ranges hold the gradients where the network now is, on features of the first pass."""
        key = inputs[0].shape, size
        if not is_second or key not in self.features:
            self.features[key] = self.attack.buffers.hold_all("features", self.prefix(inputs, size))
        loss, num_right = self.differentiate(self.features[key], targets.split(size), is_second)
        self.health.worst_loss.copy_(loss)
        if not is_second:
            self.health.loss.copy_(loss)
            self.health.num_right.copy_(num_right)
        self.selection.extra.copy_(self.health.loss + loss)

    @torch.no_grad()
    def prefix(self, inputs: Sequence[Tensor], size: int) -> list[Tensor]:
        """Features [size, N, D] below the first selected layer, part by part, of all inputs."""
        parts = zip(*(torch.split(whole, size) for whole in inputs), strict=True)
        return [self.model.prefix(torch.cat(part), self.cut) for part in parts]

    def differentiate(
        self, features: Sequence[Tensor], targets: Sequence[Targets], is_second: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Loss over all parts and number of images classified right, both 0-d.

        The selection's ranges hold the gradient of that loss.
        """
        results: list[tuple[Tensor, Tensor]] = []
        mode = training_mode(self.modules, keeps_statistics=is_second)
        with mode, requiring_gradients(self.selection.parameters):
            for part, part_targets in zip(features, targets, strict=True):
                logits = self.model.suffix(part, self.cut)
                loss = self.objective.loss(logits, part_targets)
                gradients = torch.autograd.grad(loss, self.selection.parameters)
                self.selection.store_gradients(gradients, adds=bool(results))
                results.append((loss.detach(), part_targets.num_right(logits)))
        losses, hits = zip(*results, strict=True)
        return torch.stack(losses).sum(), torch.stack(hits).sum()

    def ascend(self) -> None:
        """The suffix reads the weights within the radius at which the loss is highest."""
        self.health.keep_gradient()
        ascend_as_set_(self.selection, self.sam, self.relative_radius)

    def update(self, targets: Targets) -> None:
        """The optimizer applies the gradients to the masters, unless something is not finite."""
        squares = gradient_squares(self.selection.ranges)
        is_skipped = 1.0 - torch.isfinite(self.selection.extra + squares).float()
        self.health.record(targets, self.attack.hits, squares, is_skipped)
        if self.clip_norm is not None:
            clip_(self.selection.ranges, squares, self.clip_norm)
        self.health.skips.count(is_skipped)
        self.statistics.undo_where(is_skipped)
        step_unless(is_skipped, self.optimizer)
        restore_(self.selection.ranges)
