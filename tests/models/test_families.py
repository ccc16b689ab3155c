"""Networks divided into stem, blocks and tail compute what timm computes, without waiting."""

from typing import Any

import pytest
import torch

from tests.support.networks import build, images_and_labels

ROTARY = ("eva02_tiny_patch14_224", "vit_small_patch16_dinov3")


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions_are_computed_at_most_once_for_a_grid(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    network: Any = model.network
    compute, shapes = network.rope.get_embed, []

    def counted(shape: Any = None, **others: Any) -> Any:
        shapes.extend([] if shape is None else [tuple(shape)])
        return compute(shape, **others)

    monkeypatch.setattr(network.rope, "get_embed", counted)
    images, _ = images_and_labels()
    logits = [model(images) for _ in range(2)]
    assert shapes in ([], [(4, 4)])
    expected = network((images - model.mean) / model.std)
    assert all(torch.equal(each, expected) for each in logits)


@pytest.mark.parametrize("name", ROTARY)
def test_kept_rotary_positions_follow_the_network_and_serve_gradients(name: str) -> None:
    model = build(name)
    images, _ = images_and_labels()
    with torch.inference_mode():
        before = model(images)
    pixels = images.clone().requires_grad_()
    model(pixels).sum().backward()
    assert pixels.grad is not None
    exact = model.double()(images.double())
    network: Any = model.network
    assert torch.equal(exact, network((images.double() - model.mean) / model.std).float())
    torch.testing.assert_close(exact, before, rtol=1e-3, atol=1e-3)
