"""Attacks by name: gradient attacks of our own, and those of AutoAttack by its own library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from safer_fast.attacks.pgd import AttackLoss, cross_entropy, default_step_size
from safer_fast.config.attack_names import num_attack_steps

if TYPE_CHECKING:
    from safer_fast.attacks.gradient_watch import Watch
    from safer_fast.models.robust_model import RobustModel
    from safer_fast.runtime.micro_batch import MicroBatch


class AttackSpec(NamedTuple):
    """A gradient attack: its iterations, whether they start at random, the loss that they raise."""

    steps: int
    step_size: float
    is_random: bool
    loss: AttackLoss


def attack_spec(name: str, epsilon: float) -> AttackSpec:
    """How fgsm, pgd-K, cw or cw-K climbs.

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
    model: RobustModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    threat: ThreatModel,
    place: tuple[Callable[[int], int], int],
    micro_batch: MicroBatch,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Images [B, C, H, W] after the attack `name`: clean, or one that `climb_of` knows.

    place: seeds and position of the images, see `placed_start`. watch: has what was noticed of the
    images afterwards.
    """
    import torch

    from safer_fast.attacks.gradient_watch import Watch
    from safer_fast.attacks.pgd import finite_pixels, pgd, placed_start

    if name == "clean":
        return images
    radius, norm = threat.epsilon, threat.norm
    climb, start = attack_spec(name, radius), images
    if climb.is_random:
        seed_of, position = place
        largest = torch.full((), radius).to(images)
        start = placed_start(images, largest, norm, position=position, seed_of=seed_of)
    attacked = torch.empty_like(images)

    def attack_in_parts(size: int) -> None:
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            own = Watch(len(images[part]), images.device)
            attacked[part] = pgd(
                model,
                images[part],
                labels[part],
                epsilon=radius,
                step_size=climb.step_size,
                steps=climb.steps,
                norm=norm,
                start=start[part],
                objective=climb.loss,
                check_tensors=False,
                watch=own,
            )
            if watch is not None:
                watch.put(part, own)

    micro_batch.run(len(images), attack_in_parts)
    return finite_pixels(attacked, images)
