"""AutoAttack and its parts, by the library that the benchmark's authors maintain."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from safer_fast.attacks.gradient_watch import Watch
from safer_fast.attacks.named import margin
from safer_fast.attacks.pgd import Norm, cross_entropy, frozen, pixel_gradient
from safer_fast.config.attack_names import ATTACKS, LIBRARY_ATTACKS, facts_of
from safer_fast.runtime.micro_batch import MicroBatch

MOST_TARGETS = 9


class LibraryAttacks:
    """apgd-ce, apgd-dlr, square and autoattack, computed by pyautoattack on one frozen model.

    The first three are the parts of the standard ensemble with its parameters, one restart each,
    apgd-dlr untargeted; autoattack is the ensemble itself (Croce & Hein, 2020). With fewer than ten
    classes its targeted attacks take all of them in place of nine. report: called
    once with each kind of warning of the library.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        norm: Norm | Literal["l1"],
        num_classes: int,
        micro_batch: MicroBatch,
        report: Callable[[str], None] = print,
    ) -> None:
        self.model, self.norm, self.num_classes = model, norm, num_classes
        self.micro_batch, self._report = micro_batch, report
        self._reported: set[str] = set()

    def __call__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        epsilon: float,
        seed: int,
        highest_loss: bool = False,
    ) -> Tensor:
        """Images [B, C, H, W] after the attack; those that resist stay as they are.

        The draws depend on the seed and on all images that are given. highest_loss: images that
        resist apgd come back where their loss was highest, for another model to be tried on them.
        """
        attacked = torch.empty_like(images)

        def attack_part(part: slice, images: Tensor, labels: Tensor) -> None:
            attacked[part] = self._attack(name, images, labels, epsilon, seed, highest_loss)

        device = images.device
        with (
            frozen(self.model),
            self._reporting(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            self.micro_batch.in_parts(attack_part, images, labels)
        return attacked

    def blind(self, name: str, images: Tensor, labels: Tensor) -> Tensor:
        """Images that give apgd no gradient that is of use where they are, bool [B]; else none.

        The gradient of apgd-dlr's loss is that of the margin, on another scale.
        """
        watch = Watch(len(images), images.device)
        loss = {"apgd-ce": cross_entropy, "apgd-dlr": margin}.get(name)

        def look_at_part(part: slice, images: Tensor, labels: Tensor) -> None:
            assert loss is not None
            own = Watch(len(labels), images.device)
            own.note(pixel_gradient(self.model, images, labels, own.seeing(loss)))
            watch.put(part, own)

        if loss is not None:
            with frozen(self.model):
                self.micro_batch.in_parts(look_at_part, images, labels)
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

        norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[self.norm]
        suite = AutoAttack(
            self.model, norm=norm, eps=epsilon, version="standard", device=device, seed=seed
        )
        suite.verbose = False
        targets = min(MOST_TARGETS, self.num_classes - 1)
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = targets
        return suite

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Report warnings of the library, each kind once; restore the tracing that it ends."""
        logger, tracer = logging.getLogger("auto-attack"), sys.gettrace()
        handler = _Handler(self._report_once)
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

    def _report_once(self, message: str) -> None:
        kind = re.sub(r"\d+", "", message)
        if kind not in self._reported:
            self._reported.add(kind)
            self._report(f"note: autoattack: {message}")


class _Handler(logging.Handler):
    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report(record.getMessage())


def check_suits(name: str, norm: str, num_classes: int, image_size: int) -> None:
    """Raise ValueError naming `--attacks` where the attack is not made for such a model."""
    facts = facts_of(name)
    assert facts is not None, name
    if num_classes < facts.least_classes and facts.is_library:
        fits = [n for n in LIBRARY_ATTACKS if ATTACKS[n].least_classes <= num_classes]
        raise ValueError(
            f"--attacks: expected at least {facts.least_classes} classes for {name}, got "
            f"{num_classes}" + (f"; in its place: --attacks {','.join(fits)}" if fits else "")
        )
    if norm in ("l2", "l1") and image_size < facts.least_size_l2:
        raise ValueError(
            f"--attacks: expected images of at least {facts.least_size_l2} pixels a side for "
            f"{name} in {norm}, got {image_size}"
        )
