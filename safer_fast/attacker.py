"""The attack of a training step, on buffers that stay where they are, ready to be replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from safer_fast.answers import is_right
from safer_fast.attack import AttackLoss, Norm, climb_, frozen, random_start
from safer_fast.capture import Buffers, Replays
from safer_fast.float8 import LowPrecision
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
        precision: how the attack computes where it is less exact than amp; None: as amp.
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
        precision: LowPrecision | None = None,
    ) -> None:
        self.model, self.objective, self.norm, self.steps = model, objective, norm, steps
        self.draw: Draw = partial(random_start, generator=generator)
        self.micro_batch = micro_batch or MicroBatch()
        self.replays, self.precision = replays or Replays(), precision
        self.buffers = Buffers()
        device = next(model.parameters()).device
        self.hits = torch.zeros(steps + 1, device=device)
        """Images of the last batch that were classified rightly after 0, 1, ... iterations, the
        last iteration left out; and how many were attacked."""
        self.audited: dict[str, float] = {}
        """What the last audit of its precision found (attack_audit.py)."""
        self._iteration = torch.zeros((), device=device)
        self._iterations = torch.arange(steps + 1, device=device)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        step_size: Tensor,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Adversarial examples of images [B, C, H, W] in [0, 1], as `model.arrange` orders pixels.

        They lie in a buffer that the next call writes to. Radii are 0-d tensors on the device.
        counted: which images `hits` counts, bool [B]; default: all.
        """
        pixels = self.model.arrange(images)
        if counted is None:
            counted = torch.ones(len(images), dtype=torch.bool, device=images.device)
        self.hits.zero_()
        if self.steps == 0:
            return self.buffers.hold("adversarial", pixels)
        start = self.model.arrange(self.draw(images, epsilon, self.norm))
        adversarial = self.buffers.hold("adversarial", start)
        epsilon = self.buffers.hold("epsilon", epsilon)
        step_size = self.buffers.hold("step size", step_size)

        def attack_in_parts(size: int) -> None:
            self.hits.zero_()
            for first in range(0, len(pixels), size):
                part = slice(first, first + size)
                chosen = (start[part], pixels[part], labels[part], counted[part])
                adversarial[part].copy_(self._attack(*chosen, step_size, epsilon))
            self.hits[-1].copy_(counted.sum())

        with frozen(self.model), self.in_precision():
            self.micro_batch.run(len(pixels), attack_in_parts)
        return adversarial

    def in_precision(self) -> AbstractContextManager[None]:
        """The model computes in the attack's own precision for a while."""
        return nullcontext() if self.precision is None else self.precision.used()

    def _attack(
        self,
        start: Tensor,
        pixels: Tensor,
        labels: Tensor,
        counted: Tensor,
        step_size: Tensor,
        epsilon: Tensor,
    ) -> Tensor:
        """All steps from `start`, in buffers for parts of this size."""
        attacked = self.buffers.hold("attacked part", start)
        pixels = self.buffers.hold("part", pixels)
        labels = self.buffers.hold("labels of part", labels)
        counted = self.buffers.hold("counted part", counted)
        loss = self._counting(self._loss(pixels), counted)
        self._iteration.zero_()

        def iterate() -> None:
            climb_(self.model, attacked, pixels, labels, step_size, epsilon, self.norm, loss)
            self._iteration.add_(1)

        is_low = self.precision is not None
        key = ("attack", self.norm, attacked.shape, labels.shape, labels.dtype, is_low)
        for _ in range(self.steps):
            self.replays(key, iterate)
        return attacked

    def _counting(self, loss: AttackLoss, counted: Tensor) -> AttackLoss:
        """The loss, whose evaluation counts in `hits` what is classified rightly by then."""

        def counting(logits: Tensor, labels: Tensor) -> Tensor:
            num_right = (is_right(logits, labels) & counted).sum()
            # a number of the device's, so that a recording counts each time in another place
            self.hits.add_((self._iterations == self._iteration) * num_right)
            return loss(logits, labels)

        return counting

    def _loss(self, pixels: Tensor) -> AttackLoss:
        """The objective's loss; clean logits that it reads lie in a buffer."""
        if not self.objective.attack_needs_clean:
            return self.objective.attack_loss(None)
        with torch.no_grad():
            logits = self.model(pixels)
        return self.objective.attack_loss(self.buffers.hold("clean logits", logits))
