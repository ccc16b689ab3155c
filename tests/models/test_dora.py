"""A layer with magnitudes computes PEFT's DoRA, in the precision of a merged weight.

Its training, merging and resuming are tested with LoRA's, in test_lora.py.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.lora import Adapters, magnified, row_norms
from tests.support.networks import build, images_and_labels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="no peft here")

RANK = 2
LAYERS = {
    "linear": (nn.Linear(7, 5), (3, 4, 7)),
    "convolution": (nn.Conv2d(3, 5, 2, stride=2), (3, 3, 4, 4)),
}


def drawn(parameters: list[Tensor]) -> None:
    """Set A, B and m to values far from those they start with."""
    generator = torch.Generator().manual_seed(1)
    lower, upper, magnitude = parameters
    with torch.no_grad():
        for factor in (lower, upper):
            factor.copy_(torch.randn(factor.shape, generator=generator))
        magnitude.mul_(torch.rand(magnitude.numel(), generator=generator).view(magnitude.shape))


def outputs_and_gradients(
    layer: nn.Module, parameters: list[Tensor], images: Tensor
) -> list[Tensor]:
    """What a layer computes, and the gradients of a loss by A, B, m."""
    drawn(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    output = layer(images)
    loss = output.sin().sum() + output.square().sum()
    return [output, *(g.flatten() for g in torch.autograd.grad(loss, parameters))]


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_peft(kind: str) -> None:
    torch.manual_seed(0)
    own, shape = LAYERS[kind]
    images = torch.randn(shape)
    ours, theirs = nn.Sequential(own), nn.Sequential(own)
    arenas = ParameterArenas(ours, {"0": ("0.weight", "0.bias")}, torch.float32)
    adapters = Adapters(ours, {"0": ("0.weight", "0.bias")}, RANK, torch.float32, 0, arenas)

    from peft import LoraConfig, inject_adapter_in_model  # Adapters can import it first

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="0", use_dora=True)
    theirs[0] = own
    inject_adapter_in_model(config, theirs)
    layer = theirs[0].eval()
    members = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    expected = outputs_and_gradients(layer, [m["default"].weight for m in members], images)
    computed = outputs_and_gradients(ours[0], list(adapters.arenas.parameters.values()), images)
    for ours_, theirs_ in zip(computed, expected, strict=True):
        assert torch.allclose(ours_, theirs_, rtol=1e-5, atol=1e-4)


def test_a_weight_is_that_of_the_paper_with_norms_that_are_constants() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, product = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
    product.requires_grad_(True)
    magnitude = torch.rand(4, dtype=torch.float64, generator=generator).requires_grad_(True)
    result = magnified(weight, product, magnitude)
    assert torch.allclose(row_norms(result), magnitude)
    norms = (weight + product).square().sum(1).sqrt()
    slope = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    of_product, of_magnitude = torch.autograd.grad((result * slope).sum(), (product, magnitude))
    assert torch.allclose(of_product, slope * (magnitude / norms)[:, None])
    assert torch.allclose(of_magnitude, (slope * (weight + product)).sum(1) / norms)


def test_a_row_of_zeros_is_trained_as_without_magnitudes() -> None:
    weight, product = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    for moved in (torch.zeros(4, 6), product):
        moved = moved.requires_grad_(True)
        magnitude = row_norms(weight).requires_grad_(True)
        result = magnified(weight, moved, magnitude)
        assert torch.equal(result[1], moved[1])
        gradients = torch.autograd.grad(result.sum(), (moved, magnitude))
        assert torch.equal(gradients[0][1], torch.ones(6))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_sees_the_very_weights_that_are_merged(dtype: torch.dtype) -> None:
    """Also where changes are smaller than the network's dtype resolves."""
    images, _ = images_and_labels()
    model = build(compute_dtype=dtype)
    arenas = ParameterArenas(model.network, model.layers, dtype)
    layers = {name: names for name, names in model.layers.items() if name.startswith("blocks.1")}
    adapters = Adapters(model.network, layers, RANK, dtype, 0, arenas)
    assert set(adapters.arenas.compute) == {torch.float32}
    adapters.arenas.master.add_(1e-3 * torch.randn_like(adapters.arenas.master))
    adapters.arenas.load_compute()
    with torch.no_grad():
        expected = model(images)
        with adapters.away():
            assert not torch.equal(model(images), expected)
        adapters.merge_into(arenas, arenas.master)
        adapters.detach()
        arenas.load_compute()
        assert torch.equal(model(images), expected)


def test_magnitudes_are_not_decayed() -> None:
    model = build()
    arenas = ParameterArenas(model.network, model.layers, torch.float32)
    layers = {name: model.layers[name] for name in ("blocks.1.mlp.fc1", "head")}
    selection = Adapters(model.network, layers, RANK, torch.float32, 0, arenas).selection()
    for parts in selection.groups.values():
        assert [(len(part.shape), part.is_decayed) for part in parts] == [
            (2, True),
            (2, True),
            (1, False),
        ]
