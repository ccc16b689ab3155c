"""Attacks by name: gradient attacks of our own, and those of AutoAttack by its own library."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safer_fast.attack import (
    AttackLoss,
    Norm,
    climb_,
    cross_entropy,
    default_step_size,
    frozen,
    pixel_gradient,
)
from safer_fast.capture import Buffers, Replays
from safer_fast.data.batch import fill_
from safer_fast.gradient_watch import Watch
from safer_fast.micro_batch import MicroBatch
from safer_fast.network import RobustModel
from safer_fast.savings import from_patches
from safer_fast.validation import LIBRARY_ATTACKS, num_attack_steps

LEAST_CLASSES = {"apgd-dlr": 3, "autoattack": 4}
"""Logits that the difference-of-logits-ratio losses compare."""
LEAST_SIZE = 5
"""Edge in pixels of the images that Square in L2 tiles."""
MOST_TARGETS = 9


class Climb(NamedTuple):
    """A gradient attack: its iterations, whether they start at random, the loss that they raise."""

    steps: int
    step_size: float
    is_random: bool
    loss: AttackLoss


def climb_of(name: str, epsilon: float) -> Climb:
    """How fgsm, pgd-K, cw or cw-K climbs.

    fgsm: one step of epsilon from the image itself (Goodfellow et al., 2015). pgd-K: K steps of
    2.5 epsilon / K from a random start (Madry et al., 2018). cw-K: the same on the `margin` loss.
    """
    if name == "fgsm":
        return Climb(1, epsilon, False, cross_entropy)
    steps = num_attack_steps(name)
    loss = margin if name.startswith("cw") else cross_entropy
    return Climb(steps, default_step_size(epsilon, steps), True, loss)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over images of max over j != y of z_j - z_y, the loss of Carlini & Wagner (2017).

    Without their cap, as in the PGD attacks of Madry et al. (2018).
    """
    is_own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    own = logits.masked_fill(~is_own, 0).sum(1)
    others = logits.masked_fill(is_own, -torch.inf).amax(1)
    return (others - own).sum()


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
        climb: Climb,
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
        climb: Climb,
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
            climb_(model, attacked, pixels, labels, *ball, climb.loss, watch)

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


class LibraryAttacks:
    """apgd-ce, apgd-dlr, square and autoattack, computed by pyautoattack on one frozen model.

    The first three are the parts of the standard ensemble with its parameters, one restart each,
    apgd-dlr untargeted; autoattack is the ensemble itself (Croce & Hein, 2020). With fewer than ten
    classes its targeted attacks take all of them in place of nine. report: is told once what the
    library warns of. Raises ValueError naming `--attacks` for what an attack is not made for.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        norm: Norm,
        num_classes: int,
        micro_batch: MicroBatch,
        report: Callable[[str], None] = print,
    ) -> None:
        self.model, self.norm, self.num_classes = model, norm, num_classes
        self.micro_batch, self._report = micro_batch, report
        self._told: set[str] = set()

    def __call__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        epsilon: float,
        seed: int,
        highest_loss: bool = False,
    ) -> Tensor:
        """What the attack makes of images [B, C, H, W]; those that resist stay as they are.

        The draws depend on the seed and on all images that are given. highest_loss: images that
        resist apgd come back where their loss was highest, for another model to be tried on them.
        """
        attacked = torch.empty_like(images)

        def attack_in_parts(size: int) -> None:
            for first in range(0, len(images), size):
                part = slice(first, first + size)
                attacked[part] = self._attack(
                    name, images[part], labels[part], epsilon, seed, highest_loss
                )

        device = images.device
        with (
            frozen(self.model),
            self._telling(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            self.micro_batch.run(len(images), attack_in_parts)
        return attacked

    def blind(self, name: str, images: Tensor, labels: Tensor) -> Tensor:
        """Images that give apgd no gradient that is of use where they are, bool [B]; else none.

        The gradient of apgd-dlr's loss is that of the margin, on another scale.
        """
        watch = Watch(len(images), images.device)
        loss = {"apgd-ce": cross_entropy, "apgd-dlr": margin}.get(name)

        def look_in_parts(size: int) -> None:
            assert loss is not None
            for first in range(0, len(images), size):
                part = slice(first, first + size)
                own = Watch(len(labels[part]), images.device)
                own.note(pixel_gradient(self.model, images[part], labels[part], own.seeing(loss)))
                watch.put(part, own)

        if loss is not None:
            with frozen(self.model):
                self.micro_batch.run(len(images), look_in_parts)
        return watch.blind

    def _attack(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        epsilon: float,
        seed: int,
        highest_loss: bool,
    ) -> Tensor:
        suite = self._suite(images.device, epsilon, seed)
        if name == "autoattack":
            attacked = suite.run_standard_evaluation(images, labels, batch_size=len(images))[0]
        elif name == "square":
            attacked = suite.square.perturb(images, labels)
        else:
            torch.manual_seed(seed)  # the library itself does not where the loss is what counts
            suite.apgd.loss = name.removeprefix("apgd-")
            attacked = suite.apgd.perturb(images, labels, best_loss=highest_loss)
        result: Tensor = attacked.detach()
        return result

    def _suite(self, device: torch.device, epsilon: float, seed: int) -> Any:
        from pyautoattack import AutoAttack

        norm = {"linf": "Linf", "l2": "L2"}[self.norm]
        suite = AutoAttack(
            self.model, norm=norm, eps=epsilon, version="standard", device=device, seed=seed
        )
        suite.verbose = False
        targets = min(MOST_TARGETS, self.num_classes - 1)
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = targets
        return suite

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What the library warns of is reported, each kind once; it ends the tracing it finds."""
        logger, tracer = logging.getLogger("auto-attack"), sys.gettrace()
        handler = _Handler(self._tell)
        before = logger.propagate, logger.level
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate, logger.level = before
            sys.settrace(tracer)

    def _tell(self, message: str) -> None:
        kind = re.sub(r"\d+", "", message)
        if kind not in self._told:
            self._told.add(kind)
            self._report(f"note: autoattack: {message}")


class _Handler(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


def check_suits(name: str, norm: Norm, num_classes: int, image_size: int) -> None:
    """Raises ValueError naming `--attacks` where the attack is not made for such a model."""
    least = LEAST_CLASSES.get(name, 2)
    if name in LIBRARY_ATTACKS and num_classes < least:
        fits = [n for n in LIBRARY_ATTACKS if LEAST_CLASSES.get(n, 2) <= num_classes]
        raise ValueError(
            f"--attacks: expected at least {least} classes for {name}, got {num_classes}"
            + (f"; in its place: --attacks {','.join(fits)}" if fits else "")
        )
    if name in ("square", "autoattack") and norm == "l2" and image_size < LEAST_SIZE:
        raise ValueError(
            f"--attacks: expected images of at least {LEAST_SIZE} pixels a side for {name} in l2, "
            f"got {image_size}"
        )
