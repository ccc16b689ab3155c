"""The machine: device, precision, determinism, compilation, and what of it is live."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

import torch

from safer_fast import kernels
from safer_fast.config import RuntimeConfig
from safer_fast.network import RobustModel


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision a run computes; `notes` say what is not live, and why."""

    device: torch.device
    compute_dtype: torch.dtype
    is_compiled: bool
    notes: tuple[str, ...]

    def generator(self, seed: int) -> torch.Generator:
        """A generator on the device, seeded."""
        return torch.Generator(self.device).manual_seed(seed)

    def peak_memory_mib(self) -> float:
        """The most memory the run has held so far: of the GPU, or resident on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def prepare_runtime(config: RuntimeConfig, amp: str = "off") -> Runtime:
    """The process computes deterministically on the device that is asked for.

    Raises ValueError for CUDA on a machine without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ValueError(
            "--runtime.device: expected cpu or auto on a machine without a GPU, got cuda"
        )
    device = torch.device("cuda" if has_gpu and config.device != "cpu" else "cpu")
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if device.type == "cuda":
        # the promise is: same seed, same machine, same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    elif amp == "bf16":
        # the flash backward of the CPU takes 2 to 12 times as long as plain attention in bf16
        # (17 to 65 tokens), and plain attention computes in fp32 inside
        torch.backends.cuda.enable_flash_sdp(False)
    is_compiled = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    return Runtime(
        device=device,
        compute_dtype=torch.bfloat16 if amp == "bf16" else torch.float32,
        is_compiled=is_compiled,
        notes=tuple(_notes(config, device, is_compiled)),
    )


def compile_blocks(model: RobustModel) -> None:
    """Each block is compiled by itself on its first call; identical blocks share the code."""
    torch._dynamo.config.recompile_limit = 64  # past it compiled code silently runs eagerly
    for block in model.blocks:
        block.compile(dynamic=False)


def _notes(config: RuntimeConfig, device: torch.device, is_compiled: bool) -> list[str]:
    """One line for every fast path that is not live."""
    notes = []
    status = kernels.native_status()
    if device.type == "cpu" and status.library is None:
        notes.append(f"native kernels: off, plain PyTorch runs instead ({status.library_reason})")
    if device.type == "cuda" and status.triton is None:
        notes.append(f"Triton kernels: off, plain PyTorch runs instead ({status.triton_reason})")
    if not is_compiled:
        reason = "runtime.compile=off" if config.compile == "off" else "auto compiles on CUDA only"
        notes.append(f"torch.compile: off ({reason})")
    return notes
