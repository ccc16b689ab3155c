"""The attack of a training step, on buffers that stay where they are, ready to be replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from safer_fast.attacks.correctness import is_right
from safer_fast.attacks.float8 import LowPrecision
from safer_fast.attacks.gradient_watch import Watch
from safer_fast.attacks.named import AttackSpec
from safer_fast.attacks.pgd import AttackLoss, Norm, frozen, pgd_step_, random_start
from safer_fast.models.exact_savings import from_patches
from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.cuda_graphs import Buffers, Replays
from safer_fast.runtime.micro_batch import MicroBatch, fill_

Draw = Callable[[Tensor, Tensor, Norm], Tensor]
"""(images, epsilon, norm) -> where the attack starts."""


class AttackObjective(Protocol):
    """The part of an objective that an attack reads: the loss it raises."""

    @property
    def attack_needs_clean(self) -> bool:
        """True where the loss reads clean logits."""

    def attack_loss(self, clean_logits: Tensor | None) -> AttackLoss:
        """The loss that the attack raises, given clean logits [B, K] where it needs them."""


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
        objective: AttackObjective,
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
        """What the last audit of its precision found (audit.py)."""
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
            pgd_step_(self.model, attacked, pixels, labels, step_size, epsilon, self.norm, loss)
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


class Climber:
    """Gradient attacks on one frozen model, on buffers that stay where they are.

    norm: linf or l2. micro_batch: how many images are attacked at a time. replays: what iterations
    are run by. multiple: images are filled up to a multiple of it, so that shapes are few.
    """

    def __init__(
        self,
        model: RobustModel,
        norm: Norm,
        micro_batch: MicroBatch,
        replays: Replays,
        multiple: int = 1,
    ) -> None:
        self.model, self.norm, self.multiple = model, norm, multiple
        self.micro_batch, self.replays = micro_batch, replays
        self.buffers = Buffers()
        self._watches: dict[int, Watch] = {}

    def __call__(
        self,
        climb: AttackSpec,
        start: Tensor,
        images: Tensor,
        labels: Tensor,
        epsilon: float,
        watch: Watch | None = None,
    ) -> Tensor:
        """Where the climb from `start` [B, C, H, W] ends, within `epsilon` of the images.

        watch: has what was noticed of the images afterwards.
        """
        num_images = len(images)
        start, images, labels = (self._filled_up(values) for values in (start, images, labels))
        attacked = torch.empty_like(images)

        def climb_in_parts(size: int) -> None:
            for first in range(0, len(images), size):
                part = slice(first, first + size)
                own = self._watch(len(images[part]))
                chosen = (start[part], images[part], labels[part])
                attacked[part] = self._climb(climb, *chosen, radii, own)
                if watch is not None:
                    watch.put(part, own)

        radii = self._radius("epsilon", epsilon), self._radius("step size", climb.step_size)
        with frozen(self.model):
            self.micro_batch.run(len(images), climb_in_parts)
        return attacked[:num_images]

    def _climb(
        self,
        climb: AttackSpec,
        start: Tensor,
        images: Tensor,
        labels: Tensor,
        radii: tuple[Tensor, Tensor],
        watch: Watch,
    ) -> Tensor:
        model, (epsilon, step_size) = self.model, radii
        attacked = self.buffers.hold("attacked", model.arrange(start))
        pixels = self.buffers.hold("pixels", model.arrange(images))
        labels = self.buffers.hold("labels", labels)

        watch.begin()

        def iterate() -> None:
            ball = step_size, epsilon, self.norm
            pgd_step_(model, attacked, pixels, labels, *ball, climb.loss, watch)

        for _ in range(climb.steps):
            self.replays(("attack", climb.loss, attacked.shape), iterate)
        if model.patch_size is None:
            return attacked
        return from_patches(attacked, model.patch_size, images.shape[1], images.shape[2])

    def _filled_up(self, values: Tensor) -> Tensor:
        size = -(-len(values) // self.multiple) * self.multiple
        if size == len(values):
            return values
        filled = values.new_empty(size, *values.shape[1:])
        filled[: len(values)] = values
        return fill_(filled, len(values))

    def _watch(self, num_images: int) -> Watch:
        """The one of parts of this size: recordings write to it."""
        if num_images not in self._watches:
            self._watches[num_images] = Watch(num_images, self.model.mean.device)
        return self._watches[num_images]

    def _radius(self, name: str, value: float) -> Tensor:
        return self.buffers.hold(name, torch.full((), value, device=self.model.mean.device))
