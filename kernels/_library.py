"""Loading of the native library, detection of Triton, and their status."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "libsafer_fast_cpu.so"
IS_INSTALLED = not (Path(__file__).parents[1] / "setup.py").is_file()
REBUILD = "safer-fast doctor --build-native" if IS_INSTALLED else "make native"


@dataclass(frozen=True)
class NativeStatus:
    """Available implementations; where a field is None, its `_reason` says why."""

    library: str | None
    library_reason: str
    triton: str | None
    triton_reason: str


@functools.cache
def native_status() -> NativeStatus:
    """Load the native library, if there is one, and return the available implementations.

    Raises ImportError if the library exists but was built for another torch or does not load.
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
    """Reason why the native library is not loaded; empty if it is to be."""
    if os.environ.get("SAFER_FAST_NATIVE", "1") == "0":
        return "switched off by SAFER_FAST_NATIVE=0"
    if not LIBRARY.exists():
        return f"not built: run `{REBUILD}`"
    return ""


def load_library(path: Path) -> None:
    """Load a library, whose kernels register with the PyTorch dispatcher."""
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        built_for = ctypes.CDLL(str(path)).safer_fast_torch_version
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"{path} does not load, rebuild it with `{REBUILD}`: {error}", name="safer_fast.kernels"
        ) from error
    built_for.restype = ctypes.c_char_p
    version = built_for().decode()
    # another torch may lay out tensors differently, which would corrupt memory
    if version != torch.__version__:
        raise ImportError(
            f"{path} was built for torch {version}, this is {torch.__version__}: "
            f"rebuild it with `{REBUILD}`",
            name="safer_fast.kernels",
        )


@functools.cache
def find_triton() -> str | None:
    """Version of Triton, without importing it; None if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
