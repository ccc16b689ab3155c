"""Checks that need a GPU: the step is the textbook step, however it is run, and repeats."""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safer_fast import evaluate_run, train_model
from safer_fast.attacks.pgd import random_start
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import EvaluateConfig
from safer_fast.config.schema import Names, OptimConfig
from safer_fast.data import Batch, prefetch_to_device
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.robust_model import compile_blocks
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime.cuda_graphs import CudaRecorder, Replays
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.training.objectives import Targets
from safer_fast.training.optimizers import build_optimizer, set_learning_rate
from safer_fast.training.reference import PlainModel
from safer_fast.training.step import RECORDED, Step
from tests.support.networks import build, images_and_labels
from tests.support.small_runs import SMALL
from tests.support.steps import EPSILON, STEP_SIZE, error, make_reference, make_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WITH_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="no peft here")
LAYERS = ["blocks.2.mlp.fc1", "blocks.3.attn.qkv"]
MODES = ("eager", "compiled", "captured", "compiled and captured")
SAVINGS = ("patch-order", "class-token", "prefix", "stored-bf16")
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def deterministic_algorithms() -> Iterator[None]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def make(mode: str, dtype: torch.dtype, **settings: Any) -> tuple[Step, ParameterArenas]:
    """The fast step on the GPU, with everything that makes it fast."""
    model = build(compute_dtype=dtype)
    model.enable_savings(SAVINGS, 32)
    model.cuda()
    recorder = CudaRecorder(torch.device("cuda")) if "captured" in mode else None
    if "compiled" in mode:
        compile_blocks(model)
    return make_step(
        model,
        LAYERS,
        generator=torch.Generator("cuda").manual_seed(5),
        replays=Replays(recorder, pytest.fail),
        **settings,
    )


def run_steps(mode: str, dtype: torch.dtype, num_steps: int, **settings: Any) -> Weights:
    """Masters on the CPU after steps whose images, radii and learning rate all differ."""
    step, arenas = make(mode, dtype, **settings)
    for index in range(num_steps):
        images, labels = (tensor.cuda() for tensor in images_and_labels(seed=1 + index))
        set_learning_rate(step.optimizer, 1e-2 / (1 + index))
        epsilon, step_size = (
            torch.tensor(r / (1 + 0.1 * index), device="cuda") for r in (EPSILON, STEP_SIZE)
        )
        step(images, Targets.alike(labels), epsilon, step_size)
    if "captured" in mode and num_steps > 3:
        assert {key[0] for key in step.replays.recorded} == {"attack", *RECORDED}
    return {name: tensor.cpu() for name, tensor in arenas.state_dict().items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_as_near_to_fp64_as_textbook_pytorch(dtype: torch.dtype, mode: str) -> None:
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
    ours = run_steps(mode, dtype, 1)
    assert error(ours, truth, begin) <= max(3 * error(plain, truth, begin), 1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": OptimConfig(learning_rate=1e-3), "clip_norm": 0.01},
        {"objective": "trades"},
        {"objective": "mart", "norm": "l2"},
        {"attack_micro_batch": 4, "micro_batch": MicroBatch(size=2)},
    ],
    ids=["plain", "clipped", "trades", "mart-l2", "micro-batches"],
)
def test_captured_steps_equal_eager_ones_bit_for_bit(settings: dict[str, Any]) -> None:
    eager = run_steps("eager", torch.bfloat16, 8, **settings)
    captured = run_steps("captured", torch.bfloat16, 8, **settings)
    assert all(torch.equal(eager[name], captured[name]) for name in eager)


def test_captured_compiled_steps_equal_compiled_ones_bit_for_bit() -> None:
    compiled = run_steps("compiled", torch.bfloat16, 8)
    captured = run_steps("compiled and captured", torch.bfloat16, 8)
    assert all(torch.equal(compiled[name], captured[name]) for name in compiled)


