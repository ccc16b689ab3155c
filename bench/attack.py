"""One iteration of the attack, which is most of a step: eager, compiled, and as a CUDA graph.

    python -m bench.attack [--model vit_tiny_patch16_224] [--image-size 32] [--patch-size 4]
        [--amp bf16] [--batch-sizes 64,128,256] [--modes eager,compiled,captured] [--repeats 5]
        [--savings patch-order,class-token,prefix,stored-bf16] [--output FILE.jsonl]

Forward, gradient of the pixels, Linf step: what training runs, on random images and weights. Modes
alternate in one process; captured is compiled code in a CUDA graph. MFU compares the operations
that the method needs with the rate of a large matrix product in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.implementation import warm_up
from bench.measure import (
    Run,
    append,
    check_gpu,
    origin,
    quantiles,
    repeats,
    savings,
    some_of,
    timed,
)
from bench.memory import peak_memory_mib
from bench.ours import batch, build_robust_model, refuse
from safer_fast.attacks.pgd import cross_entropy, frozen, pgd_step_, random_start
from safer_fast.config.schema import SAVINGS, RuntimeConfig
from safer_fast.models.attention import pin_for
from safer_fast.models.flops import count, ideal_flops, matmul_rate
from safer_fast.models.robust_model import RobustModel, compile_blocks
from safer_fast.runtime.cuda_graphs import CudaRecorder, Phase, Replays
from safer_fast.runtime.device import Runtime, prepare_runtime

MODES = ("eager", "compiled", "captured")
IN_A_ROW = {"cpu": 1, "cuda": 5}
"""Iterations between two waits for the device: a GPU queues the next while it runs one."""


def main() -> None:
    """Print a line for each mode and batch size and, if asked, append it as JSON to a file."""
    arguments = parse_arguments()
    for row in measure(arguments):
        print_row(row)
        append([row], arguments.output)


def parse_arguments() -> argparse.Namespace:
    """The cases to measure, as typed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    modes = MODES if torch.cuda.is_available() else MODES[:2]
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="name in timm")
    parser.add_argument("--image-size", type=int, default=32, help="edge in pixels")
    parser.add_argument("--patch-size", type=int, default=4, help="edge of a patch in pixels")
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16", help="precision")
    parser.add_argument("--batch-sizes", type=_sizes, default=[64, 128, 256], help="with commas")
    parser.add_argument("--modes", type=_modes, default=list(modes), help="with commas")
    parser.add_argument("--repeats", type=repeats, default=5, help="measurements of each")
    parser.add_argument("--savings", type=savings, default=",".join(SAVINGS), help="those on")
    parser.add_argument("--output", type=Path, help="append one JSON line per result to this file")
    arguments = parser.parse_args()
    check_gpu(parser, "--modes", "captured" in arguments.modes)
    return arguments


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each mode and batch size, as soon as it is measured."""
    runtime = prepare_runtime(RuntimeConfig(), arguments.amp)
    models = {mode: build_robust_model(arguments, runtime)[0] for mode in arguments.modes}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(frozen(model))
        first = next(iter(models.values()))
        operations = operations_of_one_image(first, arguments.image_size, runtime)
        for mode, model in models.items():
            if mode != "eager":
                compile_blocks(model)
        for size in arguments.batch_sizes:
            yield from compare(models, size, operations, arguments, runtime)


def operations_of_one_image(
    model: RobustModel, image_size: int, runtime: Runtime
) -> tuple[float, float]:
    """Operations of one iteration, as they run before compilation and as the method needs them."""
    counted, _ = count(iteration(model, 1, image_size, runtime))
    images = batch(1, image_size, runtime.device)[0]
    with model.without_savings():
        needed = ideal_flops(model, images, model.num_blocks, [], steps=1, passes=0)
    return counted, needed["attack"]


def iteration(model: RobustModel, batch_size: int, image_size: int, runtime: Runtime) -> Phase:
    """A call that moves a batch of random images by one step of the attack."""
    images, labels, epsilon, step_size = batch(batch_size, image_size, runtime.device)
    adversarial = model.arrange(random_start(images, epsilon)).contiguous()
    pixels = model.arrange(images)

    def iterate() -> None:
        pgd_step_(model, adversarial, pixels, labels, step_size, epsilon, "linf", cross_entropy)

    return iterate


def compare(
    models: dict[str, RobustModel],
    batch_size: int,
    operations: tuple[float, float],
    arguments: argparse.Namespace,
    runtime: Runtime,
) -> Iterator[dict[str, Any]]:
    """A row for each mode, all measured in turn."""
    attention = pin_for(next(iter(models.values())), arguments.image_size, batch_size, "auto")
    ready = {
        mode: prepared(model, batch_size, mode == "captured", arguments, runtime)
        for mode, model in models.items()
    }
    times: dict[str, list[float]] = {mode: [] for mode in models}
    rates = []
    for _ in range(warm_up("captured" in models) + arguments.repeats):
        rates.append(matmul_rate(runtime.device, runtime.compute_dtype))
        for mode, (run, _) in ready.items():
            times[mode].append(timed(run, runtime.device)[0] / IN_A_ROW[runtime.device.type])
    rate = statistics.median(rates[-arguments.repeats :])
    for mode, (_, peak) in ready.items():
        figures = {
            **_figures(times[mode][-arguments.repeats :], batch_size, operations, rate),
            "peak_memory_mib": peak,
            "attention": attention and attention.backend,
        }
        yield row_of(mode, batch_size, figures, arguments, runtime)


def prepared(
    model: RobustModel,
    batch_size: int,
    is_captured: bool,
    arguments: argparse.Namespace,
    runtime: Runtime,
) -> tuple[Run, float | None]:
    """Iterations to be timed, as many in a row as there are, and the peak memory of one in MiB.

    A replay allocates nothing: memory is that of the same code before it is captured.
    """
    iterate = iteration(model, batch_size, arguments.image_size, runtime)
    iterate()
    peak = peak_memory_mib(iterate, runtime.device)
    replays = Replays(CudaRecorder(runtime.device) if is_captured else None, refuse)

    def run() -> None:
        for _ in range(IN_A_ROW[runtime.device.type]):
            replays(("attack",), iterate)

    return run, peak


def row_of(
    mode: str,
    batch_size: int,
    figures: dict[str, Any],
    arguments: argparse.Namespace,
    runtime: Runtime,
) -> dict[str, Any]:
    """One line of output."""
    return {
        "what": "attack",
        "implementation": mode,
        "case": f"{arguments.model}, {arguments.image_size}/{arguments.patch_size}, "
        f"batch {batch_size}",
        "dtype": arguments.amp,
        "compiled": mode != "eager",
        "captured": mode == "captured",
        "savings": arguments.savings.split(","),
        **figures,
        **origin(runtime.device),
    }


def print_row(row: dict[str, Any]) -> None:
    """The row as a line."""
    print(
        f"{row['case']}, {row['dtype']}, {row['implementation']:<8} {row['p50_ms']:9.2f} ms  "
        f"{row['images_per_second']:9.1f} images/s  MFU {row['mfu']:6.1%} of "
        f"{row['matmul_tflops']} TFLOP/s  peak memory {row['peak_memory_mib']} MiB",
        flush=True,
    )


def _figures(
    times_ms: list[float], batch_size: int, operations: tuple[float, float], rate: float
) -> dict[str, Any]:
    counted, needed = operations
    times = quantiles(times_ms)
    images_per_second = batch_size / times["p50_ms"] * 1e3
    return {
        **times,
        "images_per_second": round(images_per_second, 1),
        "mfu": round(images_per_second * needed / rate, 4),
        "matmul_tflops": round(rate / 1e12, 3),
        "counted_per_ideal": round(counted / needed, 4),
    }


def _sizes(text: str) -> list[int]:
    sizes = [int(word) for word in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers above 0, got {text}")
    return sizes


def _modes(text: str) -> list[str]:
    return some_of(MODES, text).split(",")


if __name__ == "__main__":
    main()
