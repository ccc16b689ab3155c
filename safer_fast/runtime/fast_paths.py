"""Checks of the doctor: each tries a fast path, and names a remedy if it is off."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from safer_fast.config.messages import first_line
from safer_fast.runtime.machine import lines_of, num_usable_cores

_IS_SOURCE_TREE = (Path(__file__).parents[2] / "setup.py").is_file()
_INSTALL = "make install" if _IS_SOURCE_TREE else "install safer_fast again with pip"
_BUILD = "make native" if _IS_SOURCE_TREE else "safer-fast doctor --build-native"
# Headers included by compiled code of a block: torch.compile needs a compiler that finds them all.
_PROBE = "#include <Python.h>\n#include <omp.h>\n#include <vector>\nint main() { return 0; }\n"
OPTIONAL = {
    "pyautoattack": "evaluate --attacks autoattack",
    "peft": "selection.lora_rank",
    "onnx": "export --format onnx",
    "onnxscript": "export --format onnx",
    "onnxruntime": "the check of what export --format onnx writes",
    "wandb": "metrics at Weights & Biases",
    "torchattacks": "bench.peers and the tests against it",
}
"""Optional packages, and their purpose."""


@dataclass(frozen=True)
class Check:
    """Result of one check: the state of a fast path, details, and a remedy if it is off."""

    name: str
    is_live: bool
    detail: str
    remedy: str | None = None


def diagnose() -> list[Check]:
    """Run all checks, in the order in which one would repair a machine; nothing is changed."""
    return [
        Check("python", True, platform.python_version()),
        _torch(),
        _gpu(),
        _package("timm", "models cannot be built"),
        _native(),
        _triton(),
        _compile(),
        _graphs(),
        _attention(),
        _bf16(),
        _apex(),
        _threads(),
        *(_optional(name, purpose) for name, purpose in OPTIONAL.items()),
    ]


def build_native() -> None:
    """Build the native library for the torch that is installed; raises ValueError if it fails."""
    spec = find_spec("safer_fast.kernels")  # not imported: that loads the library
    assert spec is not None
    assert spec.submodule_search_locations is not None
    runpy.run_path(f"{spec.submodule_search_locations[0]}/_build.py")["build_installed"]()


def _torch() -> Check:
    import torch

    built_for = (
        f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    )
    return Check("torch", True, f"{torch.__version__}, {built_for}")


def _gpu() -> Check:
    import torch

    if not torch.version.cuda:
        return Check(
            "gpu",
            False,
            "torch is built without CUDA",
            f"install torch from the default registry: {_INSTALL}",
        )
    if not torch.cuda.is_available():
        return Check("gpu", False, "no GPU that torch can use", _gpu_remedy())
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("gpu", True, f"{len(names)}: {', '.join(dict.fromkeys(names))}")


def _gpu_remedy() -> str:
    """Remedy for a missing GPU; with a driver the cause is a version or visibility."""
    if shutil.which("nvidia-smi") is None:
        return "use a machine with an NVIDIA GPU and its driver; the CPU is for small runs"
    return (
        "nvidia-smi is there: compare the CUDA version it prints with the one torch is built for, "
        "and look whether CUDA_VISIBLE_DEVICES hides the GPU"
    )


def _package(name: str, consequence: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, False, f"not installed: {consequence}", _INSTALL)


def _optional(name: str, purpose: str) -> Check:
    """Check an optional package by its version: importing all of them would take seconds."""
    try:
        return Check(name, True, f"{version(name)}, for {purpose}")
    except PackageNotFoundError:
        # its requirements name an old version of requests
        options = "--no-deps " if name == "torchattacks" else ""
        remedy = f"only for {purpose}: pip install {options}{name}"
        return Check(name, False, "not installed", remedy)


def _native() -> Check:
    try:
        from safer_fast.kernels import native_status
    except ImportError as error:
        return Check("native library", False, str(error), _BUILD)
    status = native_status()
    if status.library is not None:
        return Check("native library", True, Path(status.library).name)
    reason = f"{status.library_reason}; plain PyTorch serves the CPU instead"
    is_off = "SAFER_FAST_NATIVE" in status.library_reason
    remedy = "unset SAFER_FAST_NATIVE" if is_off else _BUILD
    return Check("native library", False, reason, remedy)


def _triton() -> Check:
    import torch

    found = _package("triton", "plain PyTorch serves the GPU instead")
    if found.is_live and not torch.cuda.is_available():
        return Check("triton", False, f"{found.detail}, but no GPU to compile for", "see gpu")
    return found


def _compile() -> Check:
    """Check for a compiler that finds the headers of Python, OpenMP and C++."""
    import torch

    if torch.cuda.is_available() and not _triton().is_live:
        return Check("torch.compile", False, "on a GPU it needs triton", "see triton")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    package = "install a C++ compiler and Python's headers, e.g. apt-get install g++ python3-dev"
    if compiler is None:
        return Check("torch.compile", False, "no C++ compiler", package)
    problem = _compiler_problem(compiler)
    if problem:
        return Check("torch.compile", False, f"{compiler}: {problem}", package)
    return Check("torch.compile", True, f"with {compiler}")


def _graphs() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("cuda graphs", False, "no GPU to capture on", "see gpu")
    total, graph = torch.zeros((), device="cuda"), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            total.add_(1)
        graph.replay()
    except RuntimeError as error:
        reason = first_line(error)
        return Check("cuda graphs", False, reason, "train with --runtime.cuda_graph off")
    is_right = float(total) == 1
    detail = "captured and replayed" if is_right else f"a replay gave {float(total)}, expected 1"
    remedy = None if is_right else "train with --runtime.cuda_graph off"
    return Check("cuda graphs", is_right, detail, remedy)


def _attention() -> Check:
    """Try torch's attention kernels, FA3 and FA4 among them, on 2 images of a ViT-S in bf16."""
    import torch

    from safer_fast.runtime.attention import BACKENDS, Shape, usable_backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        case = (Shape(1, 6, 197, 64), 2, torch.bfloat16, device)
        names = list(BACKENDS) if device.type == "cuda" else None
        usable, refused = usable_backends(*case, names)
    except RuntimeError as error:
        return Check("attention", False, first_line(error), "see gpu")
    fused = [name for name in usable if name != "math"]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    detail = f"{', '.join(usable)} work" + (f" ({reasons})" if reasons else "")
    remedy = None if fused else "plain products are slow for long sequences: update torch"
    return Check("attention", bool(fused), detail, remedy)


