"""A step of ours against the same step made of other libraries, as shipped and tuned, in one run.

    python -m bench.peers [the flags of bench.step]

As shipped: torchattacks' PGD and pytorch-optimizer's SAM over all weights, timm's model, autocast,
eager, torch's choice of attention. Tuned: every fix that costs a user nothing: weights that are not
selected frozen (and stored in bf16), SAM over the same selected layers, torch.compile where ours
has it, the attention that is fastest here. Ours: with all savings, and with each left out. Rounds
alternate between all of them, so that a busy machine slows every one alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.nn import functional
from torchattacks import PGD

from bench.ops import commit, device_name
from bench.step import build, operations, parse_arguments
from safer_fast.config import SAVINGS, RuntimeConfig
from safer_fast.reference import PlainModel
from safer_fast.runtime import Runtime, compile_blocks, prepare_runtime
from safer_fast.step import Step

Run = Callable[[], object]
WARM_UP = 2
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def main() -> None:
    """Prints a table and, if asked, appends one JSON line per implementation."""
    arguments = parse_arguments(__doc__ or "")
    rows = measure(arguments)
    print_rows(rows)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each implementation, all measured in turn."""
    runtime = prepare_runtime(
        RuntimeConfig(compile="on" if arguments.compile else "off"), arguments.amp
    )
    step, inputs = build_ours(arguments, runtime, SAVINGS)
    ideal = sum(operations(step, inputs, arguments)[1].values())
    runs = {
        "ours": lambda: step(*inputs),
        "peers as shipped": peers_as_shipped(arguments, runtime, step, inputs),
        "peers tuned": peers_tuned(arguments, runtime, step, inputs),
    }
    steps = [step]
    for saving in SAVINGS:
        without = tuple(other for other in SAVINGS if other != saving)
        poorer, poorer_inputs = build_ours(arguments, runtime, without)
        runs[f"ours without {saving}"] = _runner(poorer, poorer_inputs)
        steps.append(poorer)
    if arguments.compile:
        for each in steps:
            compile_blocks(each.model)
    times: dict[str, list[float]] = {name: [] for name in runs}
    rates = []
    for index in range(WARM_UP + arguments.repeats):
        rates.append(matmul_rate(runtime))
        for name, run in runs.items():
            elapsed = _seconds(run, runtime)
            if index >= WARM_UP:
                times[name].append(elapsed)
    rate = statistics.median(rates[WARM_UP:])
    return [row_of(name, times, ideal, rate, arguments, runtime, step) for name in runs]


def build_ours(
    arguments: argparse.Namespace, runtime: Runtime, savings: tuple[str, ...]
) -> tuple[Step, tuple[Tensor, ...]]:
    """Our step with these savings on; weights and images are the same each time."""
    torch.manual_seed(0)
    settings = vars(arguments) | {"savings": ",".join(savings)}
    return build(argparse.Namespace(**settings), runtime)


def _runner(step: Step, inputs: tuple[Tensor, ...]) -> Run:
    return lambda: step(*inputs)


def peers_as_shipped(
    arguments: argparse.Namespace, runtime: Runtime, step: Step, inputs: tuple[Tensor, ...]
) -> Run:
    """Torchattacks and pytorch-optimizer, as their front pages show them, under autocast."""
    model = _plain(step, arguments)
    run = _peers_step(model, list(model.parameters()), arguments, runtime, inputs)

    def run_with_default_attention() -> None:
        chosen = torch.backends.cuda.flash_sdp_enabled()
        torch.backends.cuda.enable_flash_sdp(True)
        try:
            run()
        finally:
            torch.backends.cuda.enable_flash_sdp(chosen)

    return run_with_default_attention


