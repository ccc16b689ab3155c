"""Our step as benchmarks take it: on random images and weights, whole and in stages."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch
from torch import Tensor

from bench.implementation import Implementation
from bench.measure import Run
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.schema import ModelConfig, ObjectiveConfig, OptimConfig, SAMConfig
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.build import freeze, prepare
from safer_fast.models.flops import ideal_flops
from safer_fast.models.robust_model import RobustModel, compile_blocks
from safer_fast.runtime.cuda_graphs import Buffers, Phase, Recorder, Replays
from safer_fast.runtime.device import Runtime
from safer_fast.selection.candidates import match_layers
from safer_fast.training.objectives import Objective, Targets
from safer_fast.training.optimizers import build_optimizer
from safer_fast.training.step import Step

NUM_CLASSES = 10
STAGES = ("attack", "prefix", "ascent", "perturb", "descent", "update")


def build(arguments: argparse.Namespace, runtime: Runtime) -> tuple[Step, tuple[Tensor, ...]]:
    """A step over the layers asked for, and a random batch for it; both the same each time."""
    torch.manual_seed(0)
    model, arenas = build_robust_model(arguments, runtime)
    selection = arenas.select(match_layers(arguments.layers.split(","), model.layers))
    objective = Objective(ObjectiveConfig())
    generator = runtime.generator(0)
    step = Step(
        model=model,
        selection=selection,
        optimizer=build_optimizer(OptimConfig(), selection),
        objective=objective,
        sam=SAMConfig(rho=arguments.rho),
        attack=ReplayedAttack(model, steps=arguments.steps, generator=generator),
        reuses_prefix="prefix" in arguments.savings.split(","),
    )
    return step, batch(arguments.batch_size, arguments.image_size, runtime.device)


def build_robust_model(
    arguments: argparse.Namespace, runtime: Runtime
) -> tuple[RobustModel, ParameterArenas]:
    """The model on the device as a run has it, with the savings asked for."""
    savings = arguments.savings.split(",")
    model, _ = prepare(
        ModelConfig(name=arguments.model, patch_size=arguments.patch_size),
        runtime.device,
        savings=savings,
        num_classes=NUM_CLASSES,
        image_size=arguments.image_size,
        compute_dtype=runtime.compute_dtype,
    )
    return model, freeze(model, savings)


def batch(batch_size: int, image_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Random images and labels, epsilon 8/255 and step size 2/255."""
    images = torch.rand((batch_size, 3, image_size, image_size), device=device)
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    epsilon, step_size = (torch.tensor(radius / 255, device=device) for radius in (8, 2))
    return images, labels, epsilon, step_size


def ours(step: Step, inputs: tuple[Tensor, ...], recorder: Recorder | None) -> Implementation:
    """Our step; `recorder` makes the recordings that it is replayed from once it is captured."""

    images, labels, *radii = inputs
    targets = Targets.alike(labels)

    def capture() -> None:
        assert recorder is not None
        step.replays = step.attack.replays = Replays(recorder, refuse)

    return Implementation(
        step=lambda: step(images, targets, *radii),
        stages=stages(step, inputs),
        compile=lambda: compile_blocks(step.model),
        capture=capture,
    )


def stages(step: Step, inputs: tuple[Tensor, ...]) -> dict[str, Run]:
    """A step in parts, each of which can be replayed: what it leaves stays where it is."""
    images, labels, epsilon, step_size = inputs
    targets = Targets.alike(labels)
    buffers = Buffers()
    held: dict[str, Tensor] = {}

    def attack() -> None:
        held["adversarial"] = step.attack(images, labels, epsilon, step_size)

    def prefix() -> None:
        (features,) = step.prefix([held["adversarial"]], len(labels))
        held["features"] = buffers.hold("features", features)

    def ascent() -> None:
        loss, _ = step.differentiate([held["features"]], [targets])
        step.selection.extra.copy_(loss)

    def descent() -> None:
        step.differentiate([held["features"]], [targets], is_second=True)

    parts: dict[str, Phase] = {"prefix": prefix, "ascent": ascent}
    if step.sam.rho > 0:
        parts |= {"perturb": step.ascend, "descent": descent}
    parts["update"] = lambda: step.update(targets)
    return {"attack": attack} | {name: _replayed(step, name, part) for name, part in parts.items()}


def phases(counted: dict[str, float]) -> dict[str, float]:
    """Operations of our stages as those of the phases that the method is written in."""
    sam = sum(value for name, value in counted.items() if name not in ("attack", "prefix"))
    return {"attack": counted["attack"], "prefix": counted["prefix"], "sam": sam}


def ideal(step: Step, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Operations of each phase that the method needs, in timm's own modules."""
    passes = 2 if step.sam.rho > 0 else 1
    names = step.selection.names
    cut = step.model.cut_of(names)
    with step.model.without_savings():
        return ideal_flops(step.model, inputs[0], cut, names, step.attack.steps, passes)


def _replayed(step: Step, name: str, part: Phase) -> Run:
    return lambda: step.replays((f"stage {name}",), part)


def refuse(line: str) -> NoReturn:
    """A row that says captured is of a captured step."""
    raise RuntimeError(line)
