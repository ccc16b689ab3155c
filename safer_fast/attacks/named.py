"""Attacks by name: gradient attacks of our own, and those of AutoAttack by its own library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from safer_fast.attacks.pgd import (
    AttackLoss,
    cross_entropy,
    default_step_size,
    finite_pixels,
    placed_start,
)
from safer_fast.config.attack_names import num_attack_steps

if TYPE_CHECKING:
    from safer_fast.attacks.gradient_watch import Watch
    from safer_fast.attacks.replayed import ReplayedAttack


class AttackSpec(NamedTuple):
    """A gradient attack: its iterations, whether they start at random, the loss that they raise."""

    steps: int
    step_size: float
    is_random: bool
    loss: AttackLoss


def attack_spec(name: str, epsilon: float) -> AttackSpec:
    """Iterations, step size, start and loss of fgsm, pgd-K, cw or cw-K.

    fgsm: one step of epsilon from the image itself (Goodfellow et al., 2015). pgd-K: K steps of
    2.5 epsilon / K from a random start (Madry et al., 2018). cw-K: the same on the `margin` loss.
    """
    if name == "fgsm":
        return AttackSpec(1, epsilon, False, cross_entropy)
    steps = num_attack_steps(name)
    loss = margin if name.startswith("cw") else cross_entropy
    return AttackSpec(steps, default_step_size(epsilon, steps), True, loss)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over images of max over j != y of z_j - z_y, the loss of Carlini & Wagner (2017).

    Without their cap, as in the PGD attacks of Madry et al. (2018).
    """
    is_own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    own = logits.masked_fill(~is_own, 0).sum(1)
    others = logits.masked_fill(is_own, -torch.inf).amax(1)
    return (others - own).sum()


@dataclass(frozen=True)
class ThreatModel:
    """The ball that attacks stay in."""

    norm: Any
    epsilon: float


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
) -> Tensor:
    """Images [B, C, H, W] after the attack `name`: clean, or one that `attack_spec` knows.

    place: seeds and position of the images, see `placed_start`. rows: indices of the images that
    are attacked and returned; default: all. watch: holds what was noticed of them afterwards.
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
    settings: dict[str, Any] = {"steps": spec.steps, "start": start[rows], "loss": spec.loss}
    images, labels, radii = images[rows], labels[rows], (epsilon, spec.step_size)
    attacked = attack.attack_images(images, labels, *radii, **settings, watch=watch)
    return finite_pixels(attacked, images)
