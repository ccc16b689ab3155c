"""A model run again and again, each time with another layer's weights changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from safer_fast.attacks.pgd import cross_entropy
from safer_fast.models.arenas import (
    ParameterArenas,
    Range,
    TrainedWeights,
    module_selection,
    requiring_gradients,
)
from safer_fast.models.families import STEM
from safer_fast.models.perturbation import ascend_, gradient_squares, restore_, weight_norm
from safer_fast.models.robust_model import RobustModel
from safer_fast.selection.criteria import Batches, ScoredBy, Watch


def cached_run(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Callable[[str], Tensor], Tensor]:
    """A function that gives the summed loss, run from a layer's block upwards; and the loss now."""
    if not isinstance(model, RobustModel):
        return lambda _: _loss(model(images), labels), _loss(model(images), labels)
    features = {STEM: model.prefix(images, STEM)}
    for index in range(STEM, model.num_blocks):
        features[index + 1] = model.block(features[index], index)

    def run_from(name: str) -> Tensor:
        block = model.block_of(name)
        return _loss(model.suffix(features[block], block), labels)

    return run_from, _loss(model.suffix(features[model.num_blocks], model.num_blocks), labels)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.double(), labels)


def weights_of_layers(
    model: nn.Module,
    names: Sequence[str],
    layers: Mapping[str, Sequence[nn.Parameter]],
    arenas: ParameterArenas | None,
) -> TrainedWeights:
    if arenas is not None:
        return arenas.select(names)
    return module_selection({name: layers[name] for name in names})


def store_mean_gradients(
    model: nn.Module, chosen: TrainedWeights, batches: Batches, total: float
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


def gradient_norms(
    chosen: TrainedWeights, names: Sequence[str], rho: float, radius: str
) -> dict[str, float]:
    scores = []
    for name in names:
        ranges = chosen.groups[name]
        size = weight_norm(ranges) if radius == "relative" else 1.0
        scores.append(rho * size * gradient_squares(ranges).sqrt())
    return dict(zip(names, torch.stack(scores).tolist(), strict=True))


@torch.no_grad()
def loss_rises(
    model: nn.Module,
    groups: Mapping[str, Sequence[Range]],
    names: Sequence[str],
    batches: Batches,
    rho: float,
    measures: Sequence[ScoredBy],
    watch: Watch,
) -> dict[ScoredBy, Tensor]:
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


def scores_by_name(measure: ScoredBy, rises: Tensor, names: Sequence[str]) -> dict[str, float]:
    sign = -1.0 if measure.criterion == "least-sharp" else 1.0
    return {name: sign * rise for name, rise in zip(names, rises.tolist(), strict=True)}
