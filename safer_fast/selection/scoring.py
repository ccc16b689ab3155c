"""Which layers to fine-tune: scores for every layer, and the few that score highest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor, nn

from safer_fast.attacks.pgd import frozen
from safer_fast.config.checks import check_number
from safer_fast.config.ranges import FACTOR
from safer_fast.config.schema import SelectionConfig
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.ranks import Ranks
from safer_fast.selection.candidates import candidates, layers_of, match_layers
from safer_fast.selection.criteria import (
    REGISTERED,
    Attack,
    ScoredBy,
    Watch,
    WeightRadius,
    check_criterion,
    registered_scores,
)
from safer_fast.selection.criticality import criticality
from safer_fast.selection.sharpness import (
    gradient_norms,
    loss_rises,
    scores_by_name,
    store_mean_gradients,
    weights_of_layers,
)


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
) -> dict[ScoredBy, dict[str, float]]:
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
    scores: dict[ScoredBy, dict[str, float]] = {}
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
            chosen = weights_of_layers(model, names, layers, arenas)
            store_mean_gradients(model, chosen, adversarial, total)
            ranks.sum_(chosen.flat)
            norms = {m for m in rest if m.criterion == "gradient-norm"}
            scores |= {m: gradient_norms(chosen, names, rho, m.radius) for m in norms}
            rises = [m for m in rest if m not in norms]
            sums = loss_rises(model, chosen.groups, names, adversarial, rho, rises, watch)
            scores |= {m: scores_by_name(m, ranks.sum_(sums[m]) / total, names) for m in rises}
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
class LayerChoice:
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
) -> LayerChoice:
    """The layers that the configuration selects for these training images."""
    if config.layers is not None:
        return LayerChoice("explicit", {}, match_layers(config.layers, model.layers))
    if config.criterion == "all":
        return LayerChoice("all", {}, list(model.layers))
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
    return LayerChoice(config.criterion, scores, select_layers(scores, fraction=config.fraction))
