"""Builds the native library with CMake, and maps the folder `kernels` to `safer_fast.kernels`.

Without torch in the build environment, CMake or a compiler, or with SAFER_FAST_NATIVE=0, the
package is installed without the library and runs its plain PyTorch operations. All other metadata:
pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIBRARY = "libsafer_fast_cpu.so"
SOURCES = ["kernels/csrc/register.cpp", "kernels/attack/cpu.cpp", "kernels/sam/cpu.cpp"]
DEPENDS = ["CMakeLists.txt", "kernels/csrc/ops.h", "kernels/csrc/vectorize.h"]


class BuildNative(build_ext):
    """Builds the one extension, a shared library without Python.h, with CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library keeps its own name: no Python version in it."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        """The library lies where setuptools looks for it, or one line says why it does not."""
        reason = why_no_build()
        if reason:
            print(f"safer_fast: installing without the native CPU library: {reason}")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        built = build_library(ROOT / "build" / "native")
        target.parent.mkdir(parents=True, exist_ok=True)
        # a process that has the old library loaded keeps it: the new one is another file
        shutil.copyfile(built, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)


def why_no_build() -> str:
    """Empty when everything that the build needs is here, else what is missing and what to do."""
    if os.environ.get("SAFER_FAST_NATIVE", "1") == "0":
        return "SAFER_FAST_NATIVE=0"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable here; install torch, then pip with --no-build-isolation"
    if find_program("cmake") is None:
        return "CMake is missing; install cmake and install again"
    compilers = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    if not any(map(shutil.which, compilers)):
        return "no C++ compiler; install g++ or clang++ and install again"
    return ""


def find_program(name: str) -> str | None:
    """The program on the path or beside this Python, whose environment may not be activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def build_library(folder: Path) -> Path:
    """The library, built in `folder`; raises SystemExit when the compiler fails."""
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
    configure = [cmake, "--fresh", "-S", str(ROOT), "-B", str(folder)]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    ninja = find_program("ninja")
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    try:
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--parallel"], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"safer_fast: building the native library failed: {error}\n"
            "SAFER_FAST_NATIVE=0 installs without it"
        ) from error
    return folder / LIBRARY


setup(
    package_dir={"safer_fast": "safer_fast", "safer_fast.kernels": "kernels"},
    packages=[
        "safer_fast",
        *(f"safer_fast.{name}" for name in find_packages("safer_fast")),
        "safer_fast.kernels",
        *(f"safer_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_data={
        "safer_fast": ["py.typed"],
        "safer_fast.config": ["recipes/*.yaml"],
        "safer_fast.runs.report": ["report.html.jinja"],
    },
    # Optional to setuptools: it copes with a library that was not built.
    ext_modules=[
        Extension("safer_fast.kernels.native", SOURCES, depends=DEPENDS, optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
)
