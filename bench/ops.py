"""Times of every kernel beside plain PyTorch and a plain copy of the same bytes, in one run.

    python -m bench.ops [--output FILE.jsonl] [--repeats 15]

The three alternate, so that a busy machine slows all of them. `ratio_reference` says how many times
faster than plain PyTorch, `ratio_copy` what part of the speed of a copy: 1 is as fast as memory
allows.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from safer_fast.kernels import (
    l2_step_,
    linf_step_,
    native_status,
    perturb_,
    restore_,
    sum_squares,
)
from safer_fast.kernels.attack import reference as attack_reference
from safer_fast.kernels.sam import reference as sam_reference
from tests.support.cases import ATTACK_BENCH, SAM_BENCH, Case, attack_inputs, sam_inputs

WARM_UP = 3


@dataclass(frozen=True)
class Operation:
    """One operation on one case: ours, plain PyTorch, and the bytes that one pass has to move."""

    what: str
    case: str
    dtype: str
    ours: Callable[[], object]
    reference: Callable[[], object]
    num_bytes: int


@dataclass(frozen=True)
class Result:
    """One line of output; times in milliseconds, bytes read plus bytes written."""

    what: str
    implementation: str
    case: str
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    bytes: int
    ratio_reference: float
    ratio_copy: float
    device: str
    torch: str
    triton: str | None
    commit: str
    date: str


def main() -> None:
    """Print the table and, if asked, append one JSON line per result to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="append one JSON line per result to this file")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each, default 15")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device_name(device)}, torch {torch.__version__}, {native_status()}")
    for operation in operations(device):
        results = measure(operation, device, arguments.repeats)
        print_results(operation, results)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.writelines(json.dumps(asdict(result)) + "\n" for result in results)


def operations(device: str) -> Iterator[Operation]:
    """Every operation on every benchmark case, its inputs made when its turn comes."""
    for case in ATTACK_BENCH:
        yield from attack_operations(case, device)
    for case in SAM_BENCH:
        yield from sam_operations(case, device)


def attack_operations(case: Case, device: str) -> Iterator[Operation]:
    """Both steps; a second pass of L2 is inevitable, the norms come first."""
    inputs = attack_inputs(case, device)
    step = torch.tensor(2 / 255, device=device), torch.tensor(8 / 255, device=device)
    dtype = dtype_name(case.gradient_dtype)
    num_read = sum(tensor.nbytes for tensor in inputs)
    num_written = inputs[0].nbytes
    yield Operation(
        "linf_step_",
        case.name,
        f"fp32, gradient {dtype}",
        lambda: linf_step_(*inputs, *step),
        lambda: attack_reference.linf_step_(*inputs, *step),
        num_read + num_written,
    )
    yield Operation(
        "l2_step_",
        case.name,
        f"fp32, gradient {dtype}",
        lambda: l2_step_(*inputs, *step),
        lambda: attack_reference.l2_step_(*inputs, *step),
        2 * num_read + num_written,
    )


def sam_operations(case: Case, device: str) -> Iterator[Operation]:
    """Norm, perturbation into bf16, and restore."""
    compute, master, gradient = sam_inputs(case, torch.bfloat16, device)
    scale = torch.tensor(0.05, device=device)
    dtype = dtype_name(case.gradient_dtype)
    weights: list[Tensor | None] = [None, master]
    for weight in weights:

        def ours(weight: Tensor | None = weight) -> Tensor:
            return sum_squares(gradient, weight)

        def reference(weight: Tensor | None = weight) -> Tensor:
            return sam_reference.sum_squares(gradient, weight)

        what = "sum_squares" if weight is None else "sum_squares weighted"
        num_bytes = gradient.nbytes + (0 if weight is None else weight.nbytes)
        yield Operation(what, case.name, dtype, ours, reference, num_bytes)
    for adaptive in (False, True):

        def perturb(adaptive: bool = adaptive) -> Tensor:
            return perturb_(compute, master, gradient, scale, adaptive)

        def perturb_plainly(adaptive: bool = adaptive) -> None:
            sam_reference.perturb_(compute, master, gradient, scale, adaptive)

        what = "perturb_ adaptive" if adaptive else "perturb_"
        num_bytes = compute.nbytes + master.nbytes + gradient.nbytes
        dtypes = f"bf16, gradient {dtype}"
        yield Operation(what, case.name, dtypes, perturb, perturb_plainly, num_bytes)
    if case.gradient_dtype == torch.float32:
        yield Operation(
            "restore_",
            case.name,
            "bf16",
            lambda: restore_(compute, master),
            lambda: sam_reference.restore_(compute, master),
            compute.nbytes + master.nbytes,
        )


def measure(operation: Operation, device: str, repeats: int) -> list[Result]:
    """Ours, plain PyTorch and a copy, measured in turn."""
    source = torch.ones(operation.num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    runs: dict[str, Callable[[], object]] = {
        implementation(device): operation.ours,
        "reference": operation.reference,
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(WARM_UP + repeats):
        for name, run in runs.items():
            elapsed = time_ms(run, device)
            if repeat >= WARM_UP:
                times[name].append(elapsed)
    return [result_of(operation, name, times, device) for name in runs]


def time_ms(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call; on the GPU without the launch, which a spinning kernel hides."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10_000_000)
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def result_of(
    operation: Operation, name: str, times: dict[str, list[float]], device: str
) -> Result:
    """One implementation's quantiles, and its ratios to the medians of the other two."""
    medians = {other: statistics.median(values) for other, values in times.items()}
    p20, *_, p80 = statistics.quantiles(times[name], n=5)
    return Result(
        what=operation.what,
        implementation=name,
        case=operation.case,
        dtype=operation.dtype,
        p20_ms=round(p20, 4),
        p50_ms=round(medians[name], 4),
        p80_ms=round(p80, 4),
        bytes=operation.num_bytes,
        ratio_reference=round(medians["reference"] / medians[name], 3),
        ratio_copy=round(medians["copy"] / medians[name], 3),
        device=device_name(device),
        torch=torch.__version__,
        triton=native_status().triton,
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def print_results(operation: Operation, results: list[Result]) -> None:
    """A line per implementation."""
    megabytes = f"{operation.num_bytes / 1e6:.0f} MB"
    print(f"\n{operation.what}, {operation.case}, {operation.dtype}, {megabytes}")
    for result in results:
        print(
            f"  {result.implementation:10} p20 {result.p20_ms:9.3f}  p50 {result.p50_ms:9.3f}  "
            f"p80 {result.p80_ms:9.3f} ms   {result.ratio_reference:7.2f} x reference   "
            f"{result.ratio_copy:5.2f} x copy"
        )


def implementation(device: str) -> str:
    """The implementation that serves the operations here."""
    if device == "cuda":
        return "triton" if native_status().triton else "fallback"
    return "native" if native_status().library else "fallback"


def device_name(device: str) -> str:
    """The GPU's name, or the CPU with the number of threads and its widest vectors."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def dtype_name(dtype: torch.dtype) -> str:
    """bf16 for torch.bfloat16, and so on."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def commit() -> str:
    """The commit that was measured, empty outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


if __name__ == "__main__":
    main()
