"""Accuracy of a model under several attacks, each on the images that the ones before left right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from safer_fast.attacks.masking import has_gradients, starts_at_random, suspicions
from safer_fast.attacks.named import ThreatModel, attack_by_name

if TYPE_CHECKING:
    from safer_fast.data import Batch
    from safer_fast.models.robust_model import RobustModel
    from safer_fast.runtime.micro_batch import MicroBatch
    from safer_fast.runtime.ranks import Ranks


@dataclass(frozen=True)
class Accuracy:
    """Share of `num_images` images that are classified rightly under an attack.

    loss: mean cross-entropy of the attacked images, None where it is not finite. num_not_finite:
    images whose logits are not finite then; they are not right. num_zero_gradients: images whose
    gradient was zero or not finite at an iteration, None without gradients. start_accuracy: what
    its random start alone leaves, None without. gradient_masking: signs that the attack failed for
    want of gradients (attacks/masking.py); with any the accuracy is an `upper_bound` of the robust
    one.
    """

    attack: str
    epsilon: float
    accuracy: float
    num_images: int
    loss: float | None = None
    num_not_finite: int = 0
    num_zero_gradients: int | None = None
    start_accuracy: float | None = None
    gradient_masking: Sequence[str] = ()
    upper_bound: bool = False


def evaluate(
    model: RobustModel,
    batches: Iterator[Batch],
    attacks: Sequence[str],
    threat: ThreatModel,
    *,
    seed: int = 0,
    micro_batch: MicroBatch | None = None,
    ranks: Ranks | None = None,
) -> list[Accuracy]:
    """The accuracy under each attack over the batches, over those of all ranks.

    What training looks at: an image is right if the prediction on the attacked image is. (The
    command counts it only if it is right without an attack too, as RobustBench does.) clean: no
    attack; fgsm, pgd-K, cw, cw-K: see `attack_spec`, one restart. Every attack runs in the model's
    own precision on as many images at a time as `micro_batch` says; default: a batch, or less where
    memory ends. Random starts depend on the seed, the attack and an image's position, not on how
    images are divided.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from safer_fast.attacks.correctness import has_finite, is_right
    from safer_fast.attacks.gradient_watch import Watch
    from safer_fast.attacks.replayed import ReplayedAttack
    from safer_fast.data import as_pixels
    from safer_fast.runtime.micro_batch import MicroBatch
    from safer_fast.runtime.ranks import Ranks
    from safer_fast.runtime.seeds import derive_seed

    micro_batch, ranks = micro_batch or MicroBatch("--batch-size"), ranks or Ranks()
    attack, device = (
        ReplayedAttack(model, norm=threat.norm, micro_batch=micro_batch),
        model.mean.device,
    )
    # of each attack: images that are right, losses, images with logits that are not finite, without
    # a gradient, right at the start; float64 counts exactly
    sums = torch.zeros(5, len(attacks) + 1, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        # padding goes along, so that all batches have one shape
        images, labels, counted = as_pixels(batch.images), batch.labels, slice(batch.num_images)
        for index, name in enumerate(attacks):
            place = partial(derive_seed, seed, f"evaluation {name}"), batch.position
            watch = Watch(len(images), device)
            chosen = images, labels, threat.epsilon, place
            attacked = attack_by_name(name, attack, *chosen, watch)
            with torch.no_grad():
                logits = model(attacked)
                losses = cross_entropy(logits, labels, reduction="none")
                sums[0, index] += is_right(logits, labels)[counted].sum()
                sums[1, index] += losses[counted].double().sum()
                flags = ~has_finite(logits), watch.blind, watch.starts_right
                sums[2:, index] += torch.stack(flags)[:, counted].sum(1)
        sums[:, -1] += batch.num_images
    *columns, (num_images, *_) = ranks.sum_(sums).T.tolist()
    if not num_images:
        raise ValueError("data.path: expected an image that can be read to evaluate on, got none")
    figures = zip(attacks, columns, strict=True)
    return _with_signs_of_masking(
        [_accuracy(name, threat, found, num_images) for name, found in figures]
    )


def _accuracy(name: str, threat: ThreatModel, sums: Sequence[float], num_images: float) -> Accuracy:
    num_right, loss, num_broken, num_blind, num_starts = sums
    return Accuracy(
        name,
        0.0 if name == "clean" else threat.epsilon,
        num_right / num_images,
        int(num_images),
        loss / num_images if math.isfinite(loss) else None,
        int(num_broken),
        int(num_blind) if has_gradients(name) else None,
        num_starts / num_images if starts_at_random(name) else None,
    )


def _with_signs_of_masking(accuracies: Sequence[Accuracy]) -> list[Accuracy]:
    """With the signs of gradient masking in them."""
    found = suspicions([vars(accuracy) for accuracy in accuracies])
    return [
        replace(accuracy, gradient_masking=tuple(reasons), upper_bound=bool(reasons))
        for accuracy, reasons in zip(accuracies, found, strict=True)
    ]
