"""Fused tensor operations that plain PyTorch would do in several passes.

Every operation has one schema and up to three implementations: plain PyTorch (`reference.py`), C++
for the CPU (`cpu.cpp`) and Triton for CUDA (`cuda.py`). The PyTorch dispatcher chooses;
`native_status` lists those available here.
"""

if __name__ != "safer_fast.kernels":
    raise ImportError(
        f"this package is safer_fast.kernels, not {__name__}: install the project "
        "(pip install --no-build-isolation -e .) and import safer_fast.kernels"
    )

from ._library import NativeStatus, native_status
from .attack import l2_step_, linf_step_
from .float8 import quantise_gelu, quantise_gelu_backward
from .sam import perturb_, restore_, sum_squares

# A library built for another torch must fail at import, not in the middle of a run.
native_status()

__all__ = [
    "NativeStatus",
    "l2_step_",
    "linf_step_",
    "native_status",
    "perturb_",
    "quantise_gelu",
    "quantise_gelu_backward",
    "restore_",
    "sum_squares",
]
