"""Gradient attacks by name: fgsm, pgd-K, cw-K and registered ones, from `config.attack_names`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from safer_fast.attacks.arguments import check_function
from safer_fast.attacks.pgd import (
    AttackLoss,
    cross_entropy,
    default_step_size,
    finite_pixels,
    placed_start,
)
from safer_fast.attacks.replayed import CROSS_ENTROPY, PixelLoss, ReplayedAttack
from safer_fast.config.attack_names import ATTACKS, ThreatModel, facts_of
from safer_fast.config.messages import shortened

if TYPE_CHECKING:
    from safer_fast.attacks.gradient_watch import Watch


__all__ = ["ThreatModel", "attack_by_name", "attack_spec", "register_attack"]


class AttackSpec(NamedTuple):
    """A gradient attack: its iterations, whether they start at random, the loss that they raise."""

    steps: int
    step_size: float
    is_random: bool
    loss: AttackLoss


def attack_spec(name: str, epsilon: float) -> AttackSpec:
    """Iterations, step size, start and loss of fgsm, pgd-K, cw, cw-K or a registered attack.

    fgsm: one step of epsilon from the image itself (Goodfellow et al., 2015). pgd-K: K steps of
    2.5 epsilon / K from a random start (Madry et al., 2018). cw-K: the same on the `margin` loss.
    """
    facts = facts_of(name)
    assert facts is not None, name
    steps = facts.steps or 0
    step_size = default_step_size(epsilon, steps) if facts.is_random else epsilon
    return AttackSpec(steps, step_size, facts.is_random, LOSSES[facts.loss])


def register_attack(name: str, loss: AttackLoss, *, steps: int | None = None) -> None:
    """Make `NAME-K` an attack of K steps like pgd-K that raises `loss`, in this process.

    >>> def confidence(logits, labels):
    ...     return -logits.softmax(1).gather(1, labels[:, None]).sum()
    >>> register_attack("confidence", confidence)

    loss: (logits [B, K], class numbers [B]) -> a 0-d sum over images. steps: iterations of the
    plain name; default: it needs a number. Raises ValueError for a name that is taken, or is no
    lower-case word of letters, digits, - and _ that begins with a letter and ends in one.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9_-]*[a-z])?", name):
        raise ValueError(f"name: expected lower-case letters as in my-loss, got {shortened(name)}")
    if name in ATTACKS:
        raise ValueError(f"name: expected a new one, got {name!r}, which is an attack already")
    check_function("loss", loss)
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    ATTACKS[name] = replace(ATTACKS["pgd"], loss=name, steps=steps)
    LOSSES[name] = loss


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of `margins` over images."""
    return margins(logits, labels).sum()


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest z_j - z_y, j != y, of each image, [B], the loss of Carlini & Wagner (2017).

    Without their cap, as in the PGD attacks of Madry et al. (2018).
    """
    is_own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    own = logits.masked_fill(~is_own, 0).sum(1)
    others = logits.masked_fill(is_own, -torch.inf).amax(1)
    return others - own


def logit_ratios(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (DLR) of each image, [B] (Croce & Hein, 2020).

    The margin over the distance of the highest and the third highest logit: no factor of the logits
    changes it. It needs three classes.
    """
    highest = logits.topk(3, dim=1).values
    return margins(logits, labels) / (highest[:, 0] - highest[:, 2] + 1e-12)


def squared_distances(embeddings: Tensor, originals: Tensor) -> Tensor:
    """Squared Euclidean distance of each embedding [B, D] to that of its clean image, [B]."""
    return (embeddings - originals).square().sum(1)


def squared_distance(embeddings: Tensor, originals: Tensor) -> Tensor:
    """Squared distances of embeddings [B, D] to those of the clean images, summed: FARE's loss.

    Its gradient is zero where both are the same: attacks start at random.
    """
    return squared_distances(embeddings, originals).sum()


LOSSES: dict[str, AttackLoss] = {"cross-entropy": cross_entropy, "margin": margin}
"""Losses of gradient attacks by the names that the table of attacks has for them."""
TRAINING_LOSSES: dict[str, PixelLoss] = {
    "cross-entropy": CROSS_ENTROPY,
    "margin": PixelLoss.of(margins),
    "dlr": PixelLoss.of(logit_ratios),
}
"""Losses that `attack.loss` names in place of that of the objective."""


def attack_by_name(
    name: str,
    attack: ReplayedAttack,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    place: tuple[Callable[[int], int], int],
    *,
    watch: Watch | None = None,
    rows: Tensor | None = None,
    loss: AttackLoss | None = None,
) -> Tensor:
    """Images [B, C, H, W] after the attack `name`: clean, or one that `attack_spec` knows.

    place: seeds and position of the images, see `placed_start`. rows: indices of the images that
    are attacked and returned; default: all. watch: holds what was noticed of them afterwards. loss:
    is raised in place of the attack's own.
    """
    if rows is None:
        rows = torch.arange(len(images), device=images.device)
    if name == "clean":
        return images[rows]
    spec, start = attack_spec(name, epsilon), images
    if spec.is_random:
        seed_of, position = place
        radius = torch.full((), epsilon, device=images.device)
        start = placed_start(images, radius, attack.norm, position=position, seed_of=seed_of)
    settings: dict[str, Any] = {
        "steps": spec.steps,
        "start": start[rows],
        "loss": loss or spec.loss,
    }
    images, labels, radii = images[rows], labels[rows], (epsilon, spec.step_size)
    attacked = attack.attack_images(images, labels, *radii, **settings, watch=watch)
    return finite_pixels(attacked, images)
