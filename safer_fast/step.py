"""One step of SAFER: attack the images, find the worst weights nearby, learn from both."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from safer_fast.attack import Norm, attack_, random_start
from safer_fast.config import SAMConfig
from safer_fast.cut import STEM
from safer_fast.metrics import DeviceSums
from safer_fast.network import RobustModel, training_mode
from safer_fast.objective import Objective
from safer_fast.parameters import Selection
from safer_fast.sam import ascend_, gradient_squares, inverse_norm, restore_
from safer_fast.selection import requiring_gradients


@dataclass
class Step:
    """The method, over one selection of layers; everything stays on the device, nothing waits.

    Masters change only in `update`. While a step runs the compute weights of the selection are
    perturbed; before and after it they are cast(masters).
    """

    model: RobustModel
    selection: Selection
    optimizer: torch.optim.Optimizer
    objective: Objective
    sam: SAMConfig
    norm: Norm
    attack_steps: int
    relative_radius: bool = False
    reuses_prefix: bool = True
    clip_norm: float | None = None
    generator: torch.Generator | None = None
    sums: DeviceSums = field(default_factory=DeviceSums)

    def __post_init__(self) -> None:
        chosen = {id(parameter) for parameter in self.selection.parameters}
        members = self.model.network.named_parameters()
        names = [name for name, parameter in members if id(parameter) in chosen]
        self.cut = self.model.cut_of(names) if self.reuses_prefix else STEM
        self.modules = self.model.random_modules(names)
        device = self.selection.parameters[0].device
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.longest_skip = torch.zeros((), device=device)

    def __call__(self, images: Tensor, labels: Tensor, epsilon: Tensor, step_size: Tensor) -> None:
        """Learns from float images [B, C, H, W] in [0, 1]; radii are 0-d device tensors."""
        adversarial = self.attack(images, labels, epsilon, step_size)
        inputs = adversarial
        if self.objective.needs_clean:
            inputs = torch.cat([adversarial, self.model.arrange(images)])
        with torch.no_grad():
            features = self.model.prefix(inputs, self.cut)  # [B, N, D], for both passes

        loss, logits = self.differentiate(features, labels)
        worst_loss = loss
        if self.sam.rho > 0:
            self.ascend()
            worst_loss, _ = self.differentiate(features, labels, is_second=True)
        is_skipped = self.update(loss + worst_loss)
        restore_(self.selection.ranges)

        correct = (logits[: len(labels)].argmax(1) == labels).sum()
        self.sums.add(
            loss=loss * len(labels),
            loss_rise=(worst_loss - loss) * len(labels),
            correct=correct,
            images=torch.ones_like(loss) * len(labels),
            skipped=is_skipped,
        )

    def attack(self, images: Tensor, labels: Tensor, epsilon: Tensor, step_size: Tensor) -> Tensor:
        """Adversarial examples for this batch, as `arrange` orders pixels.

        Without steps these are the images themselves.
        """
        pixels = self.model.arrange(images)
        if self.attack_steps == 0:
            return pixels
        clean = None
        if self.objective.attack_needs_clean:
            with torch.no_grad():
                clean = self.model(pixels)
        start = random_start(images, epsilon, self.norm, self.generator)
        return attack_(
            self.model,
            self.model.arrange(start),
            pixels,
            labels,
            step_size,
            epsilon,
            self.attack_steps,
            self.norm,
            self.objective.attack_loss(clean),
        )

    def differentiate(
        self, features: Tensor, labels: Tensor, is_second: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Loss and logits of the suffix; the selection's ranges hold the gradients of the loss."""
        mode = training_mode(self.modules, keeps_statistics=is_second)
        with mode, requiring_gradients(self.selection.parameters):
            logits = self.model.suffix(features, self.cut)
            loss = self.objective.loss(logits, labels)
            self.selection.store_gradients(torch.autograd.grad(loss, self.selection.parameters))
        return loss.detach(), logits.detach()

    def ascend(self) -> None:
        """The suffix reads the weights within the radius at which the loss is highest."""
        groups = list(self.selection.groups.values())
        ascend_(
            groups if self.sam.layerwise else [self.selection.ranges],
            self.sam.rho,
            adaptive=self.sam.adaptive,
            relative=self.sam.layerwise and self.relative_radius,
        )

    def update(self, loss: Tensor) -> Tensor:
        """The optimizer applies the stored gradients to the masters, unless they are not finite.

        Gives 1.0 if the step was skipped, else 0.0, as a 0-d tensor.
        """
        squares = gradient_squares(self.selection.ranges)
        is_skipped = 1.0 - torch.isfinite(loss + squares).float()
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
        return is_skipped

    def most_skipped_in_a_row(self) -> int:
        """The most steps in a row that were skipped since the step was built; waits for it."""
        return int(self.longest_skip)
