"""GELU and its gradient, quantised to FP8 by rows, in Triton.

The launchers run on CPU tensors too when TRITON_INTERPRET=1.
"""

# ruff: noqa: N803 - constants of a kernel are written in capitals
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

LARGEST = tl.constexpr(torch.finfo(reference.FORMAT).max)
LEAST_SCALE = tl.constexpr(reference.LEAST_SCALE)
ROOT_HALF = tl.constexpr(0.7071067811865476)
NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
OPTIONS = {"enable_fp_fusion": True}
ELEMENTS = 16
"""Elements that a thread holds: more need more registers, fewer pay more for the row's maximum."""


def quantise_gelu(x: Tensor, dtype: torch.dtype = reference.FORMAT) -> tuple[Tensor, Tensor]:
    """Launches `quantise_gelu_kernel` on a contiguous matrix; tests ask for another dtype."""
    values, scales = outputs(x, dtype)
    if x.numel():
        with torch.cuda.device_of(x):
            quantise_gelu_kernel[(len(x),)](x, values, scales, **constants(x.shape[1]), **OPTIONS)
    return values, scales


def quantise_gelu_backward(
    gradient: Tensor, x: Tensor, dtype: torch.dtype = reference.FORMAT
) -> tuple[Tensor, Tensor]:
    """Launches `quantise_gelu_backward_kernel` on contiguous matrices."""
    values, scales = outputs(x, dtype)
    if x.numel():
        with torch.cuda.device_of(x):
            quantise_gelu_backward_kernel[(len(x),)](
                gradient, x, values, scales, **constants(x.shape[1]), **OPTIONS
            )
    return values, scales


def outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for values [M, K] and scales [M, 1] of rows [M, K]."""
    return torch.empty_like(x, dtype=dtype), x.new_empty((len(x), 1), dtype=torch.float32)


def constants(num_columns: int) -> dict[str, Any]:
    """Constants of a kernel for rows of so many columns.

    A row is a power of two and a rest, so that those of transformers, one, three or five times such
    a power, leave no thread idle.
    """
    block = 2 ** (num_columns.bit_length() - 1)
    rest = triton.next_power_of_2(num_columns - block) if num_columns > block else 0
    num_warps = min(16, max(1, block // (32 * ELEMENTS)))
    return {"NUM_COLUMNS": num_columns, "BLOCK": block, "REST": rest, "num_warps": num_warps}


@triton.jit
def quantise_gelu_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """`values * scale` = x Phi(x) = x (1 + erf(x / sqrt(2))) / 2; scale = largest of the row / 448.

    One pass, a row in registers: reads x, writes values and a scale; 3 bytes per element in bf16.
    """
    row = tl.program_id(0).to(tl.int64)
    first = row * NUM_COLUMNS + tl.arange(0, BLOCK)
    y = gelu(tl.load(x_ptr + first).to(tl.float32))
    largest = largest_of(y)
    if REST:
        columns = BLOCK + tl.arange(0, REST)
        inside = columns < NUM_COLUMNS
        rest = row * NUM_COLUMNS + columns
        z = gelu(tl.load(x_ptr + rest, mask=inside, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, largest_of(z), propagate_nan=tl.PropagateNan.ALL)
    scale, reciprocal = scale_of(largest)
    tl.store(values_ptr + first, (y * reciprocal).to(values_ptr.dtype.element_ty))
    if REST:
        tl.store(values_ptr + rest, (z * reciprocal).to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def quantise_gelu_backward_kernel(
    gradient_ptr,
    x_ptr,
    values_ptr,
    scales_ptr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """`values * scale` = gradient * (Phi(x) + x phi(x)); scale = largest of the row / 448.

    One pass, a row in registers: reads gradient and x, writes values and a scale; 5 bytes per
    element in bf16.
    """
    row = tl.program_id(0).to(tl.int64)
    first = row * NUM_COLUMNS + tl.arange(0, BLOCK)
    slope = gelu_slope(tl.load(x_ptr + first).to(tl.float32))
    y = tl.load(gradient_ptr + first).to(tl.float32) * slope
    largest = largest_of(y)
    if REST:
        columns = BLOCK + tl.arange(0, REST)
        inside = columns < NUM_COLUMNS
        rest = row * NUM_COLUMNS + columns
        slope = gelu_slope(tl.load(x_ptr + rest, mask=inside, other=0.0).to(tl.float32))
        z = tl.load(gradient_ptr + rest, mask=inside, other=0.0).to(tl.float32) * slope
        largest = tl.maximum(largest, largest_of(z), propagate_nan=tl.PropagateNan.ALL)
    scale, reciprocal = scale_of(largest)
    tl.store(values_ptr + first, (y * reciprocal).to(values_ptr.dtype.element_ty))
    if REST:
        tl.store(values_ptr + rest, (z * reciprocal).to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * ROOT_HALF))


@triton.jit
def gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * ROOT_HALF)) + x * (NORMAL * tl.exp(-0.5 * x * x))


@triton.jit
def largest_of(x):
    """The largest absolute value; NaN if there is one."""
    return tl.reduce(tl.abs(x), 0, larger)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_of(largest):
    """The scale of a row, and its reciprocal; NaN for one that is not finite.

    A value is at most 448 (1 + 2^-21), which e4m3 rounds to 448: nothing needs to be clamped.
    """
    scale = tl.maximum(largest * (1.0 / LARGEST), LEAST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where(scale < float("inf"), scale, float("nan"))
    return scale, tl.div_rn(1.0, scale)
