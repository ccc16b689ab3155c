"""Criteria: the table of all scores that layers can be selected by, built-in and registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import get_args

import torch
from torch import nn

from safer_fast.config.messages import meant, shortened
from safer_fast.config.settings.attack import AttackConfig
from safer_fast.selection.criticality import criticality_scores
from safer_fast.selection.inputs import Batches, ScoredBy, ScoringInputs, WeightRadius
from safer_fast.selection.sharpness import gradient_norm_scores, sharpness_scores

Scores = dict[str, float]
"""Scores of layers by name."""
Score = Callable[[nn.Module, Batches, Sequence[str]], Mapping[str, float]]
"""(model, batches, names of layers) -> a score for each name; the model is left unchanged."""

SHARPNESS = {f"sharpness-{r}": ScoredBy("sharpness", r) for r in get_args(WeightRadius)}
"""Sharpness with each kind of radius, by the name that `safer_fast.select` knows."""
ALL = "all"
"""In place of a criterion: every layer is trained, none is scored."""


@dataclass(frozen=True)
class Criterion:
    """A row of the table.

    score: the scores of layers for each measure, which are several where radii are compared; the
    same function in two rows is called once. needs_images: False where the model is not even run.
    needs_attack: where scores mean nothing without one. is_compared: in `safer_fast.select`, beside
    the criterion that is asked for.
    """

    score: Callable[[ScoringInputs, Sequence[ScoredBy]], dict[ScoredBy, Scores]]
    needs_images: bool = True
    needs_attack: bool = False
    is_compared: bool = True


def register_criterion(name: str, score: Score) -> None:
    """Let `--selection.criterion NAME` score layers by this function, in this process.

    >>> def size(model, batches, names):
    ...     layers = dict(model.named_modules())
    ...     return {name: float(layers[name].weight.norm()) for name in names}
    >>> register_criterion("size", size)

    score: (model, batches of images and labels, names of layers) -> a score for each. The model is
    in eval mode and no parameter requires gradients. Under torchrun every rank scores its own
    batches, and the mean, weighted by images, counts. Raise ValueError for a name that is taken.
    """
    if name in [*known_criteria(), *SHARPNESS]:
        raise ValueError(f"name: expected a new one, got {name!r}, which is a criterion already")
    CRITERIA[name] = Criterion(partial(_registered_scores, name, score))


def known_criteria() -> list[str]:
    """The names of all criteria, and `all`."""
    return [*CRITERIA, ALL]


def compared_criteria() -> list[str]:
    """The names that `safer_fast.select` can compare; sharpness has one for each kind of radius."""
    others = [name for name, row in CRITERIA.items() if row.is_compared and name != "sharpness"]
    return [*SHARPNESS, *others]


def check_criterion(
    name: str, flag: str = "--selection.criterion", known: Sequence[str] | None = None
) -> None:
    """Raise ValueError naming `flag` unless `name` is among `known`, by default all criteria."""
    known = known_criteria() if known is None else known
    if name not in known:
        got = shortened(repr(name)) + meant(name, known)
        raise ValueError(f"{flag}: expected one of {', '.join(known)}, got {got}")


def check_attacked(name: str, attack: AttackConfig) -> None:
    """Raise ValueError if a criterion means nothing without an attack, and there is none."""
    if name in CRITERIA and CRITERIA[name].needs_attack and attack.is_none:
        raise ValueError(
            "--selection.criterion: expected one that means something without an attack, "
            f"got {name} in clean training"
        )


def _random_scores(inputs: ScoringInputs, measures: Sequence[ScoredBy]) -> dict[ScoredBy, Scores]:
    """Numbers that the generator draws uniformly in [0, 1), the same for all measures."""
    draws = torch.rand(len(inputs.names), generator=inputs.generator, dtype=torch.float64)
    scores = dict(zip(inputs.names, draws.tolist(), strict=True))
    return dict.fromkeys(measures, scores)


def _registered_scores(
    name: str, score: Score, inputs: ScoringInputs, measures: Sequence[ScoredBy]
) -> dict[ScoredBy, Scores]:
    """The scores of a registered function over the batches of all ranks.

    Raise ValueError where it gives no number for a layer.
    """
    names = inputs.names
    own = [(images, labels) for images, labels in inputs.adversarial if len(labels)]
    num_images = sum(len(labels) for _, labels in own)
    found = score(inputs.model, own, names) if own else dict.fromkeys(names, 0.0)
    for layer in names:
        if layer not in found or isnan(float(found[layer])):
            raise ValueError(
                f"--selection.criterion: expected {name} to give a number for {layer}, got "
                f"{found.get(layer)}"
            )
    scores = torch.tensor([float(found[layer]) for layer in names], dtype=torch.float64)
    weighted = torch.cat([scores * num_images, torch.tensor([num_images])])
    *sums, total = inputs.ranks.sum_(weighted).tolist()
    means = {layer: value / total for layer, value in zip(names, sums, strict=True)}
    return dict.fromkeys(measures, means)


CRITERIA: dict[str, Criterion] = {
    "sharpness": Criterion(sharpness_scores),
    "gradient-norm": Criterion(gradient_norm_scores),
    "criticality": Criterion(criticality_scores, needs_attack=True),
    "random": Criterion(_random_scores, needs_images=False, is_compared=False),
    "least-sharp": Criterion(sharpness_scores, is_compared=False),
}
"""Criteria by the name that `--selection.criterion` takes; `register_criterion` adds to it."""
