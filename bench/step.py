"""Where the time, the operations and the memory of one step go.

    python -m bench.step [--model vit_tiny_patch16_224] [--image-size 32] [--patch-size 4]
        [--batch-size 64] [--steps 3] [--layers blocks.10.mlp.fc1] [--amp bf16] [--compile]
        [--savings patch-order,class-token,prefix,stored-bf16] [--output FILE.jsonl] [--repeats 5]

Random images, random weights. Stages are medians over the repeats; `counted / ideal` compares the
operations that ran with those that the method needs (bench/flops.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.flops import count, ideal_flops
from bench.ops import commit, device_name
from safer_fast.config import (
    SAVINGS,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RuntimeConfig,
    SAMConfig,
)
from safer_fast.model import build_model
from safer_fast.objective import Objective
from safer_fast.optim import build_optimizer
from safer_fast.parameters import ParameterArenas
from safer_fast.runtime import Runtime, compile_blocks, prepare_runtime
from safer_fast.selection import match_layers
from safer_fast.step import Step

NUM_CLASSES = 10
STAGES = ("attack", "prefix", "ascent", "perturb", "descent", "update")


def main() -> None:
    """Prints the table and, if asked, appends it as one JSON line to a file."""
    arguments = parse_arguments(__doc__)
    row = measure(arguments)
    print_row(row)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def parse_arguments(description: str) -> argparse.Namespace:
    """The case to measure, as typed."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="name in timm")
    parser.add_argument("--image-size", type=int, default=32, help="edge in pixels")
    parser.add_argument("--patch-size", type=int, default=4, help="edge of a patch in pixels")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--steps", type=int, default=3, help="iterations of PGD")
    parser.add_argument("--layers", default="blocks.10.mlp.fc1", help="selected, with commas")
    parser.add_argument("--rho", type=float, default=0.05, help="radius of SAM; 0: one pass")
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16", help="precision")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps")
    parser.add_argument("--output", type=Path, help="append one JSON line to this file")
    parser.add_argument("--savings", default=",".join(SAVINGS), help="those that are on")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: the case, the stages, the operations, the memory, the machine."""
    runtime = prepare_runtime(
        RuntimeConfig(compile="on" if arguments.compile else "off"), arguments.amp
    )
    torch.manual_seed(0)
    step, inputs = build(arguments, runtime)
    counted, ideal = operations(step, inputs, arguments)
    if runtime.is_compiled:
        compile_blocks(step.model)
    times = stage_times(step, inputs, arguments.repeats, runtime)
    whole = statistics.median(times["step"])
    return {
        "what": "step",
        "implementation": "compiled" if runtime.is_compiled else "eager",
        "case": f"{arguments.model}, {arguments.image_size}/{arguments.patch_size}, "
        f"batch {arguments.batch_size}, PGD-{arguments.steps}, rho {arguments.rho}",
        "layers": step.selection.names,
        "cut": step.cut,
        "savings": arguments.savings.split(","),
        "dtype": arguments.amp,
        "p50_ms": round(whole, 3),
        "images_per_second": round(arguments.batch_size / whole * 1e3, 1),
        "stages_ms": {name: round(statistics.median(times[name]), 3) for name in STAGES},
        "counted_gflops": {name: value / 1e9 for name, value in counted.items()},
        "ideal_gflops": {name: value / 1e9 for name, value in ideal.items()},
        "counted_per_ideal": round(sum(counted.values()) / sum(ideal.values()), 4),
        "peak_memory_mib": round(runtime.peak_memory_mib(), 1),
        "device": device_name(runtime.device.type),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def build(arguments: argparse.Namespace, runtime: Runtime) -> tuple[Step, tuple[Tensor, ...]]:
    """A step over the layers asked for, and a random batch for it."""
    model = build_model(
        ModelConfig(name=arguments.model, patch_size=arguments.patch_size),
        num_classes=NUM_CLASSES,
        image_size=arguments.image_size,
        compute_dtype=runtime.compute_dtype,
    )
    savings = arguments.savings.split(",")
    model.save(savings, arguments.image_size)
    model.to(runtime.device)
    stored = runtime.compute_dtype if "stored-bf16" in savings else torch.float32
    arenas = ParameterArenas(model.network, model.layers, stored)
    selection = arenas.select(match_layers(arguments.layers.split(","), model.layers))
    step = Step(
        model=model,
        selection=selection,
        optimizer=build_optimizer(OptimConfig(), selection),
        objective=Objective(ObjectiveConfig()),
        sam=SAMConfig(rho=arguments.rho),
        norm="linf",
        attack_steps=arguments.steps,
        reuses_prefix="prefix" in savings,
        generator=runtime.generator(0),
    )
    size = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    images = torch.rand(size, device=runtime.device)
    labels = torch.randint(NUM_CLASSES, size[:1], device=runtime.device)
    epsilon, step_size = (torch.tensor(r / 255, device=runtime.device) for r in (8, 2))
    return step, (images, labels, epsilon, step_size)


def operations(
    step: Step, inputs: tuple[Tensor, ...], arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Operations of each phase, as they ran and as the method needs them."""
    images, labels, epsilon, step_size = inputs
    attack, adversarial = count(lambda: step.attack(images, labels, epsilon, step_size))
    with torch.no_grad():
        prefix, features = count(lambda: step.model.prefix(adversarial, step.cut))
    one_pass, _ = count(lambda: step.differentiate(features, labels)[0])
    passes = 2 if arguments.rho > 0 else 1
    counted = {"attack": attack, "prefix": prefix, "sam": passes * one_pass}
    cut, layers = step.model.cut_of(step.selection.names), step.selection.names
    with step.model.plainly():  # needed is what timm's own modules compute
        ideal = ideal_flops(step.model, images, cut, layers, arguments.steps, passes)
    return counted, ideal