def _compiler_problem(compiler: str) -> str:
    """First error of the compiler on a program like those of torch.compile; empty if none."""
    words = [*compiler.split(), "-x", "c++", "-fsyntax-only", "-fopenmp"]
    words += [f"-I{sysconfig.get_paths()['include']}", "-"]
    try:
        result = subprocess.run(
            words, input=_PROBE, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    return lines[0] if lines else f"exit status {result.returncode}"


def _bf16() -> Check:
    import torch

    if torch.cuda.is_available():
        is_live = torch.cuda.is_bf16_supported(including_emulation=False)
        detail = "the GPU multiplies in bfloat16" if is_live else "this GPU only emulates bfloat16"
        return Check("bf16", is_live, detail, None if is_live else "train with --amp off")
    found = sorted(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    if found:
        return Check("bf16", True, f"the CPU multiplies in bfloat16 ({', '.join(found)})")
    detail = "no bfloat16 instructions found on this CPU: bf16 works, but slower than float32"
    return Check("bf16", False, detail, "train with --amp off")


def _cpu_flags() -> set[str]:
    """Instruction set flags of the processor on Linux; empty elsewhere."""
    lines = lines_of("/proc/cpuinfo")
    words = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "feat")))
    return set(next(words, "").split())


def _apex() -> Check:
    """Check for NVIDIA apex by its extension: the PyPI package `apex` is another project."""
    remedy = (
        "only for optim.name=apex-...: build it from source (https://github.com/NVIDIA/apex); "
        "torch's fused optimizers are the default"
    )
    try:
        import amp_C  # noqa: F401
    except ImportError as error:
        if find_spec("apex") is None:
            return Check("apex", False, "not installed", remedy)
        if find_spec("amp_C") is not None:
            return Check("apex", False, f"amp_C does not load: {error}", remedy)
        detail = "a package named apex is there, but not NVIDIA's fused kernels (amp_C)"
        return Check("apex", False, detail, f"pip uninstall apex; {remedy}")
    return Check("apex", True, "fused optimizers (amp_C)")


def _threads() -> Check:
    import torch

    threads, cores = torch.get_num_threads(), num_usable_cores()
    detail = f"{threads} of {cores} usable cores"
    # with two hardware threads per core, torch chooses half of their number
    if 2 * threads >= cores:
        return Check("cpu threads", True, detail)
    remedy = "unset OMP_NUM_THREADS or give --runtime.num_threads"
    return Check("cpu threads", False, detail, remedy)


_LEAST_DISK_GIB = 5
_LEAST_DISK_MIB_PER_S = 50
_WRITTEN_MIB = 64


def check_disk(output: str | None) -> Check:
    """Check free space and write speed of the disk of `output`, or of the current folder."""
    folder = Path(output or ".").absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    where = output or "the current folder"
    try:
        speed = _write_speed(folder)
    except OSError as error:
        detail = f"{where} cannot be written: {error.strerror or error}"
        return Check("disk", False, detail, "put --output where you may write, or make room")
    free = shutil.disk_usage(folder).free / 2**30
    detail = f"{free:,.1f} GiB free, {speed:,.0f} MiB/s written, for {where}"
    if free < _LEAST_DISK_GIB:
        return Check("disk", False, detail, "make room, or put --output on another disk")
    if speed < _LEAST_DISK_MIB_PER_S:
        remedy = (
            "put --output on a faster disk, or write fewer checkpoints (--checkpoint.every_minutes)"
        )
        return Check("disk", False, detail, remedy)
    return Check("disk", True, detail)


def _write_speed(folder: Path) -> float:
    """Write speed of a temporary file to the disk, in MiB/s."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.monotonic()
        for _ in range(_WRITTEN_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN_MIB / max(time.monotonic() - started, 1e-9)
