"""Building of the native CPU library with CMake, for the torch that is installed.

setup.py builds wheels and editable installations with it, `safer-fast doctor --build-native` the
library of an installed package. Both run it as a file: as a part of safer_fast.kernels it would
load the old library first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

KERNELS = Path(__file__).parent
LIBRARY = "libsafer_fast_cpu.so"


def build_installed() -> Path:
    """Build the library of the installed package, beside its sources; returns its path.

    Raises ValueError if something that the build needs is missing, or a compiler fails.
    """
    if reason := why_no_build():
        raise ValueError(f"--build-native: {reason}")
    with tempfile.TemporaryDirectory(prefix="safer_fast-") as folder:
        try:
            target = build_library(Path(folder), KERNELS / LIBRARY)
        except subprocess.CalledProcessError as error:
            raise ValueError(f"--build-native: building failed: {error}") from error
    _let_pip_remove(target)
    return target


def why_no_build() -> str:
    """Reason why the library cannot be built here, and a remedy; empty if it can."""
    if os.environ.get("SAFER_FAST_NATIVE", "1") == "0":
        return "SAFER_FAST_NATIVE=0"
    if find_spec("torch") is None:
        return "torch is not importable here; install torch, then pip with --no-build-isolation"
    if find_program("cmake") is None:
        return "CMake is missing; install cmake (pip install cmake ninja) and try again"
    compilers = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    if not any(map(shutil.which, compilers)):
        return "no C++ compiler; install g++ or clang++ and try again"
    return ""


def find_program(name: str) -> str | None:
    """The program on the path or beside this Python, whose environment may not be activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def build_library(folder: Path, target: Path, source: Path = KERNELS) -> Path:
    """Build `source`, by default the files beside this one, in `folder`; the library is `target`.

    Raises CalledProcessError if CMake or the compiler fails; they say why on standard error.
    """
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    settings = {
        "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
        "TORCH_LIBRARY_DIR": library_paths()[0],
        "TORCH_VERSION": torch.__version__,
        "TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
    }
    cmake = find_program("cmake")
    assert cmake is not None
    configure = [cmake, "--fresh", "-S", str(source), "-B", str(folder)]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    ninja = find_program("ninja")
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", str(folder), "--parallel"], check=True, stdout=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    # a process that has the old library loaded keeps it: the new one is another file
    shutil.copyfile(folder / LIBRARY, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)
    return target


def _let_pip_remove(library: Path) -> None:
    """Enter the library in the list of installed files: no later version may find it there."""
    try:
        installed = distribution("safer_fast")
    except PackageNotFoundError:
        return
    record = next((file for file in installed.files or [] if file.name == "RECORD"), None)
    name = "safer_fast/kernels/" + LIBRARY
    if record is None or installed.locate_file(name) != library:
        return  # a source tree
    path = Path(str(installed.locate_file(record)))
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(f"{name},")]
    path.write_text("\n".join([*kept, f"{name},,"]) + "\n")
