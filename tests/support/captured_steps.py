"""Steps of training on the GPU that is not there, as a program: a line of JSON for each case.

It takes the path of training images and names of cases. No value that it computes means anything.
"""

import gc
import json
import sys
from typing import Any
from unittest.mock import patch

import torch

from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import ModelConfig
from safer_fast.data import load_data
from safer_fast.models.build import build_model
from safer_fast.runtime.cuda_graphs import CudaRecorder, Replays
from safer_fast.runtime.device import prepare_runtime
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.training.engine import Engine
from safer_fast.training.learner import Learner
from safer_fast.training.objectives import Targets
from safer_fast.training.schedule import RunPlan
from tests.support.fake_gpu import FakeGpu
from tests.support.networks import FAMILIES
from tests.support.steps import make_step

NUM_STEPS = 7
BATCH_SIZE = 8
VIT = "vit_tiny_patch16_224"
SWIN = "swin_tiny_patch4_window7_224"
FLAGS = [
    f"--batch-size={BATCH_SIZE}",
    "--amp=bf16",
    "--selection.warmup_epochs=0",
    "--attack.steps=3",
    "--attack.clean_epochs=0",
    "--attack.epsilon_warmup_epochs=0",
    "--data.backend=device",
    "--runtime.cuda_graph=on",
    "--runtime.compile=off",
    "--runtime.attention=flash",
    "--runtime.num_threads=1",
]
SETTINGS: dict[str, list[str]] = {
    "sgd": ["--optim.name=sgd"],
    "adamw, clipped": ["--optim.name=adamw", "--optim.clip_norm=0.01"],
    "muon, clipped": ["--optim.name=muon", "--optim.clip_norm=0.01"],
    "muon, low-rank factors": ["--optim.name=muon", "--selection.lora_rank=4"],
    "trades": ["--objective.name=trades"],
    "fare": ["--objective.name=fare"],
    "fare, fp8 attack": [
        "--objective.name=fare",
        "--attack.precision=fp8",
        "--attack.fp8_from=1",
    ],
    "mart, l2": ["--objective.name=mart", "--attack.norm=l2", "--attack.epsilon=0.5"],
    "apgd": ["--attack.name=apgd"],
    "apgd, trades": ["--attack.name=apgd", "--objective.name=trades"],
    "apgd, l2, margin": [
        "--attack.name=apgd",
        "--attack.norm=l2",
        "--attack.epsilon=0.5",
        "--attack.loss=margin",
    ],
    "asam": ["--sam.adaptive=true"],
    "layer-wise sam": ["--sam.layerwise=true"],
    "micro-batches": ["--runtime.attack_micro_batch=4", "--runtime.train_micro_batch=2"],
    "growing images": ["--data.resolution_schedule=16@0.5,32", "--epochs=2"],
    "drop path": ["--model.drop_path_rate=0.3"],
    "low-rank factors": ["--selection.lora_rank=4"],
    "factors and magnitudes": ["--selection.lora_rank=4", "--selection.adapter=dora"],
    "mixing": ["--data.mixup=0.2", "--data.cutmix=1", "--objective.label_smoothing=0.1"],
    "average": ["--optim.ema_decay=0.9"],
    "bf16 attack": ["--attack.precision=bf16"],
    "fp8 attack": ["--attack.precision=fp8", "--attack.fp8_from=1"],
    "fp32": ["--amp=off"],
    "no savings": ["--runtime.exact_savings=[]"],
    "everything": ["--selection.criterion=all"],
    "compiled": ["--runtime.compile=on"],
    "compiled, magnitudes": [
        "--runtime.compile=on",
        "--selection.lora_rank=4",
        "--selection.adapter=dora",
    ],
    "compiled, fp8": ["--runtime.compile=on", "--attack.precision=fp8", "--attack.fp8_from=1"],
}
"""Flags by the name of a case."""
MEMORY = {"40 GiB": 40, "80 GiB": 80, "139 GiB": 139}
"""GiB of the GPU by the name of a case: ViT-L with 1024 images, all but two blocks trained."""
NUM_LARGE = 1024


