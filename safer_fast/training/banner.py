"""What a run says of itself: its machine, model and data at the start, a line for every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from safer_fast import __version__
from safer_fast.config.schema import Config
from safer_fast.data import Data, describe_subset
from safer_fast.evaluation.overfitting import AttackGap
from safer_fast.training.engine import Engine
from safer_fast.training.schedule import weaknesses

MOST_WAIT = 0.1
"""Share of an epoch's time above which its line says that it waited for data."""


def describe_run(config: Config, engine: Engine, data: Data) -> dict[str, Any]:
    """Facts by name; `notes` is a list with one line for every fast path that is not live."""
    runtime, model = engine.runtime, engine.model
    device = "CPU"
    if runtime.device.type == "cuda":
        device = torch.cuda.get_device_name(runtime.device)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    num_test = 0 if data.test is None else data.test.num_images
    largest = -(-data.train.num_images // len(data.train))  # of all ranks together
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
    return {
        "safer_fast": __version__,
        "torch": torch.__version__,
        "timm": version("timm"),
        "device": f"{runtime.device.type} ({device}, {torch.get_num_threads()} threads)",
        "precision": "bf16 matrices, fp32 masters" if config.amp == "bf16" else "fp32",
        "model": f"{config.model.name}, {num_weights:,} weights, {len(model.layers)} layers",
        "speed": _speed(engine),
        "data": f"{data.name}, {data.num_classes} classes, {data.train.num_images} training, "
        f"{data.validation.num_images} validation, {num_test} test images of "
        f"{data.num_channels}x{data.image_size}x{data.image_size}; "
        f"{len(data.train)} batches of {largest} by {data.train.backend}",
        **validation,
        "notes": notes,
    }


def _speed(engine: Engine) -> str:
    """What makes the step fast here."""
    ways = ["compiled blocks"] if engine.runtime.is_compiled else []
    ways += ["CUDA graphs"] if engine.runtime.is_captured else []
    if engine.attention is not None:
        times = engine.attention.times_ms
        measured = ", ".join(f"{name} {value:.3g} ms" for name, value in times.items())
        ways.append(f"{engine.attention.backend} attention" + (f" ({measured})" if times else ""))
    if engine.float8 is not None:
        ways.append(str(engine.float8))
    return ", ".join(ways) or "as written"


def banner(facts: Mapping[str, Any]) -> str:
    """The facts as lines of text."""
    lines = [f"{name + ':':<11} {value}" for name, value in facts.items() if name != "notes"]
    return "\n".join([*lines, *(f"note:       {note}" for note in facts["notes"])])


def epoch_line(
    epoch: int,
    epochs: int,
    stage: str,
    figures: Mapping[str, float],
    accuracies: Mapping[str, Any],
    gap: AttackGap | None = None,
) -> str:
    """One line on an epoch: training figures, and validation accuracies where they were taken."""
    validation = ""
    if accuracies["clean_accuracy"] is not None:
        validation = (
            f"  validation clean {accuracies['clean_accuracy']:.3f} "
            f"robust {accuracies['robust_accuracy']:.3f}"
        )
    return (
        f"epoch {epoch:>3}/{epochs} {stage:<7}  loss {figures['train_loss']:.4f}  "
        f"train robust {figures['train_robust_accuracy']:.3f}{validation}  "
        f"epsilon {figures['epsilon']:.4f}  lr {figures['learning_rate']:.2e}  "
        f"{figures['images_per_second']:.0f} images/s{_trouble(figures, accuracies, gap)}"
    )


def gap_figures(gap: AttackGap | None) -> dict[str, Any]:
    """What an epoch's event says of catastrophic overfitting, null where it was not looked for."""
    return {
        "training_attack_accuracy": None if gap is None else gap.training_attack_accuracy,
        "pgd_20_accuracy": None if gap is None else gap.pgd_20_accuracy,
        "catastrophic_overfitting": None if gap is None else gap.is_catastrophic,
    }


def _trouble(
    figures: Mapping[str, float], accuracies: Mapping[str, Any], gap: AttackGap | None
) -> str:
    """What is wrong with an epoch or its data, if anything is."""
    found = ""
    if accuracies["num_not_finite"]:
        found += f"  LOGITS NOT FINITE on {accuracies['num_not_finite']} validation images"
    if accuracies["gradient_masking"]:
        found += f"  GRADIENT MASKING suspected ({'; '.join(accuracies['gradient_masking'])})"
    if gap is not None and gap.is_catastrophic:
        found += (
            f"  CATASTROPHIC OVERFITTING (training images: {gap.training_attack_accuracy:.3f} "
            f"under the training attack, {gap.pgd_20_accuracy:.3f} under PGD-20)"
        )
    if figures["data_wait_fraction"] > MOST_WAIT:
        found += f"  waited {figures['data_wait_fraction']:.0%} for data (data.num_workers?)"
    if figures["skipped_images"]:
        found += f"  {figures['skipped_images']:.0f} images left out"
    return found