def stage_times(
    step: Step, inputs: tuple[Tensor, ...], repeats: int, runtime: Runtime
) -> dict[str, list[float]]:
    """Milliseconds of every stage in each of `repeats` steps, after two to warm up.

    The device is waited for around each stage, so stages do not overlap and their sum is at least
    the time of the whole step, which is measured by itself.
    """
    times: dict[str, list[float]] = {}
    for _ in range(2 + repeats):
        times.setdefault("step", []).append(_timed(lambda: step(*inputs), runtime)[0])  # type: ignore[arg-type]
        for name, elapsed in _one_step_in_stages(step, inputs, runtime).items():
            times.setdefault(name, []).append(elapsed)
    return {name: values[2:] for name, values in times.items()}


def _one_step_in_stages(
    step: Step, inputs: tuple[Tensor, ...], runtime: Runtime
) -> dict[str, float]:
    from safer_fast.sam import restore_

    images, labels, epsilon, step_size = inputs
    times = dict.fromkeys(STAGES, 0.0)
    times["attack"], adversarial = _timed(
        lambda: step.attack(images, labels, epsilon, step_size), runtime
    )
    with torch.no_grad():
        times["prefix"], features = _timed(
            lambda: step.model.prefix(adversarial, step.cut), runtime
        )
    times["ascent"], (loss, _) = _timed(lambda: step.differentiate(features, labels), runtime)
    if step.sam.rho > 0:
        times["perturb"], _ = _timed(step.ascend, runtime)
        times["descent"], _ = _timed(lambda: step.differentiate(features, labels, True), runtime)

    def update() -> None:
        step.update(loss)
        restore_(step.selection.ranges)

    times["update"], _ = _timed(update, runtime)
    return times


def _timed(run: Callable[[], Any], runtime: Runtime) -> tuple[float, Any]:
    def wait() -> None:
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    result = run()
    wait()
    return (time.perf_counter() - started) * 1e3, result


def print_row(row: dict[str, Any]) -> None:
    """The row as a small table."""
    print(f"{row['case']}, {row['dtype']}, {row['implementation']}, {row['device']}")
    print(f"selected {', '.join(row['layers'])}: suffix from block {row['cut']}")
    total = sum(row["stages_ms"].values())
    for name, elapsed in row["stages_ms"].items():
        print(f"  {name:<8} {elapsed:10.2f} ms  {elapsed / total:6.1%}")
    print(f"  {'step':<8} {row['p50_ms']:10.2f} ms  {row['images_per_second']:.1f} images/s")
    for name, ideal in row["ideal_gflops"].items():
        counted = row["counted_gflops"][name]
        share = f"{counted / ideal:.4f}" if ideal else "-"
        print(f"  {name:<8} {counted:10.2f} GFLOP counted, {ideal:.2f} ideal, ratio {share}")
    print(f"  counted / ideal {row['counted_per_ideal']}, peak memory {row['peak_memory_mib']} MiB")


if __name__ == "__main__":
    main()
