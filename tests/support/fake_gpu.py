"""A GPU that is not there: torch's own CUDA code runs on it, and what it asks for is counted.

The sources in fake_gpu/ are built into a library that is loaded before torch, in its own process.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "fake_gpu"
COUNTS = (
    "launches",
    "graph_launches",
    "waits",
    "copies_in",
    "copies_out",
    "allocations",
    "violations",
    "bytes_used",
)
_LIBRARY = "FAKE_GPU_LIBRARY"


def why_not() -> str | None:
    """The reason why the library cannot be built here, None if it can."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if sys.platform != "linux":
        return "libraries are preloaded on Linux only"
    if shutil.which("gcc") is None:
        return "no gcc"
    if not torch.version.cuda:
        return "torch is built without CUDA"
    missing = [name for name, folder in _headers().items() if folder is None]
    return f"no {missing[0]} among the packages" if missing else None


def build(folder: Path) -> None:
    """Build the library into a folder, under the names by which torch and Triton look for it."""
    folder.mkdir(exist_ok=True)
    words = ["gcc", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1"]
    words += [f"-I{directory}" for directory in _headers().values()]
    words += [*map(str, sorted(SOURCES.glob("*.c"))), "-lpthread", "-o"]
    subprocess.run([*words, str(folder / "libcuda.so.1")], check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")


def run(library: Path, module: str, *arguments: str) -> list[dict[str, Any]]:
    """Run a module with the fake GPU; return the JSON lines that it prints.

    library: the folder that `build` filled.
    """
    words = [sys.executable, "-m", module, *arguments]
    environment = environment_with(library)
    result = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def environment_with(library: Path) -> dict[str, str]:
    """The environment of a process that has the fake GPU."""
    places = dict.fromkeys(("TRITON_LIBCUDA_PATH", "LIBRARY_PATH"), str(library))
    preloaded = str(library / "libcuda.so.1")
    places |= {"LD_PRELOAD": preloaded, _LIBRARY: preloaded}
    return os.environ | places | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


class FakeGpu:
    """The GPU of a process that `run` started."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ[_LIBRARY])
        self._library.fake_gpu_last_violation.restype = ctypes.c_char_p
        self._library.fake_gpu_set_memory.argtypes = [ctypes.c_double]

    def counts(self) -> dict[str, int]:
        """What was asked for so far, by the names in `COUNTS`."""
        values = (ctypes.c_long * len(COUNTS))()
        self._library.fake_gpu_counts(values)
        return dict(zip(COUNTS, values, strict=True))

    def last_violation(self) -> str:
        """The last rule of stream capture that was broken; empty if none was."""
        return str(self._library.fake_gpu_last_violation().decode())

    def set_memory(self, gib: float) -> None:
        """Change the memory of the GPU."""
        self._library.fake_gpu_set_memory(gib)


def _headers() -> dict[str, Path | None]:
    """Folders of headers by the header that is needed: of the CUDA runtime, and of the driver."""
    site = Path(sysconfig.get_paths()["purelib"])
    places = {
        "cuda_runtime_api.h": site.glob("nvidia/*/include"),
        "cuda.h": site.glob("triton/backends/nvidia/include"),
    }
    return {
        name: next((folder for folder in folders if (folder / name).exists()), None)
        for name, folders in places.items()
    }
