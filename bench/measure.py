"""Helpers of all benchmarks: waiting for the device, quantiles, and where a figure comes from."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.ops import commit, device_name
from safer_fast.config.schema import SAVINGS
from safer_fast.kernels import native_status

Run = Callable[[], object]
Result = TypeVar("Result")


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make `main` end with one line and status 2 for input that is missing or does not fit."""

    @wraps(main)
    def run() -> None:
        try:
            main()
        except OSError as error:
            named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            sys.exit(_refused(named))
        except ValueError as error:
            sys.exit(_refused(str(error)))

    return run


def _refused(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Milliseconds from an idle device until `run` is done and it is idle again, and the result."""
    wait(device)
    started = time.perf_counter()
    result = run()
    wait(device)
    return (time.perf_counter() - started) * 1e3, result


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantiles(times_ms: Sequence[float]) -> dict[str, float]:
    """The fields p20_ms, p50_ms and p80_ms of a row, of at least two times."""
    p20, *_, p80 = statistics.quantiles(times_ms, n=5)
    values = {"p20_ms": p20, "p50_ms": statistics.median(times_ms), "p80_ms": p80}
    return {name: round(value, 3) for name, value in values.items()}


def medians(samples: Iterable[dict[str, float]]) -> dict[str, float]:
    """The median of each field over all samples, in milliseconds."""
    columns: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.items():
            columns.setdefault(name, []).append(value)
    return {name: round(statistics.median(values), 3) for name, values in columns.items()}


def origin(device: torch.device) -> dict[str, Any]:
    """The fields of a row that say on what, with what and when it was measured."""
    return {
        "device": device_name(device.type),
        "torch": torch.__version__,
        "triton": native_status().triton,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def append(rows: Iterable[dict[str, Any]], path: Path | None) -> None:
    """Append one JSON line for each row to the file, if there is one."""
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def repeats(text: str) -> int:
    """The number of measurements typed: argparse's type for it."""
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2 for quantiles, got {text}")
    return number


def savings(text: str) -> str:
    """Names of exact savings with commas, or nothing: argparse's type for them."""
    return some_of(SAVINGS, text) if text else text


def some_of(names: Sequence[str], text: str) -> str:
    """The words typed, if all are among the names."""
    unknown = [word for word in text.split(",") if word not in names]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(names)}, got {', '.join(unknown)}"
        )
    return text


def check_gpu(parser: argparse.ArgumentParser, flag: str, is_wanted: bool) -> None:
    """End with one line if `flag` asks for CUDA graphs where there is no GPU."""
    if is_wanted and not torch.cuda.is_available():
        parser.error(f"{flag}: expected a machine with a GPU for CUDA graphs, got none")
