"""Introduction of a run: its machine, model, data, and lines on what is off, as text."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from safer_fast import __version__
from safer_fast.config.resolution import Resolution
from safer_fast.config.schema import AttackConfig, Config
from safer_fast.data import Data, describe_subset
from safer_fast.training.engine import Engine
from safer_fast.training.schedule import weaknesses


def describe_run(config: Config, engine: Engine, data: Data) -> dict[str, Any]:
    """Describe machine, model and data by name; `notes` has lines on what is off or odd."""
    runtime, model = engine.runtime, engine.model
    device = "CPU"
    if runtime.device.type == "cuda":
        device = torch.cuda.get_device_name(runtime.device)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    num_test = 0 if data.test is None else data.test.num_images
    largest = -(-data.train.images_per_epoch // len(data.train))  # over all ranks
    notes = [*engine.notes, *data.notes, *weaknesses(config)]
    if data.bad.num_different:
        count = data.bad.num_different
        notes.append(f"data: unreadable images or shards left out at the start: {count}")
    if model.num_blocks == 0:
        notes.append(f"prefix reuse: off ({config.model.name} cannot be cut into blocks)")
    limit, of_images = config.evaluation.max_images, data.validation.num_images
    validation = {}
    if limit is not None and limit < of_images:
        validation["validation"] = describe_subset(limit, of_images)
    limit, of_images = config.evaluation.final_images, (data.test or data.validation).num_images
    if limit is not None and limit < of_images:
        validation["final"] = f"figures of {describe_subset(limit, of_images)}"
    resolution = Resolution.of(config)
    if resolution.parts:
        validation["resolution"] = f"{resolution}, in training"
    for size in resolution.unused:
        share = f"{size} pixels have a share of less than one of {config.epochs} epochs"
        notes.append(f"data.resolution_schedule: {share}, and none is trained on them")
    num_images = f"{data.train.num_images} training{_extra(data)}"
    return {
        "safer_fast": __version__,
        "torch": torch.__version__,
        "timm": version("timm"),
        "device": f"{runtime.device.type} ({device}, {torch.get_num_threads()} threads)",
        "precision": _precision(config, runtime.device.type == "cuda"),
        "model": f"{config.model.name}, {num_weights:,} weights, {len(model.layers)} layers",
        "speed": _speed(engine),
        "data": f"{data.name}, {data.classes}, {num_images}, "
        f"{data.validation.num_images} validation, {num_test} test images of "
        f"{data.num_channels}x{data.image_size}x{data.image_size}; "
        f"{len(data.train)} batches of {largest} by {data.train.backend}",
        **validation,
        "attack": _attack(config.attack),
        "notes": notes,
    }


def _extra(data: Data) -> str:
    """Number and share of extra images, for the words on training images."""
    if not data.num_extra:
        return ""
    share = 1 - data.train.num_images / data.train.images_per_epoch
    return f" (and {data.num_extra} extra, {share:.0%} of each batch)"


def _attack(config: AttackConfig) -> str:
    """Describe the training attack: its ball, and its iterations."""
    if config.is_none:
        return "none, clean training"
    ball = f"{config.norm}, epsilon {float(config.epsilon):.4g}"
    if config.loss != "objective":
        ball += f", raising the {config.loss}"
    if config.steps != "auto":
        return f"{config.named(config.steps)}, {ball}"
    return (
        f"PGD of at most {config.max_steps} steps, as few as reach {config.strength:g} of PGD-20's "
        f"loss, {ball}"
    )


def _precision(config: Config, is_on_gpu: bool) -> str:
    """Name the precision of matrix products."""
    if config.amp == "bf16":
        return "bf16 matrices, fp32 masters"
    return "fp32, products in TF32" if is_on_gpu and config.runtime.tf32 else "fp32"


def _speed(engine: Engine) -> str:
    """Name the fast paths that a step takes on this machine."""
    ways = ["compiled blocks"] if engine.runtime.is_compiled else []
    ways += ["CUDA graphs"] if engine.runtime.is_captured else []
    if engine.attention is not None:
        times = engine.attention.times_ms
        measured = ", ".join(f"{name} {value:.3g} ms" for name, value in times.items())
        ways.append(f"{engine.attention.backend} attention" + (f" ({measured})" if times else ""))
    if engine.float8 is not None:
        attack = engine.config.attack
        chosen = "attack.precision auto, " if attack.precision == "auto" else ""
        ways.append(f"{engine.float8} ({chosen}audited every {attack.audit_every} steps)")
    return ", ".join(ways) or "as written"


def banner(description: Mapping[str, Any]) -> str:
    """Format the description of a run as lines of text."""
    lines = [f"{name + ':':<11} {value}" for name, value in description.items() if name != "notes"]
    return "\n".join([*lines, *(f"note:       {note}" for note in description["notes"])])
