"""Peak memory of a run, and glibc's malloc as it is in a process that sets nothing."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from safer_fast.runtime.device import keep_memory

PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # proc(5): of clear_refs, since Linux 4.0
SETTLED = {
    "M_TRIM_THRESHOLD": (-1, 64 * 2**20),
    "M_TOP_PAD": (-2, 128 * 2**10),
    "M_MMAP_THRESHOLD": (-3, 32 * 2**20),
    "M_MMAP_MAX": (-4, 65536),
}


def peak_memory_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The most that `run` holds above what was held before it: of the GPU, or resident on the CPU.

    None on a CPU whose system does not say. A replayed CUDA graph allocates nothing and seems to
    need nothing: measure the same work as it is written.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        return round((torch.cuda.max_memory_allocated(device) - held) / 2**20, 1)
    resident = _reset_peak()
    run()
    return None if resident is None else round((_status("VmHWM") - resident) / 2**10, 1)


@contextmanager
def memory_handed_back(device: torch.device) -> Iterator[None]:
    """On a CPU large blocks go back to the system when they are freed, then no longer again.

    Our runtime keeps them (`runtime.keep_memory`), for the whole process. Others are to run as in a
    process of their own, where glibc raises its thresholds to the largest block that was freed, up
    to 32 MiB: they get that limit, which hands back least, and what is free already they may use.
    Both are in their favour. Other C libraries are left alone, and so is everything on a GPU.
    """
    mallopt = _glibc("mallopt") if device.type == "cpu" else None
    if mallopt is None:
        yield
        return
    for setting in SETTLED.values():
        mallopt(*setting)
    try:
        yield
    finally:
        keep_memory()


def _reset_peak() -> int | None:
    """Resident KiB after free memory went back to the system; the peak is counted from there."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)
    try:
        (PROCESS / "clear_refs").write_text(RESET_PEAK)
        return _status("VmRSS")
    except OSError:
        return None


def _status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, where that is glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    function: Callable[..., int] = getattr(library, name)
    return function
