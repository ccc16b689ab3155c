"""The attack of a training step, on buffers that stay where they are, ready to be replayed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from safer_fast.attack import AttackLoss, Norm, climb_, frozen, random_start
from safer_fast.capture import Buffers, Replays
from safer_fast.micro_batch import MicroBatch
from safer_fast.network import RobustModel
from safer_fast.objective import Objective

Draw = Callable[[Tensor, Tensor, Norm], Tensor]
"""(images, epsilon, norm) -> where the attack starts."""


class Attacker:
    """PGD against one model, batch after batch; its recordings outlive a selection of layers.

    Args:
        model: is attacked in eval mode, pixels in the order of `model.arrange`.
        objective: gives the loss that is raised.
        norm: linf or l2.
        steps: iterations; 0 leaves images as they are. May be changed between batches.
        generator: source of the random starts, on the model's device, unless `draw` is set anew.
        micro_batch: how many images are attacked at a time.
        replays: what iterations are run by, one at a time.
    """

    def __init__(
        self,
        model: RobustModel,
        objective: Objective,
        *,
        norm: Norm = "linf",
        steps: int,
        generator: torch.Generator | None = None,
        micro_batch: MicroBatch | None = None,
        replays: Replays | None = None,
    ) -> None:
        self.model, self.objective, self.norm, self.steps = model, objective, norm, steps
        self.draw: Draw = partial(random_start, generator=generator)
        self.micro_batch = micro_batch or MicroBatch()
        self.replays = replays or Replays()
        self.buffers = Buffers()

    def __call__(
        self, images: Tensor, labels: Tensor, epsilon: Tensor, step_size: Tensor
    ) -> Tensor:
        """Adversarial examples of images [B, C, H, W] in [0, 1], as `model.arrange` orders pixels.

        They lie in a buffer that the next call writes to. Radii are 0-d tensors on the device.
        """
        pixels = self.model.arrange(images)
        if self.steps == 0:
            return self.buffers.hold("adversarial", pixels)
        start = self.model.arrange(self.draw(images, epsilon, self.norm))
        adversarial = self.buffers.hold("adversarial", start)
        epsilon = self.buffers.hold("epsilon", epsilon)
        step_size = self.buffers.hold("step size", step_size)

        def attack_in_parts(size: int) -> None:
            for first in range(0, len(pixels), size):
                part = slice(first, first + size)
                attacked = self._attack(start[part], pixels[part], labels[part], step_size, epsilon)
                adversarial[part].copy_(attacked)

        with frozen(self.model):
            self.micro_batch.run(len(pixels), attack_in_parts)
        return adversarial

    def _attack(
        self, start: Tensor, pixels: Tensor, labels: Tensor, step_size: Tensor, epsilon: Tensor
    ) -> Tensor:
        """All steps from `start`, in buffers for parts of this size."""
        attacked = self.buffers.hold("attacked part", start)
        pixels = self.buffers.hold("part", pixels)
        labels = self.buffers.hold("labels of part", labels)
        loss = self._loss(pixels)

        def iterate() -> None:
            climb_(self.model, attacked, pixels, labels, step_size, epsilon, self.norm, loss)

        key = ("attack", self.norm, attacked.shape, labels.shape, labels.dtype)
        for _ in range(self.steps):
            self.replays(key, iterate)
        return attacked

    def _loss(self, pixels: Tensor) -> AttackLoss:
        """The objective's loss; clean logits that it reads lie in a buffer."""
        if not self.objective.attack_needs_clean:
            return self.objective.attack_loss(None)
        with torch.no_grad():
            logits = self.model(pixels)
        return self.objective.attack_loss(self.buffers.hold("clean logits", logits))
