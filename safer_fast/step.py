"""One step of SAFER: attack the images, find the worst weights nearby, learn from both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safer_fast.attacker import Attacker
from safer_fast.capture import Replays
from safer_fast.config import SAMConfig
from safer_fast.cut import STEM
from safer_fast.metrics import DeviceSums
from safer_fast.micro_batch import MicroBatch
from safer_fast.network import RobustModel, training_mode
from safer_fast.objective import Objective, Targets
from safer_fast.parameters import Selection
from safer_fast.sam import ascend_, gradient_squares, inverse_norm, restore_
from safer_fast.selection import requiring_gradients


@dataclass
class Step:
    """The method, over one selection of layers; everything stays on the device, nothing waits.

    Masters change only in `update`. While a step runs the compute weights of the selection are
    perturbed; before and after it they are cast(masters). `passes` and `update` read and write
    tensors that stay where they are, so that `replays` may repeat them from a recording.
    """

    model: RobustModel
    selection: Selection
    optimizer: torch.optim.Optimizer
    objective: Objective
    sam: SAMConfig
    attack: Attacker
    relative_radius: bool = False
    reuses_prefix: bool = True
    clip_norm: float | None = None
    micro_batch: MicroBatch = field(default_factory=MicroBatch)
    replays: Replays = field(default_factory=Replays)
    sums: DeviceSums = field(default_factory=DeviceSums)

    def __post_init__(self) -> None:
        chosen = {id(parameter) for parameter in self.selection.parameters}
        members = self.model.network.named_parameters()
        names = [name for name, parameter in members if id(parameter) in chosen]
        self.cut = self.model.cut_of(names) if self.reuses_prefix else STEM
        self.modules = self.model.random_modules(names)
        device = self.selection.parameters[0].device
        self.loss_sum, self.skipped_in_a_row, self.longest_skip = torch.zeros(3, device=device)
        self.replays.forget("SAM passes", "update")

    def __call__(
        self, images: Tensor, targets: Targets, epsilon: Tensor, step_size: Tensor
    ) -> None:
        """Learns from float images [B, C, H, W] in [0, 1]; radii are 0-d device tensors."""
        inputs = [self.attack(images, targets.labels, epsilon, step_size)]
        hold = self.attack.buffers.hold
        if self.objective.needs_clean:
            inputs.append(hold("clean", self.model.arrange(images)))
        held = Targets(hold("labels", targets.labels), hold("weights", targets.weights))

        def both_passes(size: int) -> None:
            key = ("SAM passes", inputs[0].shape, held.labels.shape, held.labels.dtype, size)
            self.replays(key, lambda: self.passes(inputs, held, size))

        self.micro_batch.run(len(images), both_passes)
        self.replays(("update",), self.update)

    def passes(self, inputs: Sequence[Tensor], targets: Targets, size: int) -> None:
        """The selection's ranges hold the gradients at the worst weights nearby.

        `inputs` are the adversarial examples and, for losses that read them, the clean images.
        """
        features, parts = self.prefix(inputs, size), targets.split(size)
        loss, num_correct = self.differentiate(features, parts)
        worst_loss = loss
        if self.sam.rho > 0:
            self.ascend()
            worst_loss, _ = self.differentiate(features, parts, is_second=True)
        self.loss_sum.copy_(loss + worst_loss)
        num_images = targets.num_images()
        rise = (worst_loss - loss) * num_images
        self.sums.add(
            loss=loss * num_images, loss_rise=rise, correct=num_correct, images=num_images
        )

    @torch.no_grad()
    def prefix(self, inputs: Sequence[Tensor], size: int) -> list[Tensor]:
        """Features [size, N, D] below the first selected layer, part by part, for both passes."""
        parts = zip(*(torch.split(whole, size) for whole in inputs), strict=True)
        return [self.model.prefix(torch.cat(part), self.cut) for part in parts]

    def differentiate(
        self, features: Sequence[Tensor], targets: Sequence[Targets], is_second: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Loss over all parts and number of images classified right, both 0-d.

        The selection's ranges hold the gradient of that loss.
        """
        losses: list[Tensor] = []
        hits: list[Tensor] = []
        mode = training_mode(self.modules, keeps_statistics=is_second)
        with mode, requiring_gradients(self.selection.parameters):
            for part, part_targets in zip(features, targets, strict=True):
                logits = self.model.suffix(part, self.cut)
                loss = self.objective.loss(logits, part_targets)
                gradients = torch.autograd.grad(loss, self.selection.parameters)
                self.selection.store_gradients(gradients, adds=bool(losses))
                losses.append(loss.detach())
                hits.append(part_targets.num_right(logits))
        return torch.stack(losses).sum(), torch.stack(hits).sum()

    def ascend(self) -> None:
        """The suffix reads the weights within the radius at which the loss is highest."""
        groups = list(self.selection.groups.values())
        ascend_(
            groups if self.sam.layerwise else [self.selection.ranges],
            self.sam.rho,
            adaptive=self.sam.adaptive,
            relative=self.sam.layerwise and self.relative_radius,
        )

    def update(self) -> None:
        """The optimizer applies the stored gradients to the masters, unless they are not finite.

        Afterwards the suffix reads the masters again.
        """
        squares = gradient_squares(self.selection.ranges)
        is_skipped = 1.0 - torch.isfinite(self.loss_sum + squares).float()
        if self.clip_norm is not None:
            shrink = (self.clip_norm * inverse_norm(squares)).clamp(max=1.0)
            for part in self.selection.ranges:
                part.gradient.mul_(torch.where(squares == 0, 1.0, shrink))
        self.skipped_in_a_row.add_(1).mul_(is_skipped)
        torch.maximum(self.longest_skip, self.skipped_in_a_row, out=self.longest_skip)
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = is_skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not is_skipped:  # apex cannot skip on the device: one synchronisation per step
            self.optimizer.step()
        restore_(self.selection.ranges)
        self.sums.add(skipped=is_skipped)

    def most_skipped_in_a_row(self) -> int:
        """The most steps in a row that were skipped since the step was built; waits for it."""
        return int(self.longest_skip)
