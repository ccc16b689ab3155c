"""Exact savings change no logits, gradients or steps beyond rounding."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from safer_fast.config.schema import SAVINGS
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.exact_savings import from_patches, to_patches
from safer_fast.models.robust_model import RobustModel
from safer_fast.training.reference import PlainModel
from tests.support.networks import FAMILIES, UNCUTTABLE, build, images_and_labels
from tests.support.steps import assert_near_fp64, error, make_step, run_step

HEAD_READS_CLASS_TOKENS = {
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
}


def build_saving(name: str, savings: tuple[str, ...] = SAVINGS) -> RobustModel:
    model = build(name)
    model.enable_savings(savings, 32)
    return model


def test_patches_hold_every_pixel_once_in_the_order_of_the_embedding() -> None:
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    patches = to_patches(images, 4)
    assert patches.shape == (2, 4, 48)
    assert torch.equal(patches[1, 1], images[1, :, :4, 4:].flatten())
    assert torch.equal(from_patches(patches, 4, 3, 8), images)


@pytest.mark.parametrize("name", [*FAMILIES, UNCUTTABLE])
def test_logits_and_pixel_gradients_in_fp64_are_those_of_timm(name: str) -> None:
    plain, saving = PlainModel(build(name), torch.float64), build_saving(name).double()
    images, labels = images_and_labels()
    images = images.double()
    results: list[tuple[Tensor, Tensor]] = []
    for network, pixels in ((plain, images), (saving, saving.arrange(images))):
        pixels = pixels.clone().requires_grad_()
        logits = network(pixels) if network is plain else _fp64_logits(saving, pixels)
        loss = functional.cross_entropy(logits, labels)
        gradient = torch.autograd.grad(loss, pixels)[0]
        if gradient.ndim == 3:
            gradient = from_patches(gradient, saving.patch_size or 1, 3, 32)
        results.append((logits.detach(), gradient))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def _fp64_logits(model: RobustModel, pixels: Tensor) -> Tensor:
    """The suffix without its last cast to fp32."""
    features = model.prefix(pixels, model.num_blocks or -1)
    return model._blocks.tail(features)


@pytest.mark.parametrize("name", [*FAMILIES, UNCUTTABLE])
def test_savings_that_do_not_apply_are_named(name: str) -> None:
    model = build(name)
    notes = " ".join(model.enable_savings(SAVINGS, 32))
    assert ("class-token" in notes) == (name not in HEAD_READS_CLASS_TOKENS)
    assert ("patch-order" in notes) == (name == UNCUTTABLE)
    assert (model.patch_size is None) == (name == UNCUTTABLE)


def test_a_pooled_head_keeps_all_tokens_of_the_last_block() -> None:
    from safer_fast.config.schema import ModelConfig
    from safer_fast.models.build import build_model

    arguments = {"depth": 2, "global_pool": "avg"}
    config = ModelConfig(name="vit_tiny_patch16_224", patch_size=8, arguments=arguments)
    model = build_model(config, num_classes=10, image_size=32)
    images, _ = images_and_labels()
    before = model(images)
    assert "class-token" in " ".join(model.enable_savings(["class-token"], 32))
    assert torch.equal(model(images), before)


def test_images_that_do_not_divide_into_patches_stay_images() -> None:
    model = build()
    assert model.enable_savings(["patch-order"], 30)
    assert model.arrange(images_and_labels()[0]).ndim == 4


@pytest.mark.slow
@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vit_tiny_patch16_224", ["blocks.3.attn.qkv", "blocks.2.mlp.fc1"]),
        ("vit_tiny_patch16_224", ["patch_embed.proj", "head"]),
        ("deit_tiny_distilled_patch16_224", ["blocks.2.attn.qkv"]),
        ("swin_tiny_patch4_window7_224", ["layers.0.blocks.0.mlp.fc1"]),
        ("convit_tiny", ["patch_embed.proj"]),
    ],
)
def test_each_saving_alone_leaves_the_step_what_it_was(
    name: str, layers: list[str], saving: str
) -> None:
    assert_near_fp64(name, layers, 2, savings=(saving,))


@pytest.mark.parametrize("objective", ["pgd-at", "trades", "mart"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_all_savings_together_leave_the_step_what_it_was(objective: str, norm: str) -> None:
    layers = ["blocks.2.mlp.fc1", "blocks.3.attn.proj"]
    settings = {"objective": objective, "norm": norm}
    assert_near_fp64("vit_tiny_patch16_224", layers, 2, savings=SAVINGS, **settings)


def test_everything_is_trained_with_all_savings_on() -> None:
    assert_near_fp64("vit_tiny_patch16_224", None, 2, savings=SAVINGS)


@pytest.mark.slow
def test_compiled_savings_leave_the_step_what_it_was() -> None:
    layers = ["blocks.2.mlp.fc1", "blocks.3.attn.qkv"]
    assert_near_fp64("vit_tiny_patch16_224", layers, 2, is_compiled=True, savings=SAVINGS)


def test_bf16_steps_with_and_without_savings_are_equally_near_to_fp32() -> None:
    images, labels = images_and_labels(16)
    results = []
    for savings, dtype in ((SAVINGS, torch.bfloat16), ((), torch.bfloat16), ((), torch.float32)):
        model = build(compute_dtype=dtype)
        model.enable_savings(savings, 32)
        step, arenas = make_step(model, ["blocks.2.mlp.fc1", "blocks.3.attn.qkv"])
        step.attack.steps = 0
        run_step(step, images, labels)
        results.append(arenas.state_dict())
    begin = {n: p.detach() for n, p in build().network.named_parameters()}
    truth = {name: tensor.double() for name, tensor in results[2].items()}
    assert error(results[0], truth, begin) <= 2 * error(results[1], truth, begin)


def test_criticality_still_sees_every_layer() -> None:
    from safer_fast.selection.scoring import rank_layers

    images, labels = images_and_labels()
    plain, saving = build(), build_saving("vit_tiny_patch16_224")
    scores = [
        rank_layers(
            model,
            [(images, labels)],
            criterion="criticality",
            attack=lambda _m, x, _y: (x + 0.05).clamp(0, 1),
        )
        for model in (plain, saving)
    ]
    assert scores[0] == scores[1]


def test_frozen_weights_can_stay_fp32_under_autocast() -> None:
    model = build(compute_dtype=torch.bfloat16)
    ParameterArenas(model.network, model.layers, torch.float32)
    stored = build(compute_dtype=torch.bfloat16)
    ParameterArenas(stored.network, stored.layers, torch.bfloat16)
    images, _ = images_and_labels()
    assert torch.equal(model(images), stored(images))
