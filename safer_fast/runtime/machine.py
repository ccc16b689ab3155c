"""Description of a machine: system, processor, memory, GPUs, driver, versions of packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safer_fast import __version__
from safer_fast.config.messages import first_line

_PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "safetensors", "jsonargparse")
Facts = dict[str, Any]


def describe_machine() -> Facts:
    """Collect facts for an issue, by name, without names of users, hosts or folders."""
    return {
        "safer_fast": __version__ + _commit(),
        "system": _system(),
        "cpu": _cpu(),
        "memory": _memory(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": _cuda(),
        "gpus": _gpus(),
    }


def num_usable_cores() -> int:
    """Number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def lines_of(file: str) -> list[str]:
    """Lines of a file of the system; none where it does not exist."""
    path = Path(file)
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _commit() -> str:
    """Commit of this checkout, and a mark if files in it are changed; empty if it is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f", commit {commit}{' with changes' if changes else ''}" if commit else ""


def _system() -> str:
    release = lines_of("/etc/os-release")
    names = [
        line.partition("=")[2].strip('"') for line in release if line.startswith("PRETTY_NAME")
    ]
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    libc = " ".join(platform.libc_ver())
    return ", ".join(part for part in (*names, kernel, libc) if part)


def _cpu() -> str:
    lines = lines_of("/proc/cpuinfo")
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.processor() or "unknown")
    return f"{model}, {num_usable_cores()} usable cores"


def _memory() -> str:
    """Total and available memory on Linux; `unknown` elsewhere."""
    lines = lines_of("/proc/meminfo")
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    if not {"MemTotal", "MemAvailable"} <= sizes.keys():
        return "unknown"
    total, free = (int(sizes[name]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GiB, {free:.1f} GiB available"


def _cuda() -> str:
    import torch

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    built_for = torch.version.cuda or "none"
    return f"torch built for {built_for}, driver {driver.splitlines()[0] if driver else 'none'}"


def _gpus() -> list[str]:
    """Name, memory and compute capability of each GPU that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> str:
    import torch

    about = torch.cuda.get_device_properties(index)
    memory = f"{about.total_memory / 2**30:.1f} GiB"
    try:
        free, _ = torch.cuda.mem_get_info(index)
        memory += f", {free / 2**30:.1f} GiB free"
    except RuntimeError as error:
        memory += f", does not work: {first_line(error)}"
    return f"{about.name}, {memory}, compute capability {about.major}.{about.minor}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _output(*words: str) -> str:
    """Output of a program; empty if it is missing, fails or hangs."""
    if shutil.which(words[0]) is None:
        return ""
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