@pytest.mark.parametrize("mode", MODES)
def test_ten_steps_are_bit_identical_every_time(mode: str) -> None:
    first, second = (run_steps(mode, torch.bfloat16, 10) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_new_selection_captures_the_passes_again_and_keeps_the_attack() -> None:
    results = []
    for mode in ("eager", "captured"):
        step, arenas = make(mode, torch.bfloat16)
        for layers in (LAYERS, ["blocks.1.attn.proj"], ["head", "blocks.3.mlp.fc2"]):
            step.selection = arenas.select(layers)
            step.optimizer = build_optimizer(OptimConfig(learning_rate=1e-3), step.selection)
            step.__post_init__()
            for seed in range(6):
                images, labels = (tensor.cuda() for tensor in images_and_labels(seed=seed))
                radii = (torch.tensor(r, device="cuda") for r in (EPSILON, STEP_SIZE))
                step(images, Targets.alike(labels), *radii)
        results.append(arenas.master.cpu())
    assert torch.equal(*results)
    assert len([key for key in step.replays.recorded if key[0] == "attack"]) == 1


def test_frozen_bf16_weights_equal_autocast_bit_for_bit_on_a_gpu() -> None:
    model = build().cuda()
    autocast = PlainModel(model, torch.float32, torch.bfloat16)
    ParameterArenas(model.network, model.layers, torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    images = images_and_labels()[0].cuda()
    assert torch.equal(model(images), autocast(images))


@pytest.mark.parametrize("mode", ["eager", "compiled and captured"])
def test_memory_is_stable_over_two_hundred_steps(mode: str) -> None:
    step, _ = make(mode, torch.bfloat16)
    images, labels = (tensor.cuda() for tensor in images_and_labels())
    epsilon, step_size = (torch.tensor(r, device="cuda") for r in (EPSILON, STEP_SIZE))
    held, reserved = [], []
    for index in range(220):
        step(images, Targets.alike(labels), epsilon, step_size)
        if index >= 20:
            held.append(torch.cuda.memory_allocated())
            reserved.append(torch.cuda.memory_reserved())
    assert len(set(held)) == 1
    assert len(set(reserved)) == 1


def test_a_step_asks_the_device_for_nothing_while_it_runs() -> None:
    step, _ = make("eager", torch.bfloat16, optim=OptimConfig(), clip_norm=1.0)
    images, labels = (tensor.cuda() for tensor in images_and_labels())
    epsilon, step_size = (torch.tensor(r, device="cuda") for r in (EPSILON, STEP_SIZE))
    step(images, Targets.alike(labels), epsilon, step_size)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(images, Targets.alike(labels), epsilon, step_size)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_graphs_is_given_back_when_all_are_dropped_and_capturing_goes_on() -> None:
    device = torch.device("cuda")
    replays = Replays(CudaRecorder(device), pytest.fail)
    result = torch.zeros(2**22, device=device)

    def work() -> None:
        result.copy_(torch.ones(2**22, device=device) * 2)

    for _ in range(2):
        for _ in range(5):
            replays(("work",), work)
        assert replays.recorded
        held = torch.cuda.memory_reserved()
        replays.forget()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < held
    assert float(result.sum()) == 2 * 2**22


def test_a_phase_that_waits_for_the_device_is_not_captured_and_the_next_one_is() -> None:
    lines: list[str] = []
    replays = Replays(CudaRecorder(torch.device("cuda")), lines.append)
    total = torch.zeros((), device="cuda")

    def waits() -> None:
        total.add_(float(total) * 0 + 1)

    def adds() -> None:
        total.add_(1)

    phases: list[tuple[str, Callable[[], None]]] = [("waits", waits), ("adds", adds)]
    for name, phase in phases:
        for _ in range(6):
            replays((name,), phase)
    assert float(total) == 12
    assert [key[0] for key in replays.recorded] == ["adds"]
    assert len(lines) == 1
    assert lines[0].startswith("CUDA graph of waits: off (")


def test_a_step_survives_a_gpu_that_runs_out_of_memory() -> None:
    step, _ = make("captured", torch.bfloat16)
    images, labels = (tensor.cuda().repeat_interleave(64, 0) for tensor in images_and_labels())
    radii = tuple(torch.tensor(r, device="cuda") for r in (EPSILON, STEP_SIZE))
    lines: list[str] = []
    for flag in ("attack", "train"):
        micro_batch = MicroBatch(flag, "auto", step.replays.forget, lines.append)
        if flag == "attack":
            step.attack.micro_batch = micro_batch
        else:
            step.micro_batch = micro_batch
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 48 * 2**20) / total)
    try:
        for _ in range(6):
            step(images, Targets.alike(labels), *radii)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert lines
    assert step.health.sums.take()["images"] == 6 * len(labels)


