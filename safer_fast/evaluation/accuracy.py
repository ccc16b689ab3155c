"""Accuracy of a model under several attacks, over the batches of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from safer_fast.attacks.masking import has_gradients, starts_at_random, suspicions
from safer_fast.attacks.named import ThreatModel

if TYPE_CHECKING:
    from torch import Tensor

    from safer_fast.attacks.replayed import ReplayedAttack
    from safer_fast.data import Batch
    from safer_fast.models.robust_model import RobustModel
    from safer_fast.runtime.ranks import Ranks


@dataclass(frozen=True)
class Accuracy:
    """Share of `num_images` images classified correctly without an attack and under it.

    NaN for a tower without text embeddings; `embedding_distance` is then the mean squared distance
    of its embeddings, each image where its last attack left it, to those of the clean images by the
    original network, and None for others.

    loss: mean cross-entropy, each image where its last attack left it; None where that is not
    finite. num_not_finite: images whose logits are not finite then; they are not right.
    num_zero_gradients: images whose gradient was zero or not finite at an iteration, None without
    gradients. start_accuracy: what its random start alone leaves, None without. gradient_masking:
    signs that the attack failed for want of gradients (attacks/masking.py); with any the accuracy
    is an `upper_bound` of the robust one.
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
    embedding_distance: float | None = None

    @property
    def score(self) -> float:
        """The accuracy, or a number in (0, 1] that is larger for a smaller embedding distance."""
        distance = self.embedding_distance
        return self.accuracy if distance is None else 1 / (1 + distance)


def evaluate(
    model: RobustModel,
    batches: Iterable[Batch],
    attacks: Sequence[str],
    threat: ThreatModel,
    *,
    seed: int = 0,
    attack: ReplayedAttack | None = None,
    ranks: Ranks | None = None,
    attacks_wrong: bool = False,
    is_compiled: bool = False,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> list[Accuracy]:
    """The accuracy under each attack over the batches of all ranks; raises ValueError for no image.

    An image is right under an attack if it is classified correctly without it and under it, as in
    RobustBench and in the evaluate command, which counts by the same code (batch.py). clean: no
    attack; fgsm, pgd-K, cw, cw-K: see `attack_spec`, one restart. `attack` says on how many images
    at a time they run, and whether their iterations are replayed; default: a batch at a time, or
    less where memory ends, not replayed. Random starts depend on the seed, the attack and an
    image's position, not on how images are divided. attacks_wrong, is_compiled, teacher: see
    `BatchEvaluator`.
    """
    import torch

    from safer_fast.attacks.replayed import ReplayedAttack
    from safer_fast.data import as_pixels
    from safer_fast.evaluation.batch import BatchEvaluator, multiple_of
    from safer_fast.runtime.micro_batch import MicroBatch
    from safer_fast.runtime.ranks import Ranks

    ranks = ranks or Ranks()
    if attack is None:
        assert threat.norm != "l1", "only attacks of the library are made for l1"
        parts = MicroBatch("--batch-size")
        attack = ReplayedAttack(model, norm=threat.norm, micro_batch=parts)
    evaluator = BatchEvaluator(
        model,
        attack,
        epsilon=threat.epsilon,
        seed=seed,
        attacks_wrong=attacks_wrong,
        is_compiled=is_compiled,
        teacher=teacher,
    )
    device, names = model.mean.device, list(dict.fromkeys(["clean", *attacks]))
    # of each attack: images that are right, losses, images with logits that are not finite, without
    # a gradient, right at the start, all images; float64 counts exactly
    sums = torch.zeros(len(names), 6, dtype=torch.float64, device=device)
    for batch in batches:
        if not batch.num_images:
            continue
        attack.multiple = 1
        if is_compiled:  # all batches have one shape, padding included
            attack.multiple = len(batch.images)
        elif attack.replays.can_record:
            attack.multiple = multiple_of(len(batch.images))
        batch, count = batch.to(device, non_blocking=True), batch.num_images
        images, labels = as_pixels(batch.images[:count]), batch.labels[:count]
        clean = None
        for name, counts in zip(names, sums, strict=True):
            found = evaluator.measure(name, images, labels, batch.position, clean)
            clean = clean or found
            columns = (found.right, found.losses, ~found.finite, found.blind, found.starts_right)
            counts[:5] += torch.stack([values.double().sum() for values in columns])
            counts[5] += count
    figures = dict(zip(names, ranks.sum_(sums).tolist(), strict=True))
    if not figures["clean"][5]:
        raise ValueError("data.path: expected an image that can be read to evaluate on, got none")
    accuracies = [_accuracy(name, threat, figures[name]) for name in attacks]
    if teacher is None:
        return _with_signs_of_masking(accuracies)
    return [as_distance(accuracy) for accuracy in accuracies]


def as_distance(accuracy: Accuracy) -> Accuracy:
    """The figures of a tower whose losses are embedding distances, and that classifies nothing."""
    distance, none = accuracy.loss, math.nan
    return replace(accuracy, accuracy=none, start_accuracy=None, embedding_distance=distance)


def _accuracy(name: str, threat: ThreatModel, sums: Sequence[float]) -> Accuracy:
    num_right, loss, num_broken, num_blind, num_starts, num_images = sums
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
    """The accuracies with the signs of gradient masking in them."""
    found = suspicions([vars(accuracy) for accuracy in accuracies])
    return [
        replace(accuracy, gradient_masking=tuple(reasons), upper_bound=bool(reasons))
        for accuracy, reasons in zip(accuracies, found, strict=True)
    ]
