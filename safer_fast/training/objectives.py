"""What the weights minimise on adversarial examples: PGD-AT, TRADES, MART."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from safer_fast.attacks.correctness import is_right
from safer_fast.attacks.replayed import CROSS_ENTROPY, PixelLoss
from safer_fast.config.schema import ObjectiveConfig


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

    @property
    def counted(self) -> Tensor:
        """The images that count, those that do more than fill the batch up; bool [B]."""
        return self.weights > 0

    def num_images(self) -> Tensor:
        """Number of images that count, 0-d."""
        return self.counted.sum()

    def total(self, mean: Tensor) -> Tensor:
        """The sum over images of what `mean`, 0-d, is the weighted sum of."""
        weight = self.weights.amax()
        return torch.where(weight > 0, mean / weight, 0.0)

    def num_right(self, logits: Tensor) -> Tensor:
        """Images that count and whose class the first logits [B or more, K] put first, 0-d."""
        first = logits[: len(self.labels)]
        return (is_right(first, self.labels) & self.counted).sum()


Losses = Callable[[Tensor, Tensor, Tensor, ObjectiveConfig], Tensor]
"""(adversarial logits [B, K], clean logits [B, K], labels, settings) -> the loss of each image [B].

The clean logits are the adversarial ones where an objective does not need them."""


@dataclass(frozen=True)
class Formula:
    """What an objective is: its losses, whether they read clean logits, what its attack raises.

    attacks: (logits, clean logits) -> the 0-d loss that the attack raises, a sum over images; the
    cross-entropy where it is None.
    """

    losses: Losses
    needs_clean: bool = False
    attacks: Callable[[Tensor, Tensor], Tensor] | None = None


def register_objective(name: str, formula: Formula) -> None:
    """`--objective.name NAME` stands for this formula from now on, in this process.

    Raises ValueError for a name that is taken.
    """
    if name in FORMULAS:
        raise ValueError(f"name: expected a new one, got {name!r}, which is an objective already")
    FORMULAS[name] = formula


@dataclass(frozen=True)
class Objective:
    """A training loss and the loss that its attack raises.

    pgd-at: cross-entropy of the adversarial logits (Madry et al., 2018).
    trades: cross-entropy of the clean logits + beta * KL(clean || adversarial); its attack raises
        that KL (Zhang et al., 2019).
    mart: boosted cross-entropy + beta * KL(clean || adversarial), weighted by how uncertain the
        clean prediction is (Wang et al., 2020); labels must be class numbers.
    Others: see `register_objective`.
    """

    config: ObjectiveConfig

    def __post_init__(self) -> None:
        if self.config.name not in FORMULAS:
            known = ", ".join(FORMULAS)
            raise ValueError(f"--objective.name: expected one of {known}, got {self.config.name!r}")

    @property
    def needs_clean(self) -> bool:
        """Whether the loss reads the clean logits too."""
        return self._formula.needs_clean

    def loss(self, logits: Tensor, targets: Targets) -> Tensor:
        """Weighted loss, 0-d, of the logits [B, K] of a batch.

        With `needs_clean` the logits are [2B, K]: adversarial examples first, then clean images.
        """
        adversarial, clean = logits.chunk(2) if self.needs_clean else (logits, logits)
        losses = self._formula.losses(adversarial, clean, targets.labels, self.config)
        return (losses * targets.weights).sum()

    @property
    def attack_loss(self) -> PixelLoss:
        """The loss that the attack raises; some read the logits [B, K] of the clean images."""
        attacks = self._formula.attacks
        return CROSS_ENTROPY if attacks is None else PixelLoss(attacks, against_clean=True)

    @property
    def _formula(self) -> Formula:
        return FORMULAS[self.config.name]


def divergences(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(logits)) of each image, [B]."""
    return functional.kl_div(
        logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True
    ).sum(1)


def _cross_entropies(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    return functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")


def _pgd_at(adversarial: Tensor, _: Tensor, labels: Tensor, config: ObjectiveConfig) -> Tensor:
    return _cross_entropies(adversarial, labels, config.label_smoothing)


def _trades(adversarial: Tensor, clean: Tensor, labels: Tensor, config: ObjectiveConfig) -> Tensor:
    natural = _cross_entropies(clean, labels, config.label_smoothing)
    return natural + config.beta * divergences(adversarial, clean)


def _mart(adversarial: Tensor, clean: Tensor, labels: Tensor, config: ObjectiveConfig) -> Tensor:
    """Equations (10) and (11) of MART, with the paper's guard of 1e-4 within the logarithm."""
    probabilities = adversarial.softmax(1)
    top_two = probabilities.topk(2, dim=1).indices
    runner_up = torch.where(top_two[:, 0] == labels, top_two[:, 1], top_two[:, 0])
    margins = -torch.log(1.0001 - probabilities.gather(1, runner_up[:, None]).squeeze(1) + 1e-12)
    boosted = _cross_entropies(adversarial, labels) + margins
    uncertainty = 1.0000001 - clean.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return boosted + config.beta * divergences(adversarial, clean) * uncertainty


FORMULAS = {
    "pgd-at": Formula(_pgd_at),
    "trades": Formula(
        _trades, needs_clean=True, attacks=lambda logits, clean: divergences(logits, clean).sum()
    ),
    "mart": Formula(_mart, needs_clean=True),
}
"""All objectives there are, by name."""
