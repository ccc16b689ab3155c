"""Criteria from outside: what else layers can be scored by, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from safer_fast.config.messages import shortened
from safer_fast.config.schema import Criterion
from safer_fast.runtime.ranks import Ranks

Batches = Sequence[tuple[Tensor, Tensor]]
"""Adversarial images [B, C, H, W] and labels [B], on the model's device."""
Score = Callable[[nn.Module, Batches, Sequence[str]], Mapping[str, float]]
"""(model, batches, names of layers) -> a score for each name; the model is given back unchanged."""

REGISTERED: dict[str, Score] = {}


def register_criterion(name: str, score: Score) -> None:
    """`--selection.criterion NAME` scores layers by this function from now on, in this process.

    The model is in eval mode and no parameter requires gradients. Under torchrun every rank scores
    its own batches, and the mean, weighted by images, counts. Raises ValueError for a name that is
    taken.
    """
    if name in known_criteria():
        raise ValueError(f"name: expected a new one, got {name!r}, which is a criterion already")
    REGISTERED[name] = score


def known_criteria() -> list[str]:
    """The names of all criteria there are."""
    return [*get_args(Criterion), *REGISTERED]


def check_criterion(
    name: str, flag: str = "--selection.criterion", known: Sequence[str] | None = None
) -> None:
    """Raises ValueError naming `flag` unless `name` is among `known`, by default all criteria."""
    known = known_criteria() if known is None else known
    if name not in known:
        raise ValueError(f"{flag}: expected one of {', '.join(known)}, got {shortened(repr(name))}")


def registered_scores(
    name: str, model: nn.Module, batches: Batches, names: Sequence[str], ranks: Ranks
) -> dict[str, float]:
    """The scores of a registered criterion over the batches of all ranks.

    Raises ValueError where it gives no number for a layer.
    """
    own = [(images, labels) for images, labels in batches if len(labels)]
    num_images = sum(len(labels) for _, labels in own)
    found = REGISTERED[name](model, own, names) if own else dict.fromkeys(names, 0.0)
    for layer in names:
        if layer not in found or isnan(float(found[layer])):
            raise ValueError(
                f"--selection.criterion: expected {name} to give a number for {layer}, got "
                f"{found.get(layer)}"
            )
    scores = torch.tensor([float(found[layer]) for layer in names], dtype=torch.float64)
    *sums, total = ranks.sum_(torch.cat([scores * num_images, torch.tensor([num_images])])).tolist()
    return {layer: value / total for layer, value in zip(names, sums, strict=True)}


Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) -> adversarial images."""
Watch = Callable[[Iterable[str]], Iterable[str]]
"""Gives what it is given, and may do something in between: show progress, raise."""
WeightRadius = Literal["absolute", "relative"]


@dataclass(frozen=True)
class ScoredBy:
    """What layers are scored by: see `rank_layers`."""

    criterion: str
    radius: WeightRadius = "absolute"
