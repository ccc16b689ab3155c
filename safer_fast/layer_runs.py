"""A model run again and again, each time with another layer's weights changed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from safer_fast.attack import cross_entropy
from safer_fast.cut import STEM
from safer_fast.network import RobustModel


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
