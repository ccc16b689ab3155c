"""Which layers to fine-tune: scores for every layer, and the few that score highest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isnan
from typing import Literal

import torch
from torch import Tensor, nn

from safer_fast.attack import cross_entropy, frozen
from safer_fast.config import SelectionConfig
from safer_fast.criteria import REGISTERED, check_criterion, registered_scores
from safer_fast.criticality import criticality
from safer_fast.cut import STEM
from safer_fast.distributed import Ranks
from safer_fast.layer_runs import cached_run
from safer_fast.network import RobustModel, find_layers
from safer_fast.parameters import ParameterArenas, Range, Selection, module_selection
from safer_fast.ranges import FACTOR
from safer_fast.sam import ascend_, gradient_squares, restore_, weight_norm
from safer_fast.validation import check_number

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) -> adversarial images."""
Batches = Sequence[tuple[Tensor, Tensor]]
Watch = Callable[[Iterable[str]], Iterable[str]]
"""Gives what it is given, and may do something in between: show progress, raise."""
WeightRadius = Literal["absolute", "relative"]


@dataclass(frozen=True)
class Measure:
    """What layers are scored by: see `rank_layers`."""

    criterion: str
    radius: WeightRadius = "absolute"


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
) -> dict[str, float]:
    """A score for each layer; the layers that should be fine-tuned score highest.

    - `sharpness`: S_l = L(w_l + rho g_l / ||g_l||, rest) - L(w), L the mean cross-entropy on
      adversarial examples, g_l its gradient for the layer's weight and bias. This is our reading of
      SAFER (Gopal et al., 2025), whose formula is not public. `least-sharp`: -S_l.
    - `gradient-norm`: rho ||g_l||, the first-order estimate of S_l.
    - `criticality`: W(F_l) / W(F_l-1), W(F) the mean over images of ||F(x + d) - F(x)|| / dim
      (CLAT, Gopal et al., 2024), with d from `attack`; the first layer is compared with the image.
    - `random`: uniform in [0, 1).
    - others: see `register_criterion`.

    Args:
        model: takes pixels in [0, 1]; its weights are perturbed meanwhile and restored exactly. A
            RobustModel is run from each layer's block upwards only.
        batches: (images float [B, C, H, W], labels int64 [B]) on the model's device.
        rho: radius of the perturbation; times ||w_l|| with `radius="relative"`.
        attack: makes the adversarial examples; default: the images as they are.
        names: the layers to score; default: every linear layer and 2-d convolution.
        arenas: where the model's parameters lie, if they lie in arenas.
        generator: source of `random`, on the CPU.
        ranks: the processes whose batches make up the probe together; all get the same scores.
        watch: what the layers go through, one after the other, where each takes its time.

    Raises:
        ValueError: no batches, unknown names, an unknown criterion or one without scores (`all`),
            a rho that is no number from 0 to 1,000.
    """
    measure = Measure(criterion, radius)
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
    )[measure]


