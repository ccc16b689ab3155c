"""What the weights minimise on adversarial examples: PGD-AT, TRADES, MART."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from safer_fast.attack import AttackLoss, cross_entropy
from safer_fast.config import ObjectiveConfig


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

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss, 0-d, of the logits [B, K] of a batch.

        With `needs_clean` the logits are [2B, K]: adversarial examples first, then clean images.
        """
        smoothing = self.config.label_smoothing
        if self.config.name == "pgd-at":
            return functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        adversarial, clean = logits.chunk(2)
        if self.config.name == "trades":
            natural = functional.cross_entropy(clean, labels, label_smoothing=smoothing)
            return natural + self.config.beta * divergence(adversarial, clean) / len(labels)
        return _mart(adversarial, clean, labels, self.config.beta)

    def attack_loss(self, clean_logits: Tensor | None) -> AttackLoss:
        """The loss that the attack raises; TRADES needs the logits [B, K] of the clean images."""
        if self.config.name != "trades":
            return cross_entropy
        assert clean_logits is not None
        clean = clean_logits.detach()
        return lambda logits, _: divergence(logits, clean)

    @property
    def attack_needs_clean(self) -> bool:
        """Whether `attack_loss` reads the clean logits."""
        return self.config.name == "trades"


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(logits)), summed over images."""
    return functional.kl_div(
        logits.log_softmax(1), clean.log_softmax(1), reduction="sum", log_target=True
    )


def _mart(adversarial: Tensor, clean: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Equations (10) and (11) of MART, with the paper's guard of 1e-4 within the logarithm."""
    probabilities = adversarial.softmax(1)
    top_two = probabilities.topk(2, dim=1).indices
    runner_up = torch.where(top_two[:, 0] == labels, top_two[:, 1], top_two[:, 0])
    margin = -torch.log(1.0001 - probabilities.gather(1, runner_up[:, None]).squeeze(1) + 1e-12)
    boosted = functional.cross_entropy(adversarial, labels) + margin.mean()
    uncertainty = 1.0000001 - clean.softmax(1).gather(1, labels[:, None]).squeeze(1)
    per_image = functional.kl_div(
        adversarial.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    return boosted + beta * (per_image * uncertainty).mean()
