"""Inputs of a criterion: a model, attacked training images, and the layers to score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from safer_fast.attacks.arguments import check_gradients, check_logits, check_sum, naming_dtypes
from safer_fast.attacks.pgd import AttackLoss, cross_entropy
from safer_fast.models.arenas import (
    ParameterArenas,
    TrainedWeights,
    module_selection,
    requiring_gradients,
)
from safer_fast.runtime.ranks import Ranks

Batches = Sequence[tuple[Tensor, Tensor]]
"""Adversarial images [B, C, H, W] and labels [B], on the model's device."""
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) -> adversarial images."""
Watch = Callable[[Iterable[str]], Iterable[str]]
"""Passes values through, and may do something in between: show progress, raise."""
WeightRadius = Literal["absolute", "relative"]


@dataclass(frozen=True)
class ScoredBy:
    """A criterion, and for sharpness and gradient norms the kind of its radius."""

    criterion: str
    radius: WeightRadius = "absolute"


@dataclass
class ScoringInputs:
    """Everything that criteria score from; gradients are computed when the first one needs them.

    names: the layers to score. layers: the parameters of all layers. probes: clean images,
    adversarial ones and labels, this rank's; total: the number of images on all ranks. loss: of
    outputs and labels, a sum over images.
    """

    model: nn.Module
    names: Sequence[str]
    layers: Mapping[str, Sequence[nn.Parameter]]
    rho: float
    arenas: ParameterArenas | None = None
    generator: torch.Generator | None = None
    ranks: Ranks = field(default_factory=Ranks)
    watch: Watch = iter
    probes: Sequence[tuple[Tensor, Tensor, Tensor]] = ()
    total: int = 0
    loss: AttackLoss = cross_entropy

    @property
    def adversarial(self) -> Batches:
        """Adversarial images and labels."""
        return [(attacked, labels) for _, attacked, labels in self.probes]

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Clean and adversarial images."""
        return [(clean, attacked) for clean, attacked, _ in self.probes]

    @cached_property
    def weights(self) -> TrainedWeights:
        """Weights of the layers, with the gradient of the mean loss over all ranks' images."""
        chosen = self._weights_of_layers()
        store_mean_gradients(self.model, chosen, self.adversarial, self.total, self.loss)
        self.ranks.sum_(chosen.flat)
        return chosen

    def _weights_of_layers(self) -> TrainedWeights:
        if self.arenas is not None:
            return self.arenas.select(self.names)
        return module_selection({name: self.layers[name] for name in self.names})


def store_mean_gradients(
    model: nn.Module,
    chosen: TrainedWeights,
    batches: Batches,
    total: float,
    loss: AttackLoss = cross_entropy,
) -> None:
    """Store the gradient of the loss summed over all batches, divided by `total`, in the ranges."""
    check_gradients("rank_layers")
    with requiring_gradients(chosen.parameters):
        for images, labels in batches:
            if not len(labels):
                continue
            with naming_dtypes(model, images):
                outputs = model(images)
                if loss is cross_entropy:
                    check_logits(outputs, len(labels))
                value = loss(outputs, labels)
            check_sum("loss", value)
            gradients = chosen.gradients_of(value / total)
            for view, gradient in zip(chosen.gradient_views, gradients, strict=True):
                view.add_(gradient)
