"""PGD, or Auto-PGD, in buffers that stay where they are: iterations replay as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from safer_fast.attacks.apgd import Climb, climb
from safer_fast.attacks.correctness import is_right
from safer_fast.attacks.float8 import LowPrecision
from safer_fast.attacks.gradient_watch import Watch
from safer_fast.attacks.pgd import (
    AttackLoss,
    EachLoss,
    Norm,
    cross_entropies,
    cross_entropy,
    frozen,
    pgd_step_,
    random_start,
)
from safer_fast.models.exact_savings import from_patches
from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.cuda_graphs import Buffers, Key, Replays
from safer_fast.runtime.micro_batch import MicroBatch, fill_

Draw = Callable[[Tensor, Tensor, Norm], Tensor]
"""(images, epsilon, norm) -> where the attack starts."""


class PixelLoss(NamedTuple):
    """The loss that an attack raises.

    function: takes logits [B, K] and targets, returns a 0-d sum over images. Recordings are kept by
    it: give the same function for each batch. against_clean: the targets are the logits of the
    images themselves, as the attack computes them, in place of the labels (TRADES). counts: images
    are classified right or wrong by logits and labels; false for embeddings. of_each: the same loss
    of each image, which Auto-PGD needs.
    """

    function: AttackLoss = cross_entropy
    against_clean: bool = False
    counts: bool = True
    of_each: EachLoss = cross_entropies

    @classmethod
    def of(cls, losses: EachLoss, *, against_clean: bool = False, counts: bool = True) -> PixelLoss:
        """Make it of a loss of each image [B]; a 0-d sum over images will do for PGD."""
        return cls(_summed(losses), against_clean, counts, losses)


@cache
def _summed(losses: EachLoss) -> AttackLoss:
    """The loss of each image, summed; the same function each time."""
    return lambda logits, targets: losses(logits, targets).sum()


CROSS_ENTROPY = PixelLoss()


class ReplayedAttack:
    """PGD against one model in eval mode, batch after batch: for training, audits and evaluations.

    With `kind` apgd it is Auto-PGD (apgd.py), which has step sizes of its own.

    Args:
        model: takes pixels in the order of `model.arrange`.
        norm: linf or l2.
        steps: iterations of a training attack; 0 leaves images as they are. May be lowered between
            batches.
        generator: source of the random starts, on the model's device, unless `draw` is replaced.
        micro_batch: how many images are attacked at a time.
        replays: runs the iterations, one at a time.
        precision: what the attack computes in where that is less exact than amp; None: amp.
        multiple: `attack_images` fills batches up to a multiple of it, so that shapes are few.
        kind: pgd or apgd.
        name: of the recorded phase; attacks that share `replays` have different ones.
    """

    def __init__(
        self,
        model: RobustModel,
        *,
        norm: Norm = "linf",
        steps: int = 0,
        generator: torch.Generator | None = None,
        micro_batch: MicroBatch | None = None,
        replays: Replays | None = None,
        precision: LowPrecision | None = None,
        multiple: int = 1,
        kind: Literal["pgd", "apgd"] = "pgd",
        name: str = "attack",
    ) -> None:
        self.model, self.norm, self.steps, self.multiple = model, norm, steps, multiple
        self.name, self.kind = name, kind
        self.draw: Draw = partial(random_start, generator=generator)
        self.micro_batch = micro_batch or MicroBatch()
        self.replays, self.precision = replays or Replays(), precision
        self.buffers = Buffers()
        device = next(model.parameters()).device
        self.hits = torch.zeros(steps + 1, device=device)
        """Number of images of the last training batch that were classified correctly after 0, 1,
        ... iterations, the last one left out, -1 for those that a lowered `steps` did not take;
        then the number that was attacked."""
        self.audited: dict[str, float] = {}
        """Figures of the last audit of the precision (audit.py)."""
        self._iteration = torch.zeros((), device=device)
        self._iterations = torch.arange(steps + 1, device=device)
        self._watches: dict[int, Watch] = {}

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        step_size: Tensor,
        counted: Tensor | None = None,
        loss: PixelLoss = CROSS_ENTROPY,
        *,
        start: Tensor | None = None,
    ) -> Tensor:
        """Adversarial examples of images [B, C, H, W] in [0, 1], as `model.arrange` orders pixels.

        They lie in a buffer that the next call writes to. Radii are 0-d tensors on the device.
        counted: the images that `hits` counts, bool [B]; default: all. start: [B, C, H, W];
        default: as `draw` gives it.
        """
        pixels = self.model.arrange(images)
        if counted is None:
            counted = torch.ones(len(images), dtype=torch.bool, device=images.device)
        if not loss.counts:
            counted = torch.zeros_like(counted)
        self.hits.zero_()
        if self.steps == 0:
            return self.buffers.hold("adversarial", pixels)
        if start is None:
            start = self.draw(images, epsilon, self.norm)
        start = self.model.arrange(start)
        adversarial = self.buffers.hold("adversarial", start)
        radii = self._hold_radii(epsilon, step_size)

        def attack_part(
            part: slice, start: Tensor, pixels: Tensor, labels: Tensor, counted: Tensor
        ) -> None:
            if part.start == 0:
                self.hits.zero_()
            chosen = (start, pixels, labels, radii, loss, self.steps)
            adversarial[part].copy_(self._attack(*chosen, counted=counted))

        with frozen(self.model), self.in_precision():
            self.micro_batch.in_parts(attack_part, start, pixels, labels, counted)
        if self.steps + 1 < len(self.hits):
            self.hits[self.steps : -1].fill_(-1)
        self.hits[-1].copy_(counted.sum())
        return adversarial

    def attack_images(
        self,
        images: Tensor,
        labels: Tensor,
        epsilon: float,
        step_size: float,
        *,
        steps: int,
        start: Tensor,
        loss: AttackLoss = cross_entropy,
        watch: Watch | None = None,
    ) -> Tensor:
        """Adversarial examples [B, C, H, W] of images in [0, 1], from `start` [B, C, H, W].

        watch: holds what was noticed of the images afterwards.
        """
        model, num_images = self.model, len(images)
        start, pixels, labels = (self._filled_up(values) for values in (start, images, labels))
        start, pixels = model.arrange(start), model.arrange(pixels)
        adversarial = torch.empty_like(pixels)
        values = (torch.full((), value, device=model.mean.device) for value in (epsilon, step_size))
        radii = self._hold_radii(*values)

        def attack_part(part: slice, start: Tensor, pixels: Tensor, labels: Tensor) -> None:
            own = self._watch(len(pixels))
            chosen = (start, pixels, labels, radii, PixelLoss(loss), steps)
            adversarial[part].copy_(self._attack(*chosen, watch=own))
            if watch is not None:
                watch.put(part, own)

        with frozen(model), self.in_precision():
            self.micro_batch.in_parts(attack_part, start, pixels, labels)
        if not self.replays.can_record:  # or each number of images would keep buffers of its own
            self.buffers = Buffers()
        if model.patch_size is not None:
            size = images.shape[1], images.shape[2]
            adversarial = from_patches(adversarial, model.patch_size, *size)
        return adversarial[:num_images]

    def release(self) -> None:
        """Free all buffers and recordings; the next attack makes them anew."""
        self.replays.forget(self.name)
        self.buffers, self._watches = Buffers(), {}

    def in_precision(self) -> AbstractContextManager[None]:
        """Make the model compute in the attack's own precision within a `with` block."""
        return nullcontext() if self.precision is None else self.precision.used()

    def _attack(
        self,
        start: Tensor,
        pixels: Tensor,
        labels: Tensor,
        radii: tuple[Tensor, Tensor],
        loss: PixelLoss,
        steps: int,
        *,
        counted: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Take all steps from `start` in buffers for parts of this size; fill `hits` or `watch`."""
        attacked = self.buffers.hold("attacked part", start)
        pixels = self.buffers.hold("part", pixels)
        targets = labels = self.buffers.hold("labels of part", labels)
        if loss.against_clean:
            with torch.no_grad():
                targets = self.buffers.hold("clean logits", self.model(pixels))
        function, (epsilon, step_size) = loss.function, radii
        if self.kind == "apgd":
            function = loss.of_each
        if counted is not None:
            counted = self.buffers.hold("counted part", counted)
            function = self._counting(function, labels, counted)
            self._iteration.zero_()
        if watch is not None:
            watch.begin()

        how = (self.norm, loss, self.precision is not None, watch is None)
        key = (self.name, *how, attacked.shape, labels.shape, labels.dtype)
        if self.kind == "apgd":
            assert watch is None, "only PGD is watched"
            state = Climb(self.buffers, attacked, pixels, epsilon, self.norm)
            return climb(state, self.model, targets, function, steps, partial(self._run, key))

        def iterate() -> None:
            ball = step_size, epsilon, self.norm
            pgd_step_(self.model, attacked, pixels, targets, *ball, function, watch)
            if counted is not None:
                self._iteration.add_(1)

        for _ in range(steps):
            self.replays(key, iterate)
        return attacked

    def _run(self, key: Key, name: str, work: Callable[[], None]) -> None:
        """Do a part of Auto-PGD that evaluates the loss once, or replay what was recorded of it."""

        def iterate() -> None:
            work()
            self._iteration.add_(1)

        self.replays((*key, name), iterate)

    def _counting(self, loss: AttackLoss, labels: Tensor, counted: Tensor) -> AttackLoss:
        """The loss, whose evaluation adds to `hits` the images classified correctly by then."""

        def counting(logits: Tensor, targets: Tensor) -> Tensor:
            num_right = (is_right(logits, labels) & counted).sum()
            # a number on the device, so that a recording counts each time in another place
            self.hits.add_((self._iterations == self._iteration) * num_right)
            return loss(logits, targets)

        return counting

    def _hold_radii(self, epsilon: Tensor, step_size: Tensor) -> tuple[Tensor, Tensor]:
        return self.buffers.hold("epsilon", epsilon), self.buffers.hold("step size", step_size)

    def _watch(self, num_images: int) -> Watch:
        """The flags of parts of this size, which stay where they are: recordings write to them."""
        if num_images not in self._watches:
            self._watches[num_images] = Watch(num_images, self.model.mean.device)
        return self._watches[num_images]

    def _filled_up(self, values: Tensor) -> Tensor:
        size = -(-len(values) // self.multiple) * self.multiple
        if size == len(values):
            return values
        filled = values.new_empty(size, *values.shape[1:])
        filled[: len(values)] = values
        return fill_(filled, len(values))