def score_layers(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    measures: Sequence[Measure],
    *,
    rho: float = 0.05,
    attack: Attack | None = None,
    names: Sequence[str] | None = None,
    arenas: ParameterArenas | None = None,
    generator: torch.Generator | None = None,
    ranks: Ranks | None = None,
    watch: Watch = iter,
) -> dict[Measure, dict[str, float]]:
    """The scores that `rank_layers` gives for each measure, for the price of the dearest.

    All of them share the adversarial examples, the gradient and the features below each block.
    """
    layers = layers_of(model)
    names = list(layers) if names is None else list(names)
    if unknown := [name for name in names if name not in layers]:
        raise ValueError(f"names: expected layers of the model, got {', '.join(unknown)}")
    check_number("rho", rho, FACTOR)
    criteria = {measure.criterion for measure in measures}
    for name in sorted(criteria):
        check_criterion(name)
    if "all" in criteria:
        raise ValueError("criterion: expected one that scores layers, got 'all'")
    scores: dict[Measure, dict[str, float]] = {}
    if "random" in criteria:
        draws = torch.rand(len(names), generator=generator, dtype=torch.float64).tolist()
        drawn = dict(zip(names, draws, strict=True))
        scores = {measure: drawn for measure in measures if measure.criterion == "random"}
    if criteria <= {"random"}:
        return scores
    ranks = ranks or Ranks()
    probes = [
        (images, attack(model, images, labels) if attack and len(labels) else images, labels)
        for images, labels in batches
    ]
    num_images = sum(len(labels) for _, _, labels in probes)
    total = ranks.sum_(torch.tensor(num_images)).item()
    if not total:
        raise ValueError("batches: expected at least one batch, got none")
    with frozen(model):
        if "criticality" in criteria:
            pairs = [(clean, attacked) for clean, attacked, _ in probes]
            changes = criticality(model, pairs, names, ranks)
            scores |= {m: changes for m in measures if m.criterion == "criticality"}
        adversarial = [(attacked, labels) for _, attacked, labels in probes]
        for name in criteria & REGISTERED.keys():
            found = registered_scores(name, model, adversarial, names, ranks)
            scores |= {m: found for m in measures if m.criterion == name}
        if rest := [m for m in measures if m not in scores]:
            chosen = _selection_of(model, names, layers, arenas)
            _store_mean_gradients(model, chosen, adversarial, total)
            ranks.sum_(chosen.flat)
            norms = {m for m in rest if m.criterion == "gradient-norm"}
            scores |= {m: _gradient_norms(chosen, names, rho, m.radius) for m in norms}
            rises = [m for m in rest if m not in norms]
            sums = _loss_rises(model, chosen.groups, names, adversarial, rho, rises, watch)
            scores |= {m: _means(m, ranks.sum_(sums[m]) / total, names) for m in rises}
    return scores


def select_layers(scores: Mapping[str, float], *, fraction: float) -> list[str]:
    """The names with the highest scores: `fraction` of them, rounded half up, at least one.

    Equal scores are ordered by name. Raises ValueError for a fraction outside (0, 1], no scores, or
    a score that is NaN.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected above 0 and at most 1, got {fraction}")
    if not scores:
        raise ValueError("scores: expected at least one layer, got none")
    if lost := [name for name, score in scores.items() if isnan(score)]:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise ValueError(
            f"scores: expected numbers, got NaN for {shown}: weights or losses are not finite; "
            "train with a lower --optim.learning_rate or with --optim.clip_norm"
        )
    count = max(1, int(fraction * len(scores) + 0.5))
    return sorted(scores, key=lambda name: (-scores[name], name))[:count]


@dataclass(frozen=True)
class Choice:
    """Which layers are fine-tuned next, and the scores that say so (none for an explicit list)."""

    criterion: str
    scores: dict[str, float]
    selected: list[str]


def choose_layers(
    model: RobustModel,
    arenas: ParameterArenas,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: SelectionConfig,
    *,
    sam_rho: float,
    attack: Attack,
    seed: int,
    ranks: Ranks | None = None,
    watch: Watch = iter,
) -> Choice:
    """The layers that the configuration selects for these training images."""
    if config.layers is not None:
        return Choice("explicit", {}, match_layers(config.layers, model.layers))
    if config.criterion == "all":
        return Choice("all", {}, list(model.layers))
    scores = rank_layers(
        model,
        batches,
        criterion=config.criterion,
        rho=config.rho or sam_rho or 0.05,
        radius=config.radius,
        attack=attack,
        names=candidates(model, config.from_block, config.candidates),
        arenas=arenas,
        generator=torch.Generator().manual_seed(seed),
        ranks=ranks,
        watch=watch,
    )
    return Choice(config.criterion, scores, select_layers(scores, fraction=config.fraction))


def match_layers(
    patterns: Sequence[str], names: Iterable[str], setting: str = "selection.layers"
) -> list[str]:
    """The layers that a name or shell-style pattern fits; ValueError for a pattern without any."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{setting}: expected names or patterns such as {names[-1]!r} or "
                f"'blocks.1?.attn.*', got {pattern!r}, which fits no layer"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def candidates(
    model: RobustModel, from_block: int, patterns: Sequence[str] | None = None
) -> list[str]:
    """The layers of block `from_block` and above, and of the head, that a pattern fits, if any.

    Raises ValueError for a block beyond the last, a pattern that fits no layer, and where nothing
    is left.
    """
    if from_block and from_block >= max(model.num_blocks, 1):
        raise ValueError(
            f"selection.from_block: expected less than the {model.num_blocks} blocks of the model, "
            f"got {from_block}"
        )
    lowest = from_block if from_block else STEM
    fitting = match_layers(patterns or ["*"], model.layers, "selection.candidates")
    names = [name for name in fitting if model.block_of(name) >= lowest]
    if not names:
        raise ValueError(
            f"selection.candidates: expected layers of block {from_block} and above, got "
            f"{', '.join(fitting)}"
        )
    return names


