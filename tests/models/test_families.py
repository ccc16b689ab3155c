"""Networks divided into stem, blocks and tail compute what timm computes, without waiting."""

from typing import Any

import pytest
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch.nn.functional import interpolate

from safer_fast.models.families import resampling_matrix
from safer_fast.models.robust_model import compile_blocks
from tests.support.networks import FAMILIES, NUM_CLASSES, UNCUTTABLE, build, images_and_labels

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


# -- images of several sizes

FIXED = ("swin_tiny_patch4_window7_224", "convit_tiny")
SAVINGS = ("patch-order", "class-token")


@pytest.mark.parametrize("savings", [(), SAVINGS], ids=["plain", "savings"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FIXED])
def test_smaller_images_are_what_timm_computes_for_them(
    name: str, savings: tuple[str, ...]
) -> None:
    model = build(name)
    model.enable_savings(savings, 32)
    images, _ = images_and_labels()
    before = model(model.arrange(images))
    model.take_sizes([16, 24])
    sizes: Any = {"num_classes": NUM_CLASSES, "img_size": 32, "patch_size": 8}
    theirs = timm.create_model(name, dynamic_img_size=True, **sizes, **FAMILIES[name]).eval()
    missing = theirs.load_state_dict(model.network.state_dict(), strict=False).missing_keys
    assert not any(name.endswith("weight") for name in missing)
    for size in (16, 24):
        pixels = interpolate(images, size=(size, size), mode="area")
        expected = theirs((pixels - model.mean) / model.std)
        computed = model(model.arrange(pixels))
        assert torch.allclose(computed, expected, atol=1e-5), size
    assert torch.equal(model(model.arrange(images)), before)


@pytest.mark.parametrize("name", [*FIXED, UNCUTTABLE])
def test_a_network_for_one_size_is_refused(name: str) -> None:
    model = build(name)
    model.take_sizes([])
    message = r"--data\.resolution_schedule: expected a ViT.*, got \w+, which is built for one size"
    with pytest.raises(ValueError, match=message):
        model.take_sizes([16])


def test_patches_must_divide_each_size() -> None:
    with pytest.raises(
        ValueError, match=r"expected sizes that the network's patches of 8 pixels divide, got 20"
    ):
        build().take_sizes([16, 20])


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), (3, 5)])
def test_positions_are_resampled_as_timm_does_by_one_matrix(grid: tuple[int, int]) -> None:
    positions = torch.randn(1, grid[0] * grid[1] + 2, 5)
    for edge in (1, 2, 3, 7):
        matrix = resampling_matrix(grid, edge)
        expected = resample_abs_pos_embed(positions, [edge, edge], list(grid), 2)
        resampled = torch.cat((positions[:, :2], matrix @ positions[:, 2:]), dim=1)
        assert torch.allclose(resampled, expected, atol=1e-5)


def test_smaller_images_train_the_positions_of_the_full_size() -> None:
    model = build()
    model.take_sizes([16])
    network: Any = model.network
    images, _ = images_and_labels()
    smaller = interpolate(images, size=(16, 16), mode="area")
    (gradient,) = torch.autograd.grad(model(smaller).sum(), network.pos_embed)
    assert gradient.shape == network.pos_embed.shape
    assert (gradient[0].abs().sum(1) > 0).all()


@pytest.mark.slow
def test_compiled_code_takes_images_of_both_sizes() -> None:
    model = build()
    model.take_sizes([16])
    images, _ = images_and_labels()
    both = [images, interpolate(images, size=(16, 16), mode="area")]
    with torch.no_grad():
        expected = [model(pixels) for pixels in both]
        compile_blocks(model)
        for pixels, logits in zip(both * 2, expected * 2, strict=True):
            assert torch.allclose(model(pixels), logits, atol=1e-5)
