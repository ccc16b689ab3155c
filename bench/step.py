"""Where the time, the operations and the memory of one step go.

    python -m bench.step [--model vit_tiny_patch16_224] [--image-size 32] [--patch-size 4]
        [--batch-size 64] [--steps 3] [--layers blocks.10.mlp.fc1] [--amp bf16] [--compile]
        [--cuda-graph] [--savings patch-order,class-token,prefix,stored-bf16]
        [--output FILE.jsonl] [--repeats 5]

Random images, random weights. Stages are medians over the repeats; `counted / ideal` compares the
operations that ran with those that the method needs (safer_fast/models/flops.py); memory is what a
step holds at its peak above what was held before it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.implementation import warm_up
from bench.measure import append, check_gpu, medians, origin, quantiles, repeats, savings
from bench.ours import STAGES, build, ideal, ours, phases
from safer_fast.config.schema import SAVINGS, RuntimeConfig
from safer_fast.models.attention import pin_for
from safer_fast.runtime.cuda_graphs import CudaRecorder
from safer_fast.runtime.device import Runtime, prepare_runtime


def main() -> None:
    """Print the table and, if asked, append it as one JSON line to a file."""
    parser = parser_of_cases(__doc__ or "")
    arguments = parser.parse_args()
    check_gpu(parser, "--cuda-graph", arguments.cuda_graph)
    row = measure(arguments)
    print_row(row)
    append([row], arguments.output)


def parser_of_cases(description: str) -> argparse.ArgumentParser:
    """Read the case to measure, as typed."""
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
    parser.add_argument("--cuda-graph", action="store_true", help="replay ours from CUDA graphs")
    parser.add_argument("--repeats", type=repeats, default=5, help="measured steps")
    parser.add_argument("--output", type=Path, help="append one JSON line to this file")
    parser.add_argument("--savings", type=savings, default=",".join(SAVINGS), help="those on")
    return parser


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: the case, the stages, the operations, the memory, the machine."""
    runtime = prepare(arguments)
    step, inputs = build(arguments, runtime)
    attention = pin_for(step.model, arguments.image_size, arguments.batch_size, "auto")
    needed = ideal(step, inputs)
    implementation = ours(step, inputs, recorder_of(runtime))
    implementation.prepare(runtime.device, runtime.is_compiled, runtime.is_captured)
    num_rounds = warm_up(runtime.is_captured) + arguments.repeats
    samples = [implementation.times_ms(runtime.device) for _ in range(num_rounds)]
    samples = samples[-arguments.repeats :]
    times = quantiles([sample["step"] for sample in samples])
    counted = phases(implementation.counted)
    return {
        "what": "step",
        "implementation": kind_of(case_of(arguments)),
        **case_of(arguments),
        "layers": step.selection.names,
        "cut": step.cut,
        "savings": arguments.savings.split(","),
        "attention": attention and attention.backend,
        **times,
        "images_per_second": round(arguments.batch_size / times["p50_ms"] * 1e3, 1),
        "stages_ms": {name: medians(samples).get(name, 0.0) for name in STAGES},
        "counted_gflops": {name: value / 1e9 for name, value in counted.items()},
        "ideal_gflops": {name: value / 1e9 for name, value in needed.items()},
        "counted_per_ideal": round(sum(counted.values()) / sum(needed.values()), 4),
        "peak_memory_mib": implementation.peak_memory_mib,
        **origin(runtime.device),
    }


def prepare(arguments: argparse.Namespace) -> Runtime:
    """The process computes as asked for."""
    config = RuntimeConfig(
        compile="on" if arguments.compile else "off",
        cuda_graph="on" if arguments.cuda_graph else "off",
    )
    return prepare_runtime(config, arguments.amp)


def recorder_of(runtime: Runtime) -> CudaRecorder | None:
    """The recorder of captured steps; all that are compared share one, and thus its memory."""
    return CudaRecorder(runtime.device) if runtime.is_captured else None


def case_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a row that name what was asked for."""
    return {
        "case": f"{arguments.model}, {arguments.image_size}/{arguments.patch_size}, "
        f"batch {arguments.batch_size}, PGD-{arguments.steps}, rho {arguments.rho}",
        "dtype": arguments.amp,
        "compiled": arguments.compile,
        "captured": arguments.cuda_graph,
    }


def kind_of(row: dict[str, Any]) -> str:
    """The mode of our step in a row, in a word or two: eager or compiled, captured."""
    kind = "compiled" if row["compiled"] else "eager"
    return f"{kind}, captured" if row["captured"] else kind


def print_row(row: dict[str, Any]) -> None:
    """The row as a small table."""
    print(f"{row['case']}, {row['dtype']}, {row['implementation']}, {row['device']}")
    print(f"selected {', '.join(row['layers'])}: suffix from block {row['cut']}")
    total = sum(row["stages_ms"].values())
    for name, elapsed in row["stages_ms"].items():
        print(f"  {name:<8} {elapsed:10.2f} ms  {elapsed / total:6.1%}")
    print(f"  {'step':<8} {row['p50_ms']:10.2f} ms  {row['images_per_second']:.1f} images/s")
    for name, ideal_gflops in row["ideal_gflops"].items():
        counted = row["counted_gflops"][name]
        share = f"{counted / ideal_gflops:.4f}" if ideal_gflops else "-"
        print(f"  {name:<8} {counted:10.2f} GFLOP counted, {ideal_gflops:.2f} ideal, ratio {share}")
    print(f"  counted / ideal {row['counted_per_ideal']}, peak memory {row['peak_memory_mib']} MiB")


if __name__ == "__main__":
    main()
