"""Cache of timings on disk, so that a repeated run makes the same choices as the first."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def cache_file(name: str) -> Path:
    """Path of a file in the user's cache folder; without a home it stores nothing."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(folder).is_absolute():  # to be treated as unset, by the XDG specification
        with suppress(RuntimeError):
            return Path.home() / ".cache" / "safer_fast" / name
        folder = os.devnull  # nothing is cached
    return Path(folder) / "safer_fast" / name


def remembered(file: Path, parse: Callable[[Any], T]) -> dict[str, T]:
    """Read the entries of a cache file by key; none if it is missing or damaged.

    parse: converts a JSON value; raises ValueError, TypeError or AttributeError.
    """
    try:
        return {key: parse(value) for key, value in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def remember(file: Path, key: str, value: T, parse: Callable[[Any], T]) -> T:
    """Store an entry and return the valid one: an entry of another process takes precedence.

    If the folder cannot be written to, the next run measures again.
    """
    entries = {key: value, **remembered(file, parse)}
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(entries, indent=1))
        part.replace(file)
    except OSError:
        with suppress(OSError):
            part.unlink()
    return entries[key]


def machine(device: torch.device) -> str:
    """Name of the hardware and software that timings of a device depend on."""
    name = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name} {torch.__version__}"


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one run; on a GPU without the launches, as in a CUDA graph."""
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # ticks, 5 ms or more: outlasts the launches of a compiled forward and backward pass
    torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
    before.record()
    run()
    after.record()
    torch.cuda.synchronize(device)
    return float(before.elapsed_time(after))
