"""Arenas hold every weight, merged ranges are few, and weights are restored exactly."""

from itertools import pairwise

import pytest
import torch

from safer_fast.models.arenas import ALIGNMENT, ParameterArenas, requiring_gradients
from tests.support.networks import FAMILIES, PlainNetwork, build


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_a_slice_of_its_arena(name: str) -> None:
    model = build(name)
    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    arenas = ParameterArenas(model.network, model.layers, torch.bfloat16)
    matrices = {n for own in model.layers.values() for n in own}
    taken: dict[torch.dtype, list[tuple[int, int]]] = {torch.float32: [], torch.bfloat16: []}
    for n, parameter in model.network.named_parameters():
        dtype = torch.bfloat16 if n in matrices else torch.float32
        assert parameter.dtype == dtype, n
        assert torch.equal(parameter, before[n].to(dtype))
        assert torch.equal(arenas.view(n, arenas.master), before[n])
        assert not parameter.requires_grad
        arena = arenas.compute[dtype]
        start = (parameter.data_ptr() - arena.data_ptr()) // arena.element_size()
        assert start % ALIGNMENT == 0
        assert 0 <= start <= arena.numel() - parameter.numel()
        taken[dtype].append((start, start + parameter.numel()))
    for places in taken.values():
        places.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(places))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbouring_layers_share_ranges(dtype: torch.dtype) -> None:
    model = build()
    arenas = ParameterArenas(model.network, model.layers, dtype)
    assert len(arenas.select(["blocks.1.attn.qkv"]).ranges) == 2
    assert len(arenas.select(["blocks.1.attn.qkv", "blocks.1.attn.proj"]).ranges) == 2
    assert len(arenas.select(["blocks.1.attn.qkv", "blocks.1.mlp.fc1"]).ranges) == 4
    everything = arenas.select()
    assert len(everything.ranges) == (3 if dtype == torch.bfloat16 else 2)
    assert sum(part.master.numel() for part in everything.ranges) == arenas.master.numel()


def test_matrices_of_layers_are_decayed_and_nothing_else_is() -> None:
    model = build(norms=True)
    arenas = ParameterArenas(model.network, model.layers, torch.bfloat16)
    decayed = {n for n, place in arenas.places.items() if place.is_decayed}
    assert decayed == {
        f"{layer}.weight" for layer in model.layers if f"{layer}.weight" in arenas.places
    }


def test_ranges_hold_the_gradients_of_their_weights() -> None:
    model = build()
    arenas = ParameterArenas(model.network, model.layers, torch.bfloat16)
    selection = arenas.select(["blocks.1.attn.qkv", "blocks.2.attn.qkv", "head"])
    gradients = [torch.randn(p.shape).to(p.dtype) for p in selection.parameters]
    selection.store_gradients(gradients)
    for parameter, gradient in zip(selection.parameters, gradients, strict=True):
        found = []
        for part in selection.ranges:
            offset = (parameter.data_ptr() - part.compute.data_ptr()) // parameter.element_size()
            if 0 <= offset < part.compute.numel():
                found.append(part.gradient.narrow(0, offset, parameter.numel()))
        assert len(found) == 1
        assert torch.equal(found[0].view(parameter.shape), gradient.float())
    assert set(selection.groups) == set(selection.names)
    total = sum(float(part.gradient.abs().sum()) for part in selection.ranges)
    apart = [part for parts in selection.groups.values() for part in parts]
    assert total == pytest.approx(sum(float(part.gradient.abs().sum()) for part in apart))


def test_norms_of_a_layer_are_selected_with_it() -> None:
    model = build(norms=True)
    arenas = ParameterArenas(model.network, model.layers, torch.bfloat16)
    selection = arenas.select(["blocks.1.mlp.fc1"])
    dtypes = sorted(str(parameter.dtype) for parameter in selection.parameters)
    assert dtypes == ["torch.bfloat16"] * 2 + ["torch.float32"] * 2
    assert list(selection.groups) == ["blocks.1.mlp.fc1"]


def test_an_average_can_be_read_by_the_network_and_left_again() -> None:
    model = build()
    arenas = ParameterArenas(model.network, model.layers, torch.bfloat16)
    before = arenas.state_dict()
    other = arenas.vector_of({n: t + 1 for n, t in before.items()})
    arenas.load_compute(other)
    for n, parameter in model.network.named_parameters():
        assert torch.equal(parameter, (before[n] + 1).to(parameter.dtype))
    assert all(torch.equal(t, before[n]) for n, t in arenas.state_dict().items())
    arenas.load_compute()
    for n, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[n].to(parameter.dtype))


def test_a_loss_that_depends_on_some_weights_only_has_zero_gradients_for_the_others() -> None:
    arenas = ParameterArenas(PlainNetwork(), {"stem": ("stem.weight", "stem.bias")}, torch.float32)
    selection = arenas.select(["stem"])
    weight, bias = selection.parameters
    with requiring_gradients(selection.parameters):
        gradients = selection.gradients_of(weight.square().sum())
    assert torch.equal(gradients[0], 2 * weight)
    assert torch.equal(gradients[1], torch.zeros_like(bias))
    assert len(selection.unread) == 1
    assert selection.unread[0] is bias
    with pytest.raises(ValueError, match="stem: expected a layer that the network's forward pass"):
        selection.gradients_of(weight.square().sum())  # nothing requires gradients any more


def test_half_precision_masters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stem\.weight: expected float32, got torch\.float16"):
        ParameterArenas(PlainNetwork().half(), {}, torch.bfloat16)