def flags_of(name: str) -> list[str]:
    """All flags of a case: a family of networks, or settings of a ViT."""
    family = name if name in FAMILIES else VIT
    patch_size = 2 if family == SWIN else 8
    layers = "layers.2.blocks.1.mlp.fc1" if family == SWIN else "blocks.2.mlp.fc1,blocks.2.attn.qkv"
    model = [f"--model.name={family}", f"--model.patch_size={patch_size}"]
    model.append(f"--model.arguments={json.dumps(FAMILIES[family])}")
    settings = SETTINGS.get(name, [])
    chosen = [] if "--selection.criterion=all" in settings else [f"--selection.layers={layers}"]
    return [*FLAGS, *model, *chosen, *settings]


def run_case(gpu: FakeGpu, name: str, images: str) -> dict[str, Any]:
    """Take steps; what was recorded, refused and broken, and the counts of the last two steps."""
    config = parse_config([*flags_of(name), f"--data.path={images}"])
    runtime = prepare_runtime(config.runtime, config.amp)
    data = load_data(
        config.data, batch_size=BATCH_SIZE, seed=0, device=runtime.device, report=lambda _: None
    )
    before = gpu.counts()["violations"]
    lines: list[str] = []
    engine = Engine(config, runtime, data)
    engine.replays._report = lines.append
    learner = Learner(config, engine, data)
    stage = RunPlan(config).stage_of(1)
    names = None if config.selection.layers is None else list(config.selection.layers)
    with patch.object(torch.Tensor, "__lt__", lambda *_: False):  # SGD refuses a rate below zero
        learner.train_layers(names or list(engine.model.layers), stage)
    learner.start_average()
    [batch, *_] = data.train.epoch(1, 0)
    steps, num_recorded = [], []
    for epoch in (1, 2) if learner.resolution.parts else (1,):
        for index in range(NUM_STEPS):
            start = gpu.counts()
            learner.take_step(stage, epoch, index, NUM_STEPS, batch, index + 1)
            steps.append({key: value - start[key] for key, value in gpu.counts().items()})
        num_recorded.append(len(engine.replays.recorded))
    return {
        "case": name,
        "recorded": sorted({str(key[0]) for key in engine.replays.recorded}),
        "num_recorded": num_recorded,
        "refused": lines,
        "precision": engine.precision,
        "violations": gpu.counts()["violations"] - before,
        "last_violation": gpu.last_violation(),
        "steps": steps[-2:],
    }


def run_large(gpu: FakeGpu, name: str) -> dict[str, Any]:
    """Take steps with ViT-L; the images at a time in the end, and the most memory reserved."""
    device, lines = torch.device("cuda"), list[str]()
    gpu.set_memory(MEMORY[name])
    torch.cuda.reset_peak_memory_stats()
    replays = Replays(CudaRecorder(device), lines.append)
    with torch.device("meta"):  # no weights are drawn
        sizes: Any = {"num_classes": 1000, "image_size": 224, "compute_dtype": torch.bfloat16}
        model = build_model(ModelConfig(name="vit_large_patch16_224"), **sizes)
    model.enable_savings(("patch-order", "class-token"), 224)
    model.to_empty(device=device)
    attacked, trained = (MicroBatch(release=replays.forget, report=lines.append) for _ in range(2))
    settings: Any = {"micro_batch": trained, "replays": replays}
    with patch.object(torch.Tensor, "__lt__", lambda *_: False):
        step, _ = make_step(
            model, ["blocks.2.mlp.fc1"], generator=torch.Generator(device), **settings
        )
    step.attack.micro_batch = attacked
    images = torch.empty(NUM_LARGE, 3, 224, 224, device=device)
    targets = Targets.alike(torch.empty(NUM_LARGE, dtype=torch.int64, device=device))
    radii = torch.empty(2, device=device).unbind()
    for _ in range(NUM_STEPS):
        step(images, targets, *radii)
    return {
        "case": name,
        "recorded": sorted({str(key[0]) for key in replays.recorded}),
        "attacked": attacked.size or NUM_LARGE,
        "trained": trained.size or NUM_LARGE,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def without_libraries() -> None:
    """Switch off cuDNN, which the fake GPU has none of."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def main(images: str, *names: str) -> None:
    """Take the steps of these cases, one case after the other."""
    without_libraries()
    gpu = FakeGpu()
    for name in names:
        line = run_large(gpu, name) if name in MEMORY else run_case(gpu, name, images)
        print(json.dumps(line), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
