"""Loads the native library, finds Triton, says what is live, and reads the environment."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "libsafer_fast_cpu.so"
REBUILD = "make native"


@dataclass(frozen=True)
class NativeStatus:
    """What serves the operations here; where a field is None, its `_reason` says why."""

    library: str | None
    library_reason: str
    triton: str | None
    triton_reason: str


@functools.cache
def native_status() -> NativeStatus:
    """The native library is loaded, if there is one, and the answer says what is live.

    Raises ImportError when the library is there but was built for another torch or does not load.
    """
    library_reason = why_no_library()
    if not library_reason:
        load_library(LIBRARY)
    triton = find_triton()
    return NativeStatus(
        library=None if library_reason else str(LIBRARY),
        library_reason=library_reason,
        triton=triton,
        triton_reason="" if triton else "triton is not installed",
    )


def why_no_library() -> str:
    """Empty when the native library is to be loaded, else the reason why not."""
    if os.environ.get("SAFER_FAST_NATIVE", "1") == "0":
        return "switched off by SAFER_FAST_NATIVE=0"
    if not LIBRARY.exists():
        return f"not built: run `{REBUILD}`"
    return ""


def load_library(path: Path) -> None:
    """The library's kernels are registered with the PyTorch dispatcher."""
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        built_for = ctypes.CDLL(str(path)).safer_fast_torch_version
    except (OSError, AttributeError) as error:
        raise ImportError(f"{path} does not load, rebuild it with `{REBUILD}`: {error}") from error
    built_for.restype = ctypes.c_char_p
    version = built_for().decode()
    # Tensors may be laid out differently in another torch: running on would corrupt memory.
    if version != torch.__version__:
        raise ImportError(
            f"{path} was built for torch {version}, this is {torch.__version__}: "
            f"rebuild it with `{REBUILD}`"
        )


@functools.cache
def find_triton() -> str | None:
    """The version of Triton, which is not imported for this."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