def test_batches_are_copied_ahead_in_order_and_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch(
            torch.randint(256, (64, 3, 64, 64), generator=generator, dtype=torch.uint8),
            torch.full((64,), index),
        )
        for index in range(20)
    ]
    for index, batch in enumerate(prefetch_to_device(batches, torch.device("cuda"))):
        assert torch.equal(batch.images.cpu(), batches[index].images)
        assert torch.equal(batch.labels.cpu(), batches[index].labels)
    assert index == 19


@pytest.mark.parametrize("flags", [["--runtime.compile=off"], ["--runtime.compile=on"]])
def test_a_whole_run_trains_on_the_gpu(flags: list[str], tmp_path: Path) -> None:
    config = parse_config(
        [
            "--amp=bf16",
            "--epochs=22",
            "--selection.warmup_epochs=20",
            "--attack.epsilon_warmup_epochs=5",
            "--runtime.cuda_graph=on",
            f"--output={tmp_path / 'run'}",
            *flags,
        ]
    )
    folder = train_model(config)
    epochs = [e for e in read_metrics(folder / "metrics.jsonl") if e["event"] == "epoch"]
    assert max(event["clean_accuracy"] for event in epochs) > 0.8
    assert all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())


def test_captured_steps_notice_about_themselves_what_eager_ones_do() -> None:
    found = []
    for mode in ("eager", "captured"):
        step, _ = make(mode, torch.float32)
        for index in range(7):
            images, labels = (tensor.cuda() for tensor in images_and_labels(seed=1 + index))
            radii = (torch.tensor(radius, device="cuda") for radius in (EPSILON, STEP_SIZE))
            step(images, Targets.alike(labels), *radii)
        found.append(step.health.sums.take())
        assert set(step.timer.take()) == {"attack", "ascent", "descent", "update"}
    assert found[0] == found[1]
    assert found[0]["attacked"] == 7 * len(labels)


def test_a_captured_evaluation_gives_the_figures_of_an_eager_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_model(parse_config([*SMALL, "--runtime.cuda_graph=on", f"--output={folder}"]))
    attacks = Names(["clean", "fgsm", "pgd-5", "cw-5", "apgd-ce"])
    config = EvaluateConfig(run=str(folder), attacks=attacks, num_images=96, fresh=True)
    captured = evaluate_run(config)
    settings = (folder / "run.yaml").read_text()
    assert "cuda_graph: 'on'" in settings
    (folder / "run.yaml").write_text(settings.replace("cuda_graph: 'on'", "cuda_graph: 'off'"))
    assert evaluate_run(config) == captured


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--selection.lora_rank=4"], id="factors", marks=WITH_PEFT),
        pytest.param(
            ["--selection.lora_rank=4", "--selection.adapter=dora"],
            id="factors and magnitudes",
            marks=WITH_PEFT,
        ),
        pytest.param(["--attack.name=apgd", "--attack.steps=3"], id="Auto-PGD"),
        pytest.param(["--attack.loss=margin"], id="margin"),
        pytest.param(["--data.resolution_schedule=4@0.5,8"], id="growing images"),
    ],
)
def test_runs_from_recordings_train_the_weights_of_eager_ones(
    flags: list[str], tmp_path: Path
) -> None:
    results = []
    for mode in ("on", "off"):
        folder = tmp_path / mode
        own = [*flags, f"--runtime.cuda_graph={mode}", f"--output={folder}"]
        train_model(parse_config([*SMALL, "--amp=bf16", "--epochs=6", *own]))
        results.append(load_file(folder / "model.safetensors"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
