"""Images that a model cannot take are refused with one line, those that it can are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safer_fast import ModelConfig, build_model, pgd

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 16, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "depths": [1, 1],
        "num_heads": [1, 2],
        "embed_dim": 16,
        "window_size": 4,
    },
    "convit_tiny": {"depth": 2, "embed_dim": 16, "num_heads": 2, "local_up_to_layer": 1},
    "eva02_tiny_patch14_224": {"depth": 2, "embed_dim": 16, "num_heads": 2},
}


def build(name: str, **arguments: Any) -> Any:
    config = ModelConfig(name=name, patch_size=4, arguments=SMALL[name] | arguments)
    return build_model(config, num_classes=3, image_size=32)


@pytest.mark.parametrize("name", SMALL)
def test_images_of_another_size_are_refused_by_networks_of_one_size(name: str) -> None:
    model = build(name)
    for size in (16, 30, 64):
        with pytest.raises(
            ValueError, match=f"^images: expected 32x32 pixels, .* got {size}x{size}$"
        ):
            model(torch.rand(2, 3, size, size))
    with pytest.raises(
        ValueError, match=r"^images: expected \[B, 3, H, W\], .* got \[2, 1, 32, 32\]$"
    ):
        model(torch.rand(2, 1, 32, 32))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^images: expected 32x32 pixels"):
        pgd(model, torch.rand(2, 3, 16, 16), labels, epsilon=0.1, step_size=0.1, steps=1)


def test_a_network_of_any_size_takes_images_of_any_size() -> None:
    model = build("vit_tiny_patch16_224", dynamic_img_size=True)
    for size in (16, 32, 48):
        assert model(torch.rand(2, 3, size, size)).shape == (2, 3)
    padded = build("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True)
    assert padded(torch.rand(2, 3, 30, 30)).shape == (2, 3)


def test_a_model_in_double_precision_takes_doubles() -> None:
    model = build("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"images: expected torch.float32 .*, got torch.float64"):
        model(torch.rand(2, 3, 32, 32).double())
    assert model.double()(torch.rand(2, 3, 32, 32).double()).shape == (2, 3)
