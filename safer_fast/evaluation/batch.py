"""One batch under one attack, attacked and counted; evaluations and training share this code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from safer_fast.attacks.autoattack import LibraryAttacks
from safer_fast.attacks.correctness import has_finite, is_right
from safer_fast.attacks.gradient_watch import Watch
from safer_fast.attacks.named import attack_by_name, squared_distance, squared_distances
from safer_fast.attacks.pgd import finite_pixels
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.attack_names import LIBRARY_ATTACKS, has_restarts
from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.seeds import derive_seed

NUM_SHAPES = 8
"""Sizes of attacked batches where each is compiled or recorded for."""


def multiple_of(num_images: int) -> int:
    """Number to fill batches of at most so many images up to a multiple of: few shapes occur."""
    return -(-num_images // NUM_SHAPES)


class BatchOutcome(NamedTuple):
    """Images of a batch under an attack, on the device.

    right: classified correctly without the attack and under it, bool [B]. losses: cross-entropy of
    each image where its last attack left it [B], or its squared embedding distance, the largest of
    all restarts. finite: with finite logits there, bool [B]. blind:
    without a gradient of use at some iteration, bool [B]. starts_right: correct without an attack
    and at all random starts, bool [B].
    """

    right: Tensor
    losses: Tensor
    finite: Tensor
    blind: Tensor
    starts_right: Tensor


class BatchEvaluator:
    """Attacks batches and counts as RobustBench does: right without the attack and under it.

    Args:
        model: its predictions count.
        attack: on this model, or on the source of a transfer.
        epsilon: radius of the ball.
        seed: random starts depend on it, the attack, the restart and an image's position alone.
        restarts: random starts of pgd and cw; an image that one of them fools is not right.
        attacks_wrong: images that are wrong without an attack are attacked too, for their losses;
            else only those that are right are, and by the next restart those that still are.
        is_compiled: the model's blocks are compiled; predictions are then computed eagerly, as
            batches of any size are nothing to compile for.
        library: attacks of AutoAttack; None: there are none.
        teacher: images -> embeddings [B, D] that those of the model are compared with: attacks
            raise the squared distance, and images whose embedding is finite are right.
    """

    def __init__(
        self,
        model: RobustModel,
        attack: ReplayedAttack,
        *,
        epsilon: float,
        seed: int,
        restarts: int = 1,
        attacks_wrong: bool = False,
        is_compiled: bool = False,
        library: LibraryAttacks | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.attack, self.library = model, attack, library
        self.teacher = teacher
        self.epsilon, self.seed, self.restarts = epsilon, seed, restarts
        self.attacks_wrong, self.is_compiled = attacks_wrong, is_compiled
        self.is_transfer = attack.model is not model

    def measure(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        position: int,
        clean: BatchOutcome | None = None,
    ) -> BatchOutcome:
        """The outcome of images [B, C, H, W] in [0, 1] at `position` of the split under `name`.

        clean: the outcome without an attack, which any other attack needs.
        """
        found: list[BatchOutcome] = []

        def measure_anew(_: int) -> None:
            found.append(self._measure(name, images, labels, position, clean))

        # memory may also end outside of parts, which are then made smaller
        self.attack.micro_batch.run(len(labels), measure_anew)
        return found[-1]

    def _measure(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        position: int,
        clean: BatchOutcome | None,
    ) -> BatchOutcome:
        watch = Watch(len(labels), images.device)
        if self.teacher is not None:
            labels = self.teacher(images)
        if name == "clean":
            return BatchOutcome(*self._classify(images, labels), watch.blind, watch.starts_right)
        assert clean is not None
        right, losses, finite = (values.clone() for values in clean[:3])
        watch.starts_right.copy_(right)
        num_restarts = self.restarts if has_restarts(name) else 1
        for restart in range(num_restarts):
            if self.attacks_wrong:
                rows = torch.arange(len(labels), device=images.device)
            else:  # waits for the device
                rows = right.nonzero().squeeze(1)
            if not len(rows):
                break
            purpose = f"evaluation {name}" + (f" restart {restart}" if restart else "")
            attacked = self._attack(name, images, labels, rows, position, purpose, watch)
            still_right, own, finite[rows] = self._classify(attacked, labels[rows])
            if self.teacher is not None and restart:
                own = torch.maximum(own, losses[rows])
            losses[rows] = own
            right[rows] &= still_right
        return BatchOutcome(right, losses, finite, watch.blind, watch.starts_right)

    def _attack(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        rows: Tensor,
        position: int,
        purpose: str,
        watch: Watch,
    ) -> Tensor:
        """These rows of the images after the attack; the watch notes what it sees of them."""
        seed_of = partial(derive_seed, self.seed, purpose)
        chosen = images[rows], labels[rows]
        if name in LIBRARY_ATTACKS:
            assert self.library is not None
            with self._eagerly():
                watch.blind[rows] |= self.library.blind(name, *chosen)
                seed = seed_of(position)
                attacked = self.library(name, *chosen, self.epsilon, seed, self.is_transfer)
            return finite_pixels(attacked, chosen[0])
        own, place = Watch(len(rows), images.device), (seed_of, position)
        loss = None if self.teacher is None else squared_distance
        attacked = attack_by_name(
            name, self.attack, images, labels, self.epsilon, place, watch=own, rows=rows, loss=loss
        )
        watch.blind[rows] |= own.blind
        watch.starts_right[rows] &= own.starts_right
        return attacked

    def _classify(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images that are right, bool [B], their losses [B], and those of finite logits, bool."""
        right, finite = torch.empty(2, len(labels), dtype=torch.bool, device=images.device)
        losses = torch.empty(len(labels), device=images.device)

        def classify_part(part: slice, images: Tensor, labels: Tensor) -> None:
            logits = self.model(images)
            finite[part] = has_finite(logits)
            if self.teacher is not None:
                right[part], losses[part] = finite[part], squared_distances(logits, labels)
                return
            right[part] = is_right(logits, labels)
            losses[part] = cross_entropy(logits, labels, reduction="none")

        with torch.no_grad(), self._eagerly():
            self.attack.micro_batch.in_parts(classify_part, images, labels)
        return right, losses, finite

    def _eagerly(self) -> AbstractContextManager[object]:
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()
