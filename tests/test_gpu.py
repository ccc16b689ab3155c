"""What only a GPU can show: the step there is the textbook step, compiled or not, and repeats."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safer_fast import train_model
from safer_fast.attack import random_start
from safer_fast.command_line import parse_config
from safer_fast.metrics import read_metrics
from safer_fast.parameters import ParameterArenas
from safer_fast.reference import PlainModel
from safer_fast.runtime import compile_blocks

from .networks import build, images_and_labels
from .test_step import EPSILON, STEP_SIZE, error, make_reference, make_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LAYERS = ["blocks.2.mlp.fc1", "blocks.3.attn.qkv"]


def run_steps(dtype: torch.dtype, num_steps: int, is_compiled: bool) -> dict[str, torch.Tensor]:
    """Masters on the CPU after some steps over several selections on the GPU."""
    model = build(compute_dtype=dtype).cuda()
    step, arenas = make_step(model, LAYERS, generator=torch.Generator("cuda").manual_seed(5))
    if is_compiled:
        compile_blocks(model)
    images, labels = (tensor.cuda() for tensor in images_and_labels())
    epsilon, step_size = (torch.tensor(r, device="cuda") for r in (EPSILON, STEP_SIZE))
    for _ in range(num_steps):
        step(images, labels, epsilon, step_size)
    return {name: tensor.cpu() for name, tensor in arenas.state_dict().items()}


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_as_near_to_fp64_as_textbook_pytorch(
    dtype: torch.dtype, is_compiled: bool
) -> None:
    model = build().cuda()
    begin = {n: p.detach().cpu().clone() for n, p in model.network.named_parameters()}
    images, labels = (tensor.cuda() for tensor in images_and_labels())
    autocast = torch.bfloat16 if dtype == torch.bfloat16 else None
    updates = []
    generator = torch.Generator("cuda").manual_seed(5)
    start = random_start(images, torch.tensor(EPSILON, device="cuda"), "linf", generator)
    for precision, cast in ((torch.float64, None), (torch.float32, autocast)):
        reference = make_reference(model, LAYERS, precision, cast)
        reference(images.to(precision), labels, start.to(precision))
        named = reference.model.network.named_parameters()
        updates.append({n: p.detach().cpu() for n, p in named})
    truth, plain = updates
    ours = run_steps(dtype, 1, is_compiled)
    assert error(ours, truth, begin) <= max(3 * error(plain, truth, begin), 1e-3)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_ten_steps_are_bit_identical_every_time(is_compiled: bool) -> None:
    first, second = (run_steps(torch.bfloat16, 10, is_compiled) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_bf16_weights_equal_autocast_bit_for_bit_on_a_gpu() -> None:
    model = build().cuda()
    autocast = PlainModel(model, torch.float32, torch.bfloat16)
    ParameterArenas(model.network, model.layers, torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    images = images_and_labels()[0].cuda()
    assert torch.equal(model(images), autocast(images))


def test_memory_is_stable_over_two_hundred_steps() -> None:
    model = build(compute_dtype=torch.bfloat16).cuda()
    step, _ = make_step(model, LAYERS, generator=torch.Generator("cuda").manual_seed(5))
    images, labels = (tensor.cuda() for tensor in images_and_labels())
    epsilon, step_size = (torch.tensor(r, device="cuda") for r in (EPSILON, STEP_SIZE))
    sizes = []
    for index in range(220):
        step(images, labels, epsilon, step_size)
        if index >= 20:
            sizes.append(torch.cuda.memory_allocated())
    assert len(set(sizes)) == 1


def test_a_whole_run_trains_on_the_gpu(tmp_path: Path) -> None:
    config = parse_config(
        [
            "--amp=bf16",
            "--epochs=22",
            "--selection.warmup_epochs=20",
            "--attack.epsilon_warmup_epochs=5",
            "--runtime.compile=off",
            f"--output={tmp_path / 'run'}",
        ]
    )
    folder = train_model(config)
    epochs = [e for e in read_metrics(folder / "metrics.jsonl") if e["event"] == "epoch"]
    assert max(event["clean_accuracy"] for event in epochs) > 0.8
    assert all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())
