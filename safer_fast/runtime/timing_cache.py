"""What is timed once on a machine, then remembered: a repeated run computes as the first did."""

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
    """A file in the user's cache folder; one that remembers nothing for a user without a home."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(folder).is_absolute():  # the XDG specification: to be taken as unset
        with suppress(RuntimeError):
            return Path.home() / ".cache" / "safer_fast" / name
        folder = os.devnull  # such a user measures each time
    return Path(folder) / "safer_fast" / name


def remembered(file: Path, parse: Callable[[Any], T]) -> dict[str, T]:
    """What is in the file, by key: nothing where it is missing or damaged.

    parse: makes an entry of what JSON has; raises ValueError, TypeError or AttributeError.
    """
    try:
        return {key: parse(value) for key, value in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def remember(file: Path, key: str, value: T, parse: Callable[[Any], T]) -> T:
    """What counts from now on: what another process wrote meanwhile comes first.

    A folder that cannot be written to costs a measurement in the next run.
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
    """The hardware and software that times of a device hang on."""
    name = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name} {torch.__version__}"


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one run; of a GPU without the launches, as in a CUDA graph."""
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]  # ticks: outlasts the launches
    before.record()
    run()
    after.record()
    torch.cuda.synchronize(device)
    return float(before.elapsed_time(after))
