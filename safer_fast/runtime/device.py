"""Runtime of a process: device, precision, determinism, compilation and CUDA graphs."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import torch

from safer_fast import kernels
from safer_fast.config.schema import RuntimeConfig
from safer_fast.runtime.cuda_graphs import CudaRecorder, Replays

# Operations of the shortest run that wins back the time of compiling, or of capturing. Measured on
# a CPU, where compiled blocks gain a fifth in bf16 and nothing in fp32; estimated for a GPU
# (docs/performance.md).
COMPILING_PAYS_FROM = {
    ("cpu", torch.float32): inf,
    ("cpu", torch.bfloat16): 1.5e14,
    ("cuda", torch.float32): 5e15,
    ("cuda", torch.bfloat16): 2e16,
}
CAPTURING_PAYS_FROM = 1e14
_MALLOC = {"M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 * 2**20), "M_MMAP_MAX": (-4, 0)}


@dataclass(frozen=True)
class Runtime:
    """Device and precision of a run; `notes`: lines on fast paths that are off, and why."""

    device: torch.device
    compute_dtype: torch.dtype
    is_compiled: bool
    is_captured: bool
    notes: tuple[str, ...]

    def generator(self, seed: int) -> torch.Generator:
        """A seeded generator on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def replays(self, report: Callable[[str], None] = print) -> Replays:
        """An object that runs the phases of a step, as CUDA graphs or eagerly."""
        return Replays(CudaRecorder(self.device) if self.is_captured else None, report)

    def peak_memory_mib(self) -> float:
        """Peak memory of the run so far: allocated on the GPU, or resident on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def prepare_runtime(config: RuntimeConfig, amp: str = "off", local_rank: int = 0) -> Runtime:
    """Set up the process for the configured device, with deterministic results.

    local_rank: number of the GPU on this machine. Settings of `auto` stay off until `decide_auto`.
    Raises ValueError for CUDA on a machine without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ValueError(
            "--runtime.device: expected cpu or auto on a machine without a GPU, got cuda"
        )
    device = torch.device("cpu")
    if has_gpu and config.device != "cpu":
        device = torch.device("cuda", local_rank)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if device.type == "cuda":
        # the promise is: same seed, same machine, same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32  # torch's own default multiplies so
    else:
        keep_memory()
    return Runtime(
        device=device,
        compute_dtype=torch.bfloat16 if amp == "bf16" else torch.float32,
        is_compiled=config.compile == "on",
        is_captured=config.cuda_graph == "on" and device.type == "cuda",
        notes=tuple(_kernel_notes(device)),
    )


def decide_auto(runtime: Runtime, config: RuntimeConfig, num_operations: float) -> Runtime:
    """Return the runtime with `auto` decided for a run of this many floating-point operations.

    The decision depends on no measurement: a repeated run computes the same bits.
    """
    kind = runtime.device.type
    notes = list(runtime.notes)
    pays_from = COMPILING_PAYS_FROM[kind, runtime.compute_dtype]
    is_compiled = _is_wanted(config.compile, num_operations >= pays_from)
    if not is_compiled:
        notes.append(f"torch.compile: off ({_reason('compile', config.compile, pays_from)})")
    is_captured = _is_wanted(config.cuda_graph, num_operations >= CAPTURING_PAYS_FROM)
    if kind != "cuda":
        is_captured = False
        notes.append("CUDA graphs: off (no GPU is used)")
    elif not is_captured:
        reason = _reason("cuda_graph", config.cuda_graph, CAPTURING_PAYS_FROM)
        notes.append(f"CUDA graphs: off ({reason})")
    return replace(runtime, is_compiled=is_compiled, is_captured=is_captured, notes=tuple(notes))


def allow_recompiling() -> None:
    """Allow compiling the same code again for each shape and each set of weights with gradients.

    Past its limit torch silently runs eagerly. torch before 2.12 reuses code compiled for weights
    without gradients (https://github.com/pytorch/pytorch/pull/177158).
    """
    torch._dynamo.config.recompile_limit = 64
    if torch.__version__ < "2.12":  # a TorchVersion, not compared as text
        torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False


def keep_memory() -> bool:
    """Keep memory that a step on the CPU frees in the process, ready for the next step.

    glibc would return large blocks to the system at once, which has to clear them again. Returns
    False with other C libraries, which are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return sys.platform == "linux" and all(mallopt(*setting) for setting in _MALLOC.values())


def _is_wanted(setting: str, pays: bool) -> bool:
    return setting == "on" or (setting == "auto" and pays)


def _reason(name: str, setting: str, pays_from: float) -> str:
    if setting == "off":
        return f"runtime.{name}=off"
    reason = "the run is too short for it" if pays_from < inf else "no gain in fp32 on a CPU"
    return f"{reason}; runtime.{name}=on forces it"


def _kernel_notes(device: torch.device) -> list[str]:
    """A note if the package's own kernels are off, as a list."""
    status = kernels.native_status()
    if device.type == "cpu" and status.library is None:
        return [f"native kernels: off, plain PyTorch runs instead ({status.library_reason})"]
    if device.type == "cuda" and status.triton is None:
        return [f"Triton kernels: off, plain PyTorch runs instead ({status.triton_reason})"]
    return []