def layers_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The layers of any module by name, with their parameters."""
    network = model.network if isinstance(model, RobustModel) else model
    names = model.layers if isinstance(model, RobustModel) else find_layers(model)
    return {layer: [network.get_parameter(name) for name in own] for layer, own in names.items()}


def _selection_of(
    model: nn.Module,
    names: Sequence[str],
    layers: Mapping[str, Sequence[nn.Parameter]],
    arenas: ParameterArenas | None,
) -> Selection:
    if arenas is not None:
        return arenas.select(names)
    return module_selection({name: layers[name] for name in names})


def _store_mean_gradients(
    model: nn.Module, chosen: Selection, batches: Batches, total: float
) -> None:
    """The ranges hold the gradient of the loss summed over all batches, divided by `total`."""
    with requiring_gradients(chosen.parameters):
        for images, labels in batches:
            if not len(labels):
                continue
            loss = cross_entropy(model(images), labels) / total
            gradients = torch.autograd.grad(loss, chosen.parameters)
            for view, gradient in zip(chosen.gradient_views, gradients, strict=True):
                view.add_(gradient)


def _gradient_norms(
    chosen: Selection, names: Sequence[str], rho: float, radius: str
) -> dict[str, float]:
    scores = []
    for name in names:
        ranges = chosen.groups[name]
        size = weight_norm(ranges) if radius == "relative" else 1.0
        scores.append(rho * size * gradient_squares(ranges).sqrt())
    return dict(zip(names, torch.stack(scores).tolist(), strict=True))


@torch.no_grad()
def _loss_rises(
    model: nn.Module,
    groups: Mapping[str, Sequence[Range]],
    names: Sequence[str],
    batches: Batches,
    rho: float,
    measures: Sequence[Measure],
    watch: Watch,
) -> dict[Measure, Tensor]:
    """For each layer the rise of the summed loss when it alone is perturbed, float64 [layers]."""
    device = groups[names[0]][0].master.device
    rises = {m: torch.zeros(len(names), dtype=torch.float64, device=device) for m in measures}
    for images, labels in batches if measures else ():
        if not len(labels):  # other ranks have some: all go through the layers at the same time
            list(watch(names))
            continue
        run_from, base = cached_run(model, images, labels)
        for place, name in enumerate(watch(names)):
            for measure, sums in rises.items():
                ascend_([groups[name]], rho, relative=measure.radius == "relative")
                try:
                    sums[place] += run_from(name) - base
                finally:
                    restore_(groups[name])
    return rises


def _means(measure: Measure, rises: Tensor, names: Sequence[str]) -> dict[str, float]:
    sign = -1.0 if measure.criterion == "least-sharp" else 1.0
    return {name: sign * rise for name, rise in zip(names, rises.tolist(), strict=True)}


@contextmanager
def requiring_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters require gradients for a while."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
