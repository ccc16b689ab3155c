"""The steps of sharpness-aware minimisation outside the two passes: norm, perturbation, restore.

Public functions, which check their arguments, and the operators that they dispatch to. Formulas:
SAM, Foret et al. 2021 (arXiv 2010.01412), equation 2; ASAM, Kwon et al. 2021 (arXiv 2102.11600),
equation 6 with T = |w| and without its bias exception.
"""

import torch
from torch import Tensor

from .._arguments import (
    SINGLE_OR_HALF,
    as_scalar,
    check_floating,
    check_same_shape_and_device,
    have_one_memory_order,
    run_in_memory_order,
)
from .._library import find_triton
from . import reference


@torch.no_grad()
def sum_squares(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the sum of x^2, or of (x * weight)^2, as a 0-d fp32 tensor on the device of x.

    Any shape; `weight` has the shape of `x` (fp32 is the fast one). The result is within 1e-5 of
    fp64, and bit-identical whatever the number of threads or the size of the GPU. The sum over
    nothing is 0. Raises ValueError for arguments that do not fit together.
    """
    check_floating(x=x)
    tensors = [x]
    if weight is not None:
        check_same_shape_and_device("x", x, weight=weight)
        check_floating(weight=weight)
        tensors.append(weight)
    if not have_one_memory_order(tensors):
        tensors = [tensor.contiguous() for tensor in tensors]
    is_served = x.dtype in SINGLE_OR_HALF and (weight is None or weight.dtype == torch.float32)
    result: Tensor = (sum_squares_op if is_served else reference.sum_squares)(*tensors)
    return result


@torch.no_grad()
def perturb_(
    compute: Tensor,
    master: Tensor,
    gradient: Tensor,
    scale: Tensor | float,
    adaptive: bool = False,
) -> Tensor:
    """Set `compute` to `master + scale * gradient`, rounded once to its dtype; NaN stays NaN.

    With `adaptive` (ASAM) it is `master + scale * master^2 * gradient`. All three tensors have one
    shape; `scale`, which is rho / norm, is a float or a 0-d fp32 tensor on the same device.
    `master` in fp32 and half or single precision elsewhere is fast; every other mixture of dtypes
    works too. Mutates and returns `compute`; raises ValueError for arguments that do not fit
    together.
    """
    check_same_shape_and_device("compute", compute, master=master, gradient=gradient)
    check_floating(compute=compute, master=master, gradient=gradient)
    is_served = (
        master.dtype == torch.float32
        and compute.dtype in SINGLE_OR_HALF
        and gradient.dtype in SINGLE_OR_HALF
    )
    kernel = perturb_op if is_served else reference.perturb_
    scalar = as_scalar("scale", scale, compute)

    def run(compute: Tensor, master: Tensor, gradient: Tensor) -> None:
        kernel(compute, master, gradient, scalar, adaptive)

    run_in_memory_order(run, compute, [master, gradient], [])
    return compute


@torch.no_grad()
def restore_(compute: Tensor, master: Tensor) -> Tensor:
    """Set `compute` to `master`, cast to its dtype, which undoes `perturb_` exactly.

    Rounded to the nearest, ties to even, as torch casts; NaN stays NaN. `master` in fp32, `compute`
    in single or half precision and both in one memory order is fast; everything else works too.
    Mutates and returns `compute`; raises ValueError unless both have one shape and device.
    """
    check_same_shape_and_device("compute", compute, master=master)
    check_floating(compute=compute, master=master)
    is_served = (
        master.dtype == torch.float32
        and compute.dtype in SINGLE_OR_HALF
        # torch's own copy reads and writes any two orders in one pass.
        and have_one_memory_order([compute, master])
    )
    (restore_op if is_served else reference.restore_)(compute, master)
    return compute


@torch.library.custom_op("safer_fast::sum_squares", mutates_args=())
def sum_squares_op(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Operator behind `sum_squares`, for tensors in one memory order."""
    return reference.sum_squares(x, weight)


@torch.library.custom_op("safer_fast::perturb_", mutates_args={"compute"})
def perturb_op(
    compute: Tensor, master: Tensor, gradient: Tensor, scale: Tensor, adaptive: bool
) -> None:
    """Operator behind `perturb_`, for tensors in one memory order."""
    reference.perturb_(compute, master, gradient, scale, adaptive)


@torch.library.custom_op("safer_fast::restore_", mutates_args={"compute"})
def restore_op(compute: Tensor, master: Tensor) -> None:
    """Operator behind `restore_`, for tensors in one memory order."""
    reference.restore_(compute, master)


@sum_squares_op.register_fake
def fake_sum_squares(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Allocate the result: a 0-d fp32 tensor on the device of x."""
    return x.new_empty((), dtype=torch.float32)


@perturb_op.register_fake
def fake_perturb(
    compute: Tensor, master: Tensor, gradient: Tensor, scale: Tensor, adaptive: bool
) -> None:
    """Do nothing: the operator returns nothing."""


@restore_op.register_fake
def fake_restore(compute: Tensor, master: Tensor) -> None:
    """Do nothing: the operator returns nothing."""


def sum_squares_cuda(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """`sum_squares` in Triton, which is imported when a CUDA tensor first asks for it."""
    from .cuda import sum_squares

    return sum_squares(x, weight)


def perturb_cuda(
    compute: Tensor, master: Tensor, gradient: Tensor, scale: Tensor, adaptive: bool
) -> None:
    """`perturb_` in Triton, which is imported when a CUDA tensor first asks for it."""
    from .cuda import perturb_

    perturb_(compute, master, gradient, scale, adaptive)


def restore_cuda(compute: Tensor, master: Tensor) -> None:
    """`restore_` in Triton, which is imported when a CUDA tensor first asks for it."""
    from .cuda import restore_

    restore_(compute, master)


if find_triton():
    sum_squares_op.register_kernel("cuda", sum_squares_cuda)
    perturb_op.register_kernel("cuda", perturb_cuda)
    restore_op.register_kernel("cuda", restore_cuda)
