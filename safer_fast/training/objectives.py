"""Training objectives on adversarial examples: PGD-AT, TRADES, MART, FARE, TeCoA, your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from safer_fast.attacks.correctness import is_right
from safer_fast.attacks.named import TRAINING_LOSSES, squared_distances
from safer_fast.attacks.replayed import CROSS_ENTROPY, PixelLoss
from safer_fast.config.messages import meant, shortened
from safer_fast.config.schema import Config, ObjectiveConfig


@dataclass(frozen=True)
class Targets:
    """Labels of a batch, and the weight of each image in the loss.

    labels: int64 [B], or class probabilities [B, K]. weights: float32 [B], with sum 1 over the
    batch of all ranks; 0 for padding, the same for all other images.
    """

    labels: Tensor
    weights: Tensor

    @classmethod
    def alike(cls, labels: Tensor) -> Targets:
        """Targets of images that all count alike."""
        num_images = len(labels)
        return cls(labels, torch.full((num_images,), 1 / num_images, device=labels.device))

    def split(self, size: int) -> list[Targets]:
        """Split into parts of at most `size` images, with the weights of the whole batch."""
        pairs = zip(torch.split(self.labels, size), torch.split(self.weights, size), strict=True)
        return [Targets(*pair) for pair in pairs]

    @property
    def counted(self) -> Tensor:
        """True for images, False for padding; bool [B]."""
        return self.weights > 0

    def num_images(self) -> Tensor:
        """Number of images that are no padding, 0-d."""
        return self.counted.sum()

    def total(self, mean: Tensor) -> Tensor:
        """Turn a weighted mean over images, 0-d, into the sum over images."""
        weight = self.weights.amax()
        return torch.where(weight > 0, mean / weight, 0.0)

    def num_right(self, logits: Tensor) -> Tensor:
        """Number of images, padding left out, that logits [B or more, K] classify right, 0-d."""
        first = logits[: len(self.labels)]
        return (is_right(first, self.labels) & self.counted).sum()


Losses = Callable[[Tensor, Tensor, Tensor, ObjectiveConfig], Tensor]
"""(adversarial logits [B, K], clean logits [B, K], labels, settings) -> the loss of each image [B].

