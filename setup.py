"""Builds the native library with CMake, and maps the folder `kernels` to `safer_fast.kernels`.

Without torch in the build environment, CMake or a compiler, or with SAFER_FAST_NATIVE=0, the
package is installed without the library and runs its plain PyTorch operations;
`safer-fast doctor --build-native` builds it later. All other metadata: pyproject.toml.
"""

import runpy
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILDER = runpy.run_path(str(ROOT / "kernels" / "_build.py"))
SOURCES = ["kernels/csrc/register.cpp", "kernels/attack/cpu.cpp", "kernels/sam/cpu.cpp"]
DEPENDS = [
    "CMakeLists.txt",
    "kernels/CMakeLists.txt",
    "kernels/csrc/ops.h",
    "kernels/csrc/vectorize.h",
]
EXTENSION = Extension("safer_fast.kernels.native", SOURCES, depends=DEPENDS)


class BuildNative(build_ext):
    """Builds the one extension, a shared library without Python.h, with CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library keeps its own name: no Python version in it."""
        return str(Path(*fullname.split(".")[:-1], BUILDER["LIBRARY"]))

    def build_extension(self, ext: Extension) -> None:
        """Put the library where setuptools looks for it."""
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            BUILDER["build_library"](ROOT / "build" / "native", target, ROOT)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"safer_fast: building the native library failed: {error}\n"
                "SAFER_FAST_NATIVE=0 installs without it"
            ) from error


class Wheel(bdist_wheel):
    """A wheel for every Python 3: the library is none of Python's extensions."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python 3, no ABI of it, and the platform only where the library is inside."""
        return ("py3", "none", super().get_tag()[2])


reason = BUILDER["why_no_build"]()
if reason:
    print(f"safer_fast: without the native CPU library: {reason}")
setup(
    package_dir={"safer_fast": "safer_fast", "safer_fast.kernels": "kernels"},
    packages=[
        "safer_fast",
        *(f"safer_fast.{name}" for name in find_packages("safer_fast")),
        "safer_fast.kernels",
        *(f"safer_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    # sources too: `doctor --build-native` builds the library for another torch
    include_package_data=False,
    package_data={
        "safer_fast": ["py.typed"],
        "safer_fast.config": ["recipes/*.yaml"],
        "safer_fast.runs.report": ["report.html.jinja"],
        "safer_fast.kernels": ["CMakeLists.txt", "csrc/*.cpp", "csrc/*.h", "*/cpu.cpp"],
    },
    ext_modules=[] if reason else [EXTENSION],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
