"""The step equals the textbook step in losses and weights, in every precision."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from safer_fast.config.schema import OptimConfig, SAMConfig
from safer_fast.models.families import STEM
from safer_fast.models.robust_model import compile_blocks
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.training.objectives import Targets
from safer_fast.training.optimizers import build_optimizer
from tests.support.networks import SHORT_SWIN, UNCUTTABLE, build, images_and_labels
from tests.support.steps import (
    EPSILON,
    STEP_SIZE,
    assert_near_fp64,
    error,
    forbidding_host_syncs,
    make_reference,
    make_step,
    run_step,
    sgd,
    starts,
)

CASES: list[tuple[str, str, list[str] | None, dict[str, Any]]] = [
    ("one middle layer", "vit_tiny_patch16_224", ["blocks.2.mlp.fc1"], {}),
    ("two layers apart", "vit_tiny_patch16_224", ["blocks.1.attn.qkv", "head"], {}),
    ("patch embedding", "vit_tiny_patch16_224", ["patch_embed.proj"], {}),
    ("everything", "vit_tiny_patch16_224", None, {}),
    ("everything, no second pass", "vit_tiny_patch16_224", None, {"rho": 0.0}),
    ("trades", "vit_tiny_patch16_224", ["blocks.2.mlp.fc1"], {"objective": "trades"}),
    ("mart", "vit_tiny_patch16_224", ["blocks.2.mlp.fc1"], {"objective": "mart"}),
    ("l2 attack", "vit_tiny_patch16_224", ["blocks.2.mlp.fc1"], {"norm": "l2"}),
    ("adaptive", "vit_tiny_patch16_224", ["blocks.2.mlp.fc1"], {"adaptive": True}),
    ("clipped", "vit_tiny_patch16_224", ["blocks.2.mlp.fc1"], {"clip_norm": 0.01}),
    ("swin", "swin_tiny_patch4_window7_224", ["layers.2.blocks.1.mlp.fc1"], {}),
    ("convit", "convit_tiny", ["blocks.3.attn.proj"], {}),
    ("eva02", "eva02_tiny_patch14_224", ["blocks.1.mlp.fc2"], {}),
    ("uncuttable", UNCUTTABLE, ["head"], {}),
]


COMPILED = [
    *(case for case in CASES if case[0] in ("one middle layer", "everything", "trades")),
    ("swin", SHORT_SWIN, ["layers.0.blocks.1.mlp.fc1"], {}),
]


@pytest.mark.parametrize(("name", "family", "layers", "settings"), CASES, ids=lambda v: str(v)[:30])
def test_three_fp32_steps_are_as_near_to_fp64_as_textbook_pytorch(
    name: str, family: str, layers: list[str] | None, settings: dict[str, Any]
) -> None:
    assert_near_fp64(family, layers, 3, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "layers", "settings"), COMPILED, ids=lambda v: str(v)[:30]
)
def test_compiled_steps_are_as_near_to_fp64_as_textbook_pytorch(
    name: str, family: str, layers: list[str] | None, settings: dict[str, Any]
) -> None:
    assert_near_fp64(family, layers, 3, is_compiled=True, **settings)


@pytest.mark.parametrize("optim", [OptimConfig(learning_rate=1e-3), None], ids=["adamw", "sgd"])
def test_ten_steps_follow_the_optimizer_of_torch(optim: OptimConfig | None) -> None:
    layers = ["blocks.2.attn.qkv", "blocks.3.mlp.fc2"]
    assert_near_fp64("vit_tiny_patch16_224", layers, 10, optim=optim)


@pytest.mark.parametrize(
    "is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("layers", [["blocks.2.mlp.fc1"], None], ids=["one layer", "everything"])
def test_a_bf16_step_is_the_textbook_step_under_autocast(
    layers: list[str] | None, is_compiled: bool
) -> None:
    model = build()
    begin = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    images, labels = images_and_labels()
    exact = make_reference(model, layers, torch.float64)
    autocast = make_reference(model, layers, torch.float32, torch.bfloat16)
    start = starts(images, "linf", 1)[0]
    exact(images.double(), labels, start.double())
    autocast(images, labels, start)
    model.compute_dtype = torch.bfloat16
    step, arenas = make_step(model, layers)
    if is_compiled:
        compile_blocks(model)
    run_step(step, images, labels)
    truth = {n: p.detach() for n, p in exact.model.network.named_parameters()}
    plain = {n: p.detach() for n, p in autocast.model.network.named_parameters()}
    assert error(arenas.state_dict(), truth, begin) <= 3 * error(plain, truth, begin)
    assert error(plain, truth, begin) < 0.3


def test_the_second_gradient_in_bf16_points_where_the_fp32_one_does() -> None:
    cosines = []
    for layers in (["blocks.2.mlp.fc1"], ["blocks.0.attn.qkv"], ["head"]):
        gradients = []
        for dtype in (torch.float32, torch.bfloat16):
            model = build(compute_dtype=dtype)
            step, _ = make_step(model, layers)
            step.attack.steps = 0
            images, labels = images_and_labels(16)
            run_step(step, images, labels)
            gradients.append(torch.cat([g.flatten() for g in step.selection.gradient_views]))
        cosines.append(float(torch.cosine_similarity(*gradients, dim=0)))
    assert min(cosines) > 0.999, cosines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reusing_the_prefix_equals_a_full_second_forward_bit_for_bit(dtype: torch.dtype) -> None:
    results = []
    for reuses in (True, False):
        step, arenas = make_step(build(compute_dtype=dtype), ["blocks.2.mlp.fc1", "head"])
        assert step.cut == 2
        if not reuses:
            step.cut = STEM
        images, labels = images_and_labels()
        for _ in range(2):
            run_step(step, images, labels)
        results.append(arenas.master.clone())
    assert torch.equal(*results)


def test_masters_are_never_perturbed_and_storage_never_moves() -> None:
    model = build(compute_dtype=torch.bfloat16)
    step, arenas = make_step(model, ["blocks.1.attn.proj", "blocks.2.mlp.fc2"])
    pointers = {n: p.data_ptr() for n, p in model.network.named_parameters()}
    pointers |= {"master": arenas.master.data_ptr()}
    master = arenas.master.clone()
    images, labels = images_and_labels()
    step.differentiate([model.prefix(images, step.cut)], [Targets.alike(labels)])
    step.ascend()
    assert torch.equal(arenas.master, master)
    changed = [
        n
        for n, p in model.network.named_parameters()
        if not torch.equal(p, arenas.view(n, master).to(p.dtype))
    ]
    assert {n.rpartition(".")[0] for n in changed} == set(step.selection.names)
    for _ in range(3):
        run_step(step, images, labels)
    now = {n: p.data_ptr() for n, p in model.network.named_parameters()}
    assert now | {"master": arenas.master.data_ptr()} == pointers
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, arenas.view(name, arenas.master).to(parameter.dtype))


def test_unselected_weights_stay_bit_identical_through_several_selections() -> None:
    model = build(compute_dtype=torch.bfloat16)
    images, labels = images_and_labels()
    step, arenas = make_step(model, ["blocks.1.attn.proj"])
    chosen = [["blocks.1.attn.proj"], ["head", "blocks.0.mlp.fc1"], ["patch_embed.proj"]]
    before = arenas.state_dict()
    for layers in chosen:
        step.selection = arenas.select(layers)
        step.optimizer = build_optimizer(sgd(), step.selection)
        step.__post_init__()
        run_step(step, images, labels)
    after = arenas.state_dict()
    moved = {
        name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])
    }
    assert moved == {name for layers in chosen for name in layers}


@pytest.mark.slow
def test_eager_and_compiled_agree_right_after_a_new_selection() -> None:
    images, labels = images_and_labels()
    results = []
    for is_compiled in (False, True):
        model = build()
        step, arenas = make_step(model, ["blocks.1.attn.proj"])
        if is_compiled:
            compile_blocks(model)
        for layers in (["blocks.1.attn.proj"], ["blocks.3.mlp.fc1"], ["blocks.1.attn.qkv"]):
            step.selection = arenas.select(layers)
            step.optimizer = build_optimizer(sgd(), step.selection)
            step.__post_init__()
            run_step(step, images, labels)
        results.append(arenas.state_dict())
    begin = {n: p.detach() for n, p in build().network.named_parameters()}
    truth = {name: tensor.double() for name, tensor in results[0].items()}
    assert error(results[1], truth, begin) < 1e-3


@pytest.mark.slow
def test_another_layer_of_the_same_kind_compiles_nothing_new() -> None:
    torch.compiler.reset()  # code compiled by other tests would be used again
    images, labels = images_and_labels()
    model = build()
    step, arenas = make_step(model, ["blocks.1.mlp.fc1"])
    compile_blocks(model)
    counts = []
    for layer in ("blocks.1.mlp.fc1", "blocks.2.mlp.fc1", "blocks.1.mlp.fc1", "blocks.2.attn.qkv"):
        step.selection = arenas.select([layer])
        step.optimizer = build_optimizer(sgd(), step.selection)
        step.__post_init__()
        run_step(step, images, labels)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 0
    assert counts[1] == counts[2] == counts[0]
    assert counts[3] == counts[0] + 1


@pytest.mark.parametrize(
    "optim", [OptimConfig(), None, OptimConfig(name="muon")], ids=["adamw", "sgd", "muon"]
)
@pytest.mark.parametrize("objective", ["pgd-at", "trades", "mart"])
def test_the_step_never_waits_for_the_device(objective: str, optim: OptimConfig | None) -> None:
    step, _ = make_step(
        build(), ["blocks.2.mlp.fc1"], objective=objective, optim=optim, clip_norm=1.0
    )
    images, labels = images_and_labels()
    epsilon, step_size = torch.tensor(EPSILON), torch.tensor(STEP_SIZE)
    with forbidding_host_syncs():
        step(images, Targets.alike(labels), epsilon, step_size)
        step(images, Targets.alike(labels), epsilon, step_size)
    assert step.health.sums.take()["images"] == 2 * len(labels)


def is_real_tensor(found: object) -> bool:
    """Return true for a real tensor; fake ones of a compiler may outlive an earlier test."""
    return issubclass(type(found), Tensor) and not issubclass(type(found), FakeTensor)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_stable_over_two_hundred_steps() -> None:
    step, _ = make_step(
        build(compute_dtype=torch.bfloat16), ["blocks.2.mlp.fc1"], optim=OptimConfig()
    )
    images, labels = images_and_labels()
    radii = torch.tensor(EPSILON), torch.tensor(STEP_SIZE)
    tensors, resident = [], []
    for index in range(221):
        step(images, Targets.alike(labels), *radii)
        if index in (19, 220):
            gc.collect()
            tensors.append(sum(is_real_tensor(each) for each in gc.get_objects()))
        if index in (20, 219):  # between: a list of all objects is itself megabytes
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert tensors[1] == tensors[0]
    assert (resident[1] - resident[0]) * os.sysconf("SC_PAGE_SIZE") <= 2 * 2**20


@pytest.mark.parametrize(
    "optim", [OptimConfig(), None, OptimConfig(name="muon")], ids=["adamw", "sgd", "muon"]
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    optim: OptimConfig | None,
) -> None:
    step, arenas = make_step(build(), ["blocks.2.mlp.fc1"], optim=optim)
    images, labels = images_and_labels()
    run_step(step, images, labels)
    before, compute = arenas.master.clone(), arenas.compute[torch.float32].clone()
    broken = images.clone()
    broken[0, 0, 0, 0] = float("nan")
    run_step(step, broken, labels)
    run_step(step, broken, labels)
    assert torch.equal(arenas.master, before)
    assert torch.equal(arenas.compute[torch.float32], compute)
    assert step.health.sums.take()["skipped"] == 2
    run_step(step, images, labels)
    assert not torch.equal(arenas.master, before)
    assert arenas.master.isfinite().all()
    assert step.health.skips.most_in_a_row() == 2


def test_layerwise_radii_perturb_every_layer_by_its_own_share() -> None:
    model = build()
    step, arenas = make_step(model, None)
    step.sam = SAMConfig(rho=0.1, layerwise=True)
    step.relative_radius = True
    images, labels = images_and_labels()
    step.differentiate([model.prefix(images, step.cut)], [Targets.alike(labels)])
    step.ascend()
    for layer, names in model.layers.items():
        moved = [model.network.get_parameter(n) - arenas.view(n, arenas.master) for n in names]
        sizes = [arenas.view(n, arenas.master) for n in names]
        distance = torch.cat([t.flatten() for t in moved]).norm()
        length = torch.cat([t.flatten() for t in sizes]).norm()
        assert float(distance / length) == pytest.approx(0.1, rel=1e-3), layer


def test_the_guard_against_host_syncs_notices_one() -> None:
    with forbidding_host_syncs(), pytest.raises(AssertionError, match="a host sync"):
        torch.ones(()).item()


@pytest.mark.parametrize("objective", ["pgd-at", "trades", "mart"])
@pytest.mark.parametrize("micro_batch", ["auto", 3])
def test_images_that_fill_a_batch_up_change_nothing(objective: str, micro_batch: Any) -> None:
    images, labels = images_and_labels()
    num_images = len(labels) - 2
    weights = torch.tensor([1 / num_images] * num_images + [0.0] * 2)
    results = []
    for targets in (Targets.alike(labels[:num_images]), Targets(labels, weights)):
        settings: dict[str, Any] = {"objective": objective}
        settings["micro_batch"] = MicroBatch(size=micro_batch)
        step, arenas = make_step(build(), ["blocks.2.mlp.fc1", "head"], **settings)
        step.attack.steps = 0  # random starts depend on how many there are
        step(images[: len(targets.labels)], targets, torch.tensor(0.0), torch.tensor(0.0))
        results.append((arenas.master.clone(), step.health.sums.take()))
    (weights_alone, sums_alone), (weights_padded, sums_padded) = results
    torch.testing.assert_close(weights_padded, weights_alone)
    assert sums_padded == pytest.approx(sums_alone, rel=1e-5)
    assert sums_padded["images"] == num_images


def test_mixed_labels_are_learned_and_counted_by_their_larger_part() -> None:
    images, labels = images_and_labels()
    step, arenas = make_step(build(), ["head"])
    other, other_arenas = make_step(build(), ["head"])
    mixed = torch.nn.functional.one_hot(labels, 10).float() * 0.7
    mixed += torch.nn.functional.one_hot((labels + 1) % 10, 10).float() * 0.3
    run_step(step, images, mixed)
    run_step(other, images, labels)
    assert not torch.equal(arenas.master, other_arenas.master)
    assert step.health.sums.take()["images"] == len(labels)
    logits = torch.nn.functional.one_hot(labels, 10)
    assert int(Targets.alike(mixed).num_right(logits)) == len(labels)


def test_a_batch_that_counts_for_nothing_teaches_nothing() -> None:
    images, labels = images_and_labels()
    optim = OptimConfig(name="sgd", weight_decay=0.0)
    step, arenas = make_step(build(), ["head"], optim=optim)
    before = arenas.master.clone()
    step(
        images,
        Targets(labels, torch.zeros(len(labels))),
        torch.tensor(EPSILON),
        torch.tensor(STEP_SIZE),
    )
    sums = step.health.sums.take()
    assert (sums["images"], sums["loss"], sums["skipped"]) == (0, 0, 0)
    assert torch.equal(arenas.master, before)
