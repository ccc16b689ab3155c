"""A step of ours against the same step made of other libraries, as shipped and tuned, in one run.

    python -m bench.peers [--leave-out patch-order,class-token,prefix,stored-bf16]
        [the flags of bench.step]

As shipped: torchattacks' PGD and pytorch-optimizer's SAM over all weights, timm's model, autocast,
eager, torch's choice of attention. Tuned: every fix that costs a user nothing: weights that are not
selected frozen (and stored in bf16), no weight gradients in the attack, SAM over the same selected
layers, torch.compile where ours has it, the attention that is fastest here. Ours: with the savings
asked for, and with each of them left out. Rounds alternate between all of them, so that a busy
machine slows every one alike. What a run of ours sets for the whole process (deterministic kernels;
on a CPU, memory that is kept) does not hold while the others run: see bench/others.py.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from torch import Tensor

from bench.implementation import Implementation, warm_up
from bench.measure import append, check_gpu, medians, origin, quantiles, savings
from bench.others import peers_as_shipped, peers_tuned
from bench.ours import build, ideal, ours
from bench.step import case_of, kind_of, parser_of_cases, prepare, recorder_of
from safer_fast.config.schema import SAVINGS
from safer_fast.models.attention import pin_for
from safer_fast.models.flops import matmul_rate
from safer_fast.runtime.device import Runtime
from safer_fast.training.step import Step


def main() -> None:
    """Print a table and, if asked, append one JSON line per implementation."""
    parser = parser_of_cases(__doc__ or "")
    every = ",".join(SAVINGS)
    parser.add_argument("--leave-out", type=savings, default=every, help="savings, one by one")
    arguments = parser.parse_args()
    check_gpu(parser, "--cuda-graph", arguments.cuda_graph)
    rows = measure(arguments)
    print_rows(rows)
    append(rows, arguments.output)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each implementation, all measured in turn."""
    runtime = prepare(arguments)
    step, inputs = build(arguments, runtime)
    needed = sum(ideal(step, inputs).values())
    implementations = all_implementations(step, inputs, arguments, runtime)
    for each in implementations.values():
        each.prepare(runtime.device, runtime.is_compiled, runtime.is_captured)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in implementations}
    rates = []
    for _ in range(warm_up(runtime.is_captured) + arguments.repeats):
        rates.append(matmul_rate(runtime.device, runtime.compute_dtype))
        for name, each in implementations.items():
            samples[name].append(each.times_ms(runtime.device))
    rate = statistics.median(rates[-arguments.repeats :])
    rows = [
        {
            "what": "peers",
            "implementation": name,
            **case_of(arguments),
            "layers": step.selection.names,
            **figures(each, samples[name][-arguments.repeats :], needed, rate),
            "matmul_tflops": round(rate / 1e12, 3),
            **origin(runtime.device),
        }
        for name, each in implementations.items()
    ]
    return [row | in_comparison(row, rows[0], arguments.batch_size) for row in rows]


def all_implementations(
    step: Step, inputs: tuple[Tensor, ...], arguments: argparse.Namespace, runtime: Runtime
) -> dict[str, Implementation]:
    """Ours, the others, and ours with less and less left out, by name."""
    recorder = recorder_of(runtime)
    found = {
        "ours": ours(step, inputs, recorder),
        "peers as shipped": peers_as_shipped(arguments, runtime, step, inputs),
        "peers tuned": peers_tuned(arguments, runtime, step, inputs),
    }
    pin_for(step.model, arguments.image_size, arguments.batch_size, "auto")
    for saving in filter(None, arguments.leave_out.split(",")):
        kept = ",".join(other for other in arguments.savings.split(",") if other != saving)
        poorer = build(argparse.Namespace(**vars(arguments) | {"savings": kept}), runtime)
        found[f"ours without {saving}"] = ours(*poorer, recorder)
    return found


def figures(
    implementation: Implementation, samples: list[dict[str, float]], needed: float, rate: float
) -> dict[str, Any]:
    """The fields of a row that are measured; MFU counts the operations that the method needs."""
    times = quantiles([sample["step"] for sample in samples])
    stages = medians(samples)
    return {
        **times,
        "stages_ms": {name: stages[name] for name in implementation.stages},
        "mfu": round(needed / (times["p50_ms"] / 1e3) / rate, 4),
        "counted_gflops": round(sum(implementation.counted.values()) / 1e9, 3),
        "counted_per_ideal": round(sum(implementation.counted.values()) / needed, 4),
        "peak_memory_mib": implementation.peak_memory_mib,
    }


def in_comparison(row: dict[str, Any], first: dict[str, Any], batch_size: int) -> dict[str, float]:
    """Images per second, and how many times as long this takes as ours, which is the first."""
    return {
        "speed_of_ours": round(row["p50_ms"] / first["p50_ms"], 3),
        "images_per_second": round(batch_size / row["p50_ms"] * 1e3, 1),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    first = rows[0]
    print(f"{first['case']}, {first['dtype']}, {kind_of(first)}, {first['device']}")
    print(f"selected {', '.join(first['layers'])}; matmul {first['matmul_tflops']} TFLOP/s")
    for row in rows:
        memory = row["peak_memory_mib"]
        stages = ", ".join(f"{name} {value:.1f}" for name, value in row["stages_ms"].items())
        print(
            f"  {row['implementation']:<26} {row['p50_ms']:>10.1f} ms  "
            f"{row['images_per_second']:>8.1f} images/s  MFU {row['mfu']:6.1%}  "
            f"ours is {row['speed_of_ours']:.2f}x  {'-' if memory is None else memory:>8} MiB  "
            f"counted / ideal {row['counted_per_ideal']:.3f}\n{'':<4}{stages} ms"
        )


if __name__ == "__main__":
    main()
