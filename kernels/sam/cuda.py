"""Norm, perturbation and restore in Triton.

The launchers run on CPU tensors too when TRITON_INTERPRET=1.
"""

# ruff: noqa: N803 - constants of a kernel are written in capitals
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
# Elements behind one partial sum: fixed, so that no sum depends on the size of the GPU.
SUM_BLOCK = 8192
TOTAL_BLOCK = 1024
# No contraction: a + b * c rounds twice, as PyTorch does.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
SUM_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def sum_squares(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Launches `sum_squares_kernel` and `total_kernel` on tensors in one memory order."""
    num_elements = x.numel()
    if num_elements == 0:
        return x.new_zeros((), dtype=torch.float32)
    num_partials = triton.cdiv(num_elements, SUM_BLOCK)
    partials = x.new_empty(num_partials, dtype=torch.float64)
    total = x.new_empty((), dtype=torch.float32)
    with torch.cuda.device_of(x):
        sum_squares_kernel[(num_partials,)](
            x,
            x if weight is None else weight,
            partials,
            num_elements,
            HAS_WEIGHT=weight is not None,
            BLOCK=SUM_BLOCK,
            **SUM_OPTIONS,
        )
        # A power of two, so that few lengths are compiled.
        num_blocks = triton.next_power_of_2(triton.cdiv(num_partials, TOTAL_BLOCK))
        total_kernel[(1,)](
            partials, total, num_partials, NUM_BLOCKS=num_blocks, BLOCK=TOTAL_BLOCK, **SUM_OPTIONS
        )
    return total


def perturb_(
    compute: Tensor, master: Tensor, gradient: Tensor, scale: Tensor, adaptive: bool
) -> None:
    """Launches `perturb_kernel` on tensors in one memory order."""
    num_elements = compute.numel()
    if num_elements == 0:
        return
    grid = (triton.cdiv(num_elements, BLOCK),)
    with torch.cuda.device_of(compute):
        perturb_kernel[grid](
            compute,
            master,
            gradient,
            scale,
            num_elements,
            ADAPTIVE=adaptive,
            BLOCK=BLOCK,
            **OPTIONS,
        )


def restore_(compute: Tensor, master: Tensor) -> None:
    """Launches `restore_kernel` on tensors in one memory order."""
    num_elements = compute.numel()
    if num_elements == 0:
        return
    grid = (triton.cdiv(num_elements, BLOCK),)
    with torch.cuda.device_of(compute):
        restore_kernel[grid](compute, master, num_elements, BLOCK=BLOCK, **OPTIONS)


@triton.jit
def sum_squares_kernel(
    x_ptr,
    weight_ptr,
    partials_ptr,
    num_elements,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`partials[program]` = sum over its block of (x * weight)^2, in fp32 as a tree.

    One pass: 4 bytes per element in fp32, 8 with a weight.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_elements
    value = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        value *= tl.load(weight_ptr + offsets, mask=inside, other=0.0)
    partial = tl.sum(value * value, axis=0)
    tl.store(partials_ptr + tl.program_id(0), partial.to(tl.float64))


@triton.jit
def total_kernel(
    partials_ptr, total_ptr, num_partials, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """`total` = sum of the partials in fp64, added in one fixed order by one program.

    One pass over the partials: 8 bytes for every block that was summed.
    """
    sums = tl.zeros([BLOCK], tl.float64)
    for block in range(NUM_BLOCKS):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + offsets, mask=offsets < num_partials, other=0.0)
    tl.store(total_ptr, tl.sum(sums, axis=0).to(tl.float32))


@triton.jit
def perturb_kernel(
    compute_ptr,
    master_ptr,
    gradient_ptr,
    scale_ptr,
    num_elements,
    ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`compute` = cast(master + scale * gradient), if ADAPTIVE scale * master^2 * gradient.

    One pass: reads master and gradient, writes compute; 10 bytes per element for fp32 into bf16.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_elements
    factor = tl.load(scale_ptr)
    master = tl.load(master_ptr + offsets, mask=inside, other=0.0)
    gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADAPTIVE:
        factor = factor * (master * master)
    moved = master + factor * gradient
    tl.store(compute_ptr + offsets, moved.to(compute_ptr.dtype.element_ty), mask=inside)


@triton.jit
def restore_kernel(compute_ptr, master_ptr, num_elements, BLOCK: tl.constexpr):
    """`compute` = cast(master).

    One pass: reads master, writes compute; 6 bytes per element for fp32 into bf16.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_elements
    master = tl.load(master_ptr + offsets, mask=inside, other=0.0)
    tl.store(compute_ptr + offsets, master.to(compute_ptr.dtype.element_ty), mask=inside)
