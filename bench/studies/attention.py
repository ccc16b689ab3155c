"""Every attention kernel of torch, forward and backward, for the shapes of ViTs.

    python -m bench.studies.attention [--output FILE.jsonl] [--repeats 20]

65 tokens are CIFAR's 32 pixels in patches of 4, 197 are 224 pixels in patches of 16. On a GPU each
is measured with deterministic algorithms, as training runs, and without. Kernels alternate; times
of a GPU are without the launches.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.measure import append, origin, quantiles, repeats
from bench.ops import dtype_name
from safer_fast.runtime.attention import (
    Shape,
    activate,
    random_inputs,
    run_backend,
    usable_backends,
)
from safer_fast.runtime.timing_cache import milliseconds


@dataclass(frozen=True)
class Case:
    """A model's attention, and images in a batch on a GPU and on a CPU."""

    model: str
    shape: Shape
    gpu_batch: int
    cpu_batch: int


CASES = [
    Case("ViT-Ti, 32/4", Shape(1, 3, 65, 64), 512, 16),
    Case("ViT-S, 224/16", Shape(1, 6, 197, 64), 256, 4),
    Case("ViT-B, 224/16", Shape(1, 12, 197, 64), 128, 4),
    Case("ViT-L, 224/16", Shape(1, 16, 197, 64), 128, 4),
]


def main() -> None:
    """Print a table and, if asked, append one JSON line per kernel and case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=repeats, default=20, help="measurements of each kernel")
    parser.add_argument("--output", type=Path, help="append JSON lines to this file")
    arguments = parser.parse_args()
    for row in rows(arguments.repeats):
        print_row(row)
        append([row], arguments.output)


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    share = row["per_flash"]
    print(
        f"{row['case']:<24} {row['dtype']:<5} {row['implementation']:<10} "
        f"{'deterministic' if row['deterministic'] else 'any order':<14}"
        f"p20 {row['p20_ms']:8.3f}  p50 {row['p50_ms']:8.3f}  p80 {row['p80_ms']:8.3f} ms"
        + ("" if share is None else f"  {share:.2f} of flash's time")
    )


def rows(num_repeats: int) -> Iterator[dict[str, Any]]:
    """A row for every kernel that works, case by case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    for case in CASES:
        for dtype in (torch.bfloat16,) if on_gpu else (torch.bfloat16, torch.float32):
            for is_deterministic in (True, False) if on_gpu else (False,):
                with deterministic(is_deterministic):
                    yield from rows_of(case, dtype, is_deterministic, device, num_repeats)


def rows_of(
    case: Case, dtype: torch.dtype, is_deterministic: bool, device: torch.device, num_repeats: int
) -> Iterator[dict[str, Any]]:
    """The kernels that work for one case, measured in turn."""
    batch = case.gpu_batch if device.type == "cuda" else case.cpu_batch
    usable, _ = usable_backends(case.shape, batch, dtype, device)
    inputs = random_inputs(case.shape, batch, dtype, device)
    times: dict[str, list[float]] = {name: [] for name in usable}
    for index in range(2 + num_repeats):
        for name in usable:
            activate(name)
            elapsed = milliseconds(partial(run_backend, name, inputs), inputs[0].device)
            if index >= 2:
                times[name].append(elapsed)
    figures = {name: quantiles(values) for name, values in times.items()}
    flash = figures["flash"]["p50_ms"] if "flash" in figures else None
    for name, values in figures.items():
        yield {
            "what": "attention",
            "implementation": name,
            "case": f"{case.model}, batch {batch}",
            "dtype": dtype_name(dtype),
            "deterministic": is_deterministic,
            **values,
            "per_flash": None if flash is None else round(values["p50_ms"] / flash, 3),
            **origin(device),
        }


@contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:
    """Torch uses deterministic algorithms, or any, for a while."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


if __name__ == "__main__":
    main()