The clean logits are the adversarial ones where an objective does not need them."""


@dataclass(frozen=True)
class Formula:
    """Definition of an objective.

    losses: see `Losses`. needs_clean: true if they read clean logits. attacks: (logits, clean
    logits) -> the loss of each image [B] that the attack raises, or their 0-d sum, with which
    `attack.name apgd` is refused; None: the cross-entropy.

    reads: in place of the logits of a classifier, what a tower gives (docs/towers.md): `zero-shot`
    logits over `objective.text_embeddings`, or its `embeddings` [B, D]. In the latter case labels
    are the embeddings [B, D] of the clean images by the frozen original network, and `attacks`,
    which is needed, takes embeddings and these.

    >>> import torch.nn.functional as F
    >>> def focal(logits, clean, labels, config):
    ...     losses = F.cross_entropy(logits, labels, reduction="none")
    ...     return (1 - torch.exp(-losses)) ** 2 * losses
    >>> register_objective("focal", Formula(focal))
    """

    losses: Losses
    needs_clean: bool = False
    attacks: Callable[[Tensor, Tensor], Tensor] | None = None
    reads: Literal["logits", "zero-shot", "embeddings"] = "logits"

    def __post_init__(self) -> None:
        if self.reads == "embeddings" and (self.attacks is None or self.needs_clean):
            raise ValueError("attacks: expected a loss of embeddings, and no needs_clean beside it")


def register_objective(name: str, formula: Formula) -> None:
    """Make `--objective.name NAME` stand for this formula, in this process.

    >>> import torch.nn.functional as F
    >>> def plain(logits, clean, labels, config):
    ...     return F.cross_entropy(logits, labels, reduction="none")
    >>> register_objective("plain", Formula(plain))

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
    fare: squared distance of the embedding to that of the clean image by the frozen original
        network, which the attack raises too; no labels (Schlarmann et al., 2024).
    tecoa: cross-entropy of cosine similarities with text embeddings (Mao et al., 2023).
    Others: see `register_objective`.

    raises: the attack raises this loss of `TRAINING_LOSSES`; objective: the one above.
    """

    config: ObjectiveConfig
    raises: str = "objective"

    def __post_init__(self) -> None:
        if (name := self.config.name) not in FORMULAS:
            known, hint = ", ".join(FORMULAS), meant(name, FORMULAS)
            raise ValueError(f"--objective.name: expected one of {known}, got {name!r}{hint}")
        reads, file = self._formula.reads, self.config.text_embeddings
        if reads == "zero-shot" and file is None:
            raise ValueError(
                f"--objective.text_embeddings: expected a file with --objective.name "
                f"{self.config.name}, got none"
            )
        if reads == "logits" and file is not None:
            raise ValueError(
                f"--objective.text_embeddings: expected none with --objective.name "
                f"{self.config.name}, which trains a classifier, got {shortened(file)}"
            )
        if self.raises != "objective" and self.needs_teacher:
            raise ValueError(
                "--attack.loss: expected objective with --objective.name "
                f"{self.config.name}, which has no logits, got {self.raises}"
            )

    @property
    def is_of_tower(self) -> bool:
        """True if the network gives embeddings in place of logits."""
        return self._formula.reads != "logits"

    @property
    def needs_teacher(self) -> bool:
        """True if labels are embeddings of clean images by the frozen original network."""
        return self._formula.reads == "embeddings"

    @property
    def needs_clean(self) -> bool:
        """True if the loss also reads clean logits."""
        return self._formula.needs_clean

    def loss(self, logits: Tensor, targets: Targets) -> Tensor:
        """Compute the weighted loss, 0-d, of the logits [B, K] of a batch.

        With `needs_clean` the logits are [2B, K]: adversarial examples first, then clean images.
        """
        adversarial, clean = logits.chunk(2) if self.needs_clean else (logits, logits)
        losses = self._formula.losses(adversarial, clean, targets.labels, self.config)
        return (losses * targets.weights).sum()

    @property
    def attack_loss(self) -> PixelLoss:
        """The loss that the attack raises; some objectives' read logits [B, K] of clean images."""
        attacks, is_classifier = self._formula.attacks, not self.needs_teacher
        if self.raises != "objective":
            return TRAINING_LOSSES[self.raises]
        if attacks is None:
            return CROSS_ENTROPY
        return PixelLoss.of(attacks, against_clean=is_classifier, counts=is_classifier)

    def num_right(self, logits: Tensor, targets: Targets) -> Tensor:
        """Number of images that are classified right, 0-d; 0 where embeddings are compared."""
        return targets.num_right(logits) * (not self.needs_teacher)

    @property
    def _formula(self) -> Formula:
        return FORMULAS[self.config.name]


def check_objective(config: Config) -> None:
    """Raise ValueError for an objective that is unknown or does not fit the other settings."""
    objective, model = Objective(config.objective, config.attack.loss), config.model
    if objective.needs_teacher and model.checkpoint is None and not model.pretrained:
        raise ValueError(
            f"--model.checkpoint: expected weights with --objective.name {config.objective.name}, "
            "whose embeddings are kept, got none and no --model.pretrained"
        )


def needs_labels(config: ObjectiveConfig) -> bool:
    """Return true unless the objective reads embeddings alone and nothing classifies them."""
    return not Objective(config).needs_teacher or config.text_embeddings is not None


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


def _fare(adversarial: Tensor, _: Tensor, originals: Tensor, __: ObjectiveConfig) -> Tensor:
    return squared_distances(adversarial, originals)


FORMULAS = {
    "pgd-at": Formula(_pgd_at),
    "trades": Formula(_trades, needs_clean=True, attacks=divergences),
    "mart": Formula(_mart, needs_clean=True),
    "fare": Formula(_fare, attacks=squared_distances, reads="embeddings"),
    "tecoa": Formula(_pgd_at, reads="zero-shot"),
}
"""All objectives by name; `register_objective` adds a row."""
