"""Sharpness of layers: the rise of the loss when the weights of one layer are perturbed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from safer_fast.attacks.pgd import AttackLoss, cross_entropy
from safer_fast.models.arenas import Range
from safer_fast.models.families import STEM
from safer_fast.models.perturbation import ascend_, gradient_squares, restore_, weight_norm
from safer_fast.models.robust_model import RobustModel
from safer_fast.selection.inputs import ScoredBy, ScoringInputs, WeightRadius


def sharpness_scores(
    inputs: ScoringInputs, measures: Sequence[ScoredBy]
) -> dict[ScoredBy, dict[str, float]]:
    """S_l = L(w_l + rho g_l / ||g_l||, rest) - L(w) of each layer; -S_l for `least-sharp`."""
    radii = list(dict.fromkeys(measure.radius for measure in measures))
    sums = loss_rises(inputs, inputs.weights.groups, radii)
    rises = {radius: inputs.ranks.sum_(sums[radius]) / inputs.total for radius in radii}
    scores = {}
    for measure in measures:
        sign = -1.0 if measure.criterion == "least-sharp" else 1.0
        own = (sign * rises[measure.radius]).tolist()
        scores[measure] = dict(zip(inputs.names, own, strict=True))
    return scores


def gradient_norm_scores(
    inputs: ScoringInputs, measures: Sequence[ScoredBy]
) -> dict[ScoredBy, dict[str, float]]:
    """First-order estimate of S_l: rho ||g_l||, times ||w_l|| with a relative radius."""
    scores = {}
    for measure in measures:
        norms = []
        for name in inputs.names:
            ranges = inputs.weights.groups[name]
            size = weight_norm(ranges) if measure.radius == "relative" else 1.0
            norms.append(inputs.rho * size * gradient_squares(ranges).sqrt())
        scores[measure] = dict(zip(inputs.names, torch.stack(norms).tolist(), strict=True))
    return scores


@torch.no_grad()
def loss_rises(
    inputs: ScoringInputs, groups: Mapping[str, Sequence[Range]], radii: Sequence[WeightRadius]
) -> dict[WeightRadius, Tensor]:
    """Rise of the summed loss when each layer alone is perturbed: float64 [layers] by radius."""
    names, device = inputs.names, groups[inputs.names[0]][0].master.device
    rises = {r: torch.zeros(len(names), dtype=torch.float64, device=device) for r in radii}
    for images, labels in inputs.adversarial:
        if not len(labels):  # other ranks have some: all pass the layers at the same time
            list(inputs.watch(names))
            continue
        run_from, base = cached_run(inputs.model, images, labels, inputs.loss)
        for index, name in enumerate(inputs.watch(names)):
            for radius, sums in rises.items():
                ascend_([groups[name]], inputs.rho, relative=radius == "relative")
                try:
                    sums[index] += run_from(name) - base
                finally:
                    restore_(groups[name])
    return rises


def cached_run(
    model: nn.Module, images: Tensor, labels: Tensor, loss: AttackLoss = cross_entropy
) -> tuple[Callable[[str], Tensor], Tensor]:
    """Loss of the model run from a layer's block upwards, as a function of its name; the loss now.

    Losses are sums over the images.
    """

    def exact(logits: Tensor) -> Tensor:
        return loss(logits.double(), labels)

    if not isinstance(model, RobustModel):
        return lambda _: exact(model(images)), exact(model(images))
    features = {STEM: model.prefix(images, STEM)}
    for index in range(STEM, model.num_blocks):
        features[index + 1] = model.block(features[index], index)

    def run_from(name: str) -> Tensor:
        block = model.block_of(name)
        return exact(model.suffix(features[block], block))

    return run_from, exact(model.suffix(features[model.num_blocks], model.num_blocks))
