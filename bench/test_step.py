"""Whole steps under pytest-benchmark: python -m pytest bench/test_step.py."""

from typing import Any

import pytest
import torch

from safer_fast.attacks.pgd import random_start
from safer_fast.models.robust_model import compile_blocks
from safer_fast.runtime.cuda_graphs import WARM_UP, CudaRecorder, Replays
from safer_fast.training.objectives import Targets
from tests.support.networks import build, images_and_labels
from tests.training.test_step import EPSILON, STEP_SIZE, make_reference, make_step

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = ["blocks.2.mlp.fc1"]
NUM_IMAGES = 32
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


@pytest.mark.parametrize(
    "kind",
    [
        "eager",
        pytest.param("compiled", marks=needs_gpu),
        pytest.param("captured", marks=needs_gpu),
    ],
)
def test_step(benchmark: Any, kind: str) -> None:
    model = build(compute_dtype=torch.bfloat16).to(DEVICE)
    replays = Replays(CudaRecorder(torch.device(DEVICE)) if kind == "captured" else None)
    generator = torch.Generator(DEVICE).manual_seed(5)
    step, _ = make_step(model, LAYERS, generator=generator, replays=replays)
    if kind != "eager":
        compile_blocks(model)
    images, labels = (tensor.to(DEVICE) for tensor in images_and_labels(NUM_IMAGES))
    epsilon, step_size = (torch.tensor(r, device=DEVICE) for r in (EPSILON, STEP_SIZE))

    def run() -> None:
        step(images, Targets.alike(labels), epsilon, step_size)
        _wait()

    benchmark.pedantic(run, rounds=20, warmup_rounds=WARM_UP + 1)
    assert ("update",) in replays.recorded or kind != "captured"


def test_reference(benchmark: Any) -> None:
    model = build().to(DEVICE)
    reference = make_reference(model, LAYERS, torch.float32, torch.bfloat16)
    images, labels = (tensor.to(DEVICE) for tensor in images_and_labels(NUM_IMAGES))
    epsilon = torch.tensor(EPSILON, device=DEVICE)

    def run() -> None:
        reference(images, labels, random_start(images, epsilon))
        _wait()

    benchmark.pedantic(run, rounds=20, warmup_rounds=WARM_UP + 1)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
