"""What the weights minimise on adversarial examples: PGD-AT, TRADES, MART."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from safer_fast.attack import AttackLoss, cross_entropy
from safer_fast.config import ObjectiveConfig


@dataclass(frozen=True)
class Targets:
    """What a batch is to be classified as.

    labels: int64 [B], or class probabilities [B, K]. weights: what each image counts for in the
    loss, float32 [B] with sum 1 over a batch, of all ranks together; 0 for images that only fill it
    up, the same for all others.
    """

    labels: Tensor
    weights: Tensor

    @classmethod
    def alike(cls, labels: Tensor) -> Targets:
        """All images count alike."""
        num_images = len(labels)
        return cls(labels, torch.full((num_images,), 1 / num_images, device=labels.device))

    def split(self, size: int) -> list[Targets]:
        """Parts of at most `size` images, with the weights they have in the whole."""
        pairs = zip(torch.split(self.labels, size), torch.split(self.weights, size), strict=True)
        return [Targets(*pair) for pair in pairs]

    def num_images(self) -> Tensor:
        """Images that count, 0-d."""
        return (self.weights > 0).sum()

    def total(self, mean: Tensor) -> Tensor:
        """The sum over images of what `mean`, 0-d, is the weighted sum of."""
        weight = self.weights.amax()
        return torch.where(weight > 0, mean / weight, 0.0)

    def num_right(self, logits: Tensor) -> Tensor:
        """Images that count and whose class the first logits [B or more, K] put first, 0-d."""
        classes = self.labels if self.labels.ndim == 1 else self.labels.argmax(1)
        is_right = logits.detach()[: len(classes)].argmax(1) == classes
        return (is_right & (self.weights > 0)).sum()


@dataclass(frozen=True)
class Objective:
    """A training loss and the loss that its attack raises.

    pgd-at: cross-entropy of the adversarial logits (Madry et al., 2018).
    trades: cross-entropy of the clean logits + beta * KL(clean || adversarial); its attack raises
        that KL (Zhang et al., 2019).
    mart: boosted cross-entropy + beta * KL(clean || adversarial), weighted by how uncertain the
        clean prediction is (Wang et al., 2020); labels must be class numbers.
    """

    config: ObjectiveConfig

    @property
    def needs_clean(self) -> bool:
        """Whether the loss reads the clean logits too."""
        return self.config.name != "pgd-at"

    def loss(self, logits: Tensor, targets: Targets) -> Tensor:
        """Weighted loss, 0-d, of the logits [B, K] of a batch.

        With `needs_clean` the logits are [2B, K]: adversarial examples first, then clean images.
        """
        return (self._losses(logits, targets.labels) * targets.weights).sum()

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image, [B]."""
        smoothing = self.config.label_smoothing
        if self.config.name == "pgd-at":
            return _cross_entropies(logits, labels, smoothing)
        adversarial, clean = logits.chunk(2)
        if self.config.name == "trades":
            natural = _cross_entropies(clean, labels, smoothing)
            return natural + self.config.beta * divergences(adversarial, clean)
        return _mart(adversarial, clean, labels, self.config.beta)

    def attack_loss(self, clean_logits: Tensor | None) -> AttackLoss:
        """The loss that the attack raises; TRADES needs the logits [B, K] of the clean images."""
        if self.config.name != "trades":
            return cross_entropy
        assert clean_logits is not None
        clean = clean_logits.detach()
        return lambda logits, _: divergences(logits, clean).sum()

    @property
    def attack_needs_clean(self) -> bool:
        """Whether `attack_loss` reads the clean logits."""
        return self.config.name == "trades"


def divergences(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(logits)) of each image, [B]."""
    return functional.kl_div(
        logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True
    ).sum(1)


def _cross_entropies(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    return functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")


def _mart(adversarial: Tensor, clean: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Equations (10) and (11) of MART, with the paper's guard of 1e-4 within the logarithm."""
    probabilities = adversarial.softmax(1)
    top_two = probabilities.topk(2, dim=1).indices
    runner_up = torch.where(top_two[:, 0] == labels, top_two[:, 1], top_two[:, 0])
    margins = -torch.log(1.0001 - probabilities.gather(1, runner_up[:, None]).squeeze(1) + 1e-12)
    boosted = _cross_entropies(adversarial, labels) + margins
    uncertainty = 1.0000001 - clean.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return boosted + beta * divergences(adversarial, clean) * uncertainty