def peers_tuned(
    arguments: argparse.Namespace, runtime: Runtime, step: Step, inputs: tuple[Tensor, ...]
) -> Run:
    """The same libraries over the selected layers only, the rest frozen, and stored in bf16."""
    model = _plain(step, arguments)
    if arguments.compile:
        for block in model.network.get_submodule("blocks").children():
            block.compile(dynamic=False)
    names = {name for layer in step.selection.names for name in step.model.layers[layer]}
    layers = {name for own in step.model.layers.values() for name in own}
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in names)
        if arguments.amp == "bf16" and name in layers - names:
            parameter.data = parameter.data.bfloat16()
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _peers_step(model, chosen, arguments, runtime, inputs)


def _plain(step: Step, arguments: argparse.Namespace) -> PlainModel:
    """Timm's network in fp32 with the weights of our step, under autocast if asked."""
    autocast = torch.bfloat16 if arguments.amp == "bf16" else None
    return PlainModel(step.model, torch.float32, autocast).eval()


def _peers_step(
    model: nn.Module,
    parameters: list[nn.Parameter],
    arguments: argparse.Namespace,
    runtime: Runtime,
    inputs: tuple[Tensor, ...],
) -> Run:
    images, labels, epsilon, step_size = inputs
    attack = PGD(model, eps=float(epsilon), alpha=float(step_size), steps=arguments.steps)
    optimizer = SAM(parameters, torch.optim.AdamW, rho=arguments.rho, lr=1e-3, use_gc=False)

    def run() -> None:
        adversarial = attack(images, labels)
        functional.cross_entropy(model(adversarial), labels).backward()
        optimizer.first_step(zero_grad=True)
        functional.cross_entropy(model(adversarial), labels).backward()
        optimizer.second_step(zero_grad=True)

    return run


def matmul_rate(runtime: Runtime) -> float:
    """Operations per second of a large matrix product in the step's precision, now."""
    size = MATMUL_SIZE[runtime.device.type]
    a, b = torch.randn(2, size, size, device=runtime.device).to(runtime.compute_dtype)
    return 2 * size**3 / _seconds(lambda: a @ b, runtime)


def row_of(
    name: str,
    times: dict[str, list[float]],
    ideal: float,
    rate: float,
    arguments: argparse.Namespace,
    runtime: Runtime,
    step: Step,
) -> dict[str, Any]:
    """One JSON row; `speed_of_ours` is how many times as long this takes as ours."""
    medians = {other: statistics.median(values) for other, values in times.items()}
    p20, *_, p80 = statistics.quantiles(times[name], n=5)
    return {
        "what": "peers",
        "implementation": name,
        "case": f"{arguments.model}, {arguments.image_size}/{arguments.patch_size}, "
        f"batch {arguments.batch_size}, PGD-{arguments.steps}, rho {arguments.rho}",
        "layers": step.selection.names,
        "dtype": arguments.amp,
        "compiled": arguments.compile,
        "p20_ms": round(p20 * 1e3, 2),
        "p50_ms": round(medians[name] * 1e3, 2),
        "p80_ms": round(p80 * 1e3, 2),
        "speed_of_ours": round(medians[name] / medians["ours"], 3),
        "images_per_second": round(arguments.batch_size / medians[name], 1),
        "mfu": round(ideal / medians[name] / rate, 4),
        "matmul_tflops": round(rate / 1e12, 3),
        "device": device_name(runtime.device.type),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _seconds(run: Run, runtime: Runtime) -> float:
    def wait() -> None:
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    first = rows[0]
    kind = "compiled" if first["compiled"] else "eager"
    print(f"{first['case']}, {first['dtype']}, {kind}, {first['device']}")
    print(f"selected {', '.join(first['layers'])}; matmul {first['matmul_tflops']} TFLOP/s")
    for row in rows:
        print(
            f"  {row['implementation']:<26} {row['p50_ms']:>10.1f} ms  "
            f"{row['images_per_second']:>8.1f} images/s  MFU {row['mfu']:6.1%}  "
            f"ours is {row['speed_of_ours']:.2f}x"
        )


if __name__ == "__main__":
    main()
