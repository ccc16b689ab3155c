"""Scores of every layer by a criterion, and the few layers that score highest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import SupportsFloat, get_args

import torch
from torch import Tensor, nn

from safer_fast.attacks.arguments import as_classes, check_function, check_model, described
from safer_fast.attacks.pgd import AttackLoss, cross_entropy, frozen
from safer_fast.config.checks import check_number
from safer_fast.config.doors import door
from safer_fast.config.messages import meant, shortened
from safer_fast.config.ranges import FACTOR
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.ranks import Ranks
from safer_fast.selection import criteria
from safer_fast.selection.candidates import candidates, layers_of, match_layers
from safer_fast.selection.criteria import ALL, check_criterion
from safer_fast.selection.inputs import Attack, ScoredBy, ScoringInputs, Watch, WeightRadius
from safer_fast.selection.probe import Probe


@door()
def rank_layers(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    criterion: str = "sharpness",
    rho: float = 0.05,
    radius: WeightRadius = "absolute",
    attack: Attack | None = None,
    names: Sequence[str] | None = None,
    arenas: ParameterArenas | None = None,
    generator: torch.Generator | None = None,
    ranks: Ranks | None = None,
    watch: Watch = iter,
    loss: AttackLoss = cross_entropy,
) -> dict[str, float]:
    """A score for each layer; the layers that should be fine-tuned score highest.

    - `sharpness`: S_l = L(w_l + rho g_l / ||g_l||, rest) - L(w), L the mean cross-entropy on
      adversarial examples, g_l its gradient for the layer's weight and bias. This is our reading of
      SAFER (Gopal et al., 2025), from its abstract and summaries. `least-sharp`: -S_l.
    - `gradient-norm`: rho ||g_l||, the first-order estimate of S_l.
    - `criticality`: W(F_l) / W(F_l-1), W(F) the mean over images of ||F(x + d) - F(x)|| / dim
      (CLAT, Gopal et al., 2024), with d from `attack`; the first layer is compared with the image.
    - `random`: uniform in [0, 1).
    - others: see `register_criterion`.

    >>> scores = rank_layers(model, [(images, labels)], rho=0.05)
    >>> sorted(scores)[-1]
    'patch_embed.proj'

    Args:
        model: takes pixels in [0, 1]; its weights are perturbed meanwhile and restored exactly. A
            RobustModel is run from each layer's block upwards only.
        batches: (images float [B, C, H, W], labels int64 [B]) on the model's device.
        rho: radius of the perturbation; times ||w_l|| with `radius="relative"`.
        attack: makes the adversarial examples, which `criticality` needs; default: the images as
            they are.
        names: the layers to score; default: every linear layer and 2-d convolution.
        arenas: where the model's parameters lie, if they lie in arenas.
        generator: source of `random`, on the CPU.
        ranks: the processes whose batches make up the probe together; all get the same scores.
        watch: passes the layers through one by one, where each takes its time.
        loss: (outputs, labels) -> a sum over images, in place of the cross-entropy.

    Raises:
        ValueError: no batches, no floats in them, no layers, unknown names, an unknown criterion,
            one without scores (`all`) or one that needs an attack without it, a rho that is no
            number from 0 to 1,000, a loss that is no sum.
    """
    check_criterion(criterion, "criterion")
    if radius not in get_args(WeightRadius):
        got = shortened(repr(radius)) + meant(radius, get_args(WeightRadius))
        raise ValueError(f"radius: expected absolute or relative, got {got}")
    measure = ScoredBy(criterion, radius)
    return score_layers(
        model,
        batches,
        [measure],
        rho=rho,
        attack=attack,
        names=names,
        arenas=arenas,
        generator=generator,
        ranks=ranks,
        watch=watch,
        loss=loss,
    )[measure]


def score_layers(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    measures: Sequence[ScoredBy],
    *,
    rho: float = 0.05,
    attack: Attack | None = None,
    names: Sequence[str] | None = None,
    arenas: ParameterArenas | None = None,
    generator: torch.Generator | None = None,
    ranks: Ranks | None = None,
    watch: Watch = iter,
    loss: AttackLoss = cross_entropy,
) -> dict[ScoredBy, dict[str, float]]:
    """The scores that `rank_layers` returns for each measure, at the cost of the most costly.

    All of them share the adversarial examples, the gradient and the features below each block.
    """
    check_model(model)
    check_function("loss", loss)
    layers = layers_of(model)
    if not layers:
        got = f"{type(model).__name__} without any"
        raise ValueError(f"model: expected linear layers or 2-d convolutions, got {got}")
    names = list(layers) if names is None else list(names)
    if unknown := [name for name in names if name not in layers]:
        got = ", ".join(unknown) + meant(unknown[0], layers)
        raise ValueError(f"names: expected layers of the model, got {got}")
    if not names:
        raise ValueError("names: expected at least one layer, got none")
    check_number("rho", rho, FACTOR)
    asked = {measure.criterion for measure in measures}
    for name in sorted(asked):
        check_criterion(name)
    if ALL in asked:
        raise ValueError("criterion: expected one that scores layers, got 'all'")
    if attack is None and (lacking := [n for n in asked if criteria.CRITERIA[n].needs_attack]):
        raise ValueError(
            f"attack: expected a function that attacks images, which {lacking[0]} compares with "
            "clean ones, got none: give attack="
        )
    inputs = ScoringInputs(model, names, layers, rho, arenas, generator, ranks or Ranks(), watch)
    inputs.loss = loss
    if any(criteria.CRITERIA[name].needs_images for name in asked):
        inputs.probes = [
            (images, attack(model, images, labels) if attack and len(labels) else images, labels)
            for images, labels in map(_pair, batches)
        ]
        num_images = sum(len(labels) for _, _, labels in inputs.probes)
        inputs.total = int(inputs.ranks.sum_(torch.tensor(num_images)).item())
        if not inputs.total:
            raise ValueError("batches: expected at least one batch, got none")
    scores: dict[ScoredBy, dict[str, float]] = {}
    with frozen(model):
        for score in dict.fromkeys(row.score for row in criteria.CRITERIA.values()):
            own = [m for m in measures if criteria.CRITERIA[m.criterion].score is score]
            scores |= score(inputs, own) if own else {}
    return scores


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch; raise ValueError for one that is no pair of tensors."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = type(batch).__name__
        raise ValueError(f"batches: expected pairs of images and labels, got {got}")
    images, labels = batch
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise ValueError(f"batches: expected images that are floats, got {described(images)}")
    if not isinstance(labels, Tensor):
        raise ValueError(f"batches: expected labels that are tensors, got {described(labels)}")
    return images, as_classes(labels)


@door()
def select_layers(scores: Mapping[str, float], *, fraction: float) -> list[str]:
    """The names with the highest scores: `fraction` of them, rounded half up, at least one.

    >>> select_layers({"a": 0.1, "b": 0.4, "c": 0.2, "d": 0.3}, fraction=0.5)
    ['b', 'd']

    Equal scores are ordered by name. Raise ValueError for a fraction outside (0, 1], no scores, or
    a score that is NaN or no number.
    """
    if not isinstance(scores, Mapping):
        raise ValueError(f"scores: expected scores of layers by name, got {type(scores).__name__}")
    is_number = isinstance(fraction, SupportsFloat)
    if not is_number:
        raise ValueError(f"fraction: expected a number, got {shortened(repr(fraction))}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected above 0 and at most 1, got {fraction}")
    if not scores:
        raise ValueError("scores: expected at least one layer, got none")
    for name, score in scores.items():
        is_number = isinstance(score, SupportsFloat)
        if not is_number:
            got = f"{shortened(repr(score))} for {name}"
            raise ValueError(f"scores: expected numbers, got {got}")
    if lost := [name for name, score in scores.items() if isnan(score)]:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise ValueError(
            f"scores: expected numbers, got NaN for {shown}: weights or losses are not finite; "
            "train with a lower --optim.learning_rate or with --optim.clip_norm"
        )
    count = max(1, int(fraction * len(scores) + 0.5))
    return sorted(scores, key=lambda name: (-scores[name], name))[:count]


@dataclass(frozen=True)
class LayerChoice:
    """Layers to fine-tune next, and the scores that say so (none for an explicit list)."""

    criterion: str
    scores: dict[str, float]
    selected: list[str]


def choose_layers(
    model: RobustModel, arenas: ParameterArenas, probe: Probe, ranks: Ranks | None = None
) -> LayerChoice:
    """The layers that the configuration selects for these training images."""
    config, seed = probe.config.selection, probe.config.seed + probe.number
    if config.layers is not None:
        return LayerChoice("explicit", {}, match_layers(config.layers, model.layers))
    if config.criterion == ALL:
        return LayerChoice(ALL, {}, list(model.layers))
    scores = rank_layers(
        model,
        probe.batches(model.mean.device),
        criterion=config.criterion,
        rho=config.rho or probe.config.sam.rho or 0.05,
        radius=config.radius,
        attack=probe.attack,
        names=candidates(model, config.from_block, config.candidates),
        arenas=arenas,
        generator=torch.Generator().manual_seed(seed),
        ranks=ranks,
        watch=probe.watch,
        loss=probe.loss,
    )
    return LayerChoice(config.criterion, scores, select_layers(scores, fraction=config.fraction))
