"""Rows quantised to FP8 as they leave GELU and its gradient, in one pass over memory.

Public functions, which check their arguments, and the operators that they dispatch to. `quantise`
is plain PyTorch, which torch.compile joins to the norm that makes the rows.
"""

import torch
from torch import Tensor

from .._arguments import SINGLE_OR_HALF, check_floating, check_same_shape_and_device
from .._library import find_triton
from . import reference
from .reference import FORMAT, quantise

__all__ = ["FORMAT", "quantise", "quantise_gelu", "quantise_gelu_backward"]

WIDEST = 2**15
"""Most columns of a row that one program holds in its registers."""


def quantise_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Apply GELU to rows [M, K] and quantise them: FP8 values [M, K] and fp32 scales [M, 1].

    gelu(x) is about values * scales; it is x Phi(x) in fp32, never rounded in between. The largest
    of a row becomes 448, the largest number of e4m3; rows of zeros stay zeros, and a row with NaN
    or infinity becomes NaN throughout. Nothing is differentiable. Raises ValueError for arguments
    that do not fit.
    """
    check_rows(x)
    if not is_served(x):
        return reference.quantise_gelu(x)
    result: tuple[Tensor, Tensor] = quantise_gelu_op(x.contiguous())
    return result


def quantise_gelu_backward(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply rows [M, K] by the derivative of GELU at x, quantised as by `quantise_gelu`.

    The derivative is Phi(x) + x phi(x). gradient and x have one shape and may have two dtypes.
    """
    check_rows(x)
    check_floating(gradient=gradient)
    check_same_shape_and_device("x", x, gradient=gradient)
    if not is_served(x, gradient):
        return reference.quantise_gelu_backward(gradient, x)
    result: tuple[Tensor, Tensor] = quantise_gelu_backward_op(gradient.contiguous(), x.contiguous())
    return result


def check_rows(x: Tensor) -> None:
    """Raise ValueError unless x is a matrix with columns, of floating-point numbers."""
    check_floating(x=x)
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"x must have shape [M, K] with K at least 1, got {tuple(x.shape)}")


def is_served(*tensors: Tensor) -> bool:
    """True if Triton supports these dtypes and this width; the reference runs for others."""
    return all(x.dtype in SINGLE_OR_HALF and x.shape[1] <= WIDEST for x in tensors)


@torch.library.custom_op("safer_fast::quantise_gelu", mutates_args=())
def quantise_gelu_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """Operator behind `quantise_gelu`, for a contiguous matrix."""
    return reference.quantise_gelu(x)


@torch.library.custom_op("safer_fast::quantise_gelu_backward", mutates_args=())
def quantise_gelu_backward_op(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Operator behind `quantise_gelu_backward`, for contiguous matrices."""
    return reference.quantise_gelu_backward(gradient, x)


@quantise_gelu_op.register_fake
def fake_quantise_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate values and scales."""
    return x.new_empty(x.shape, dtype=FORMAT), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@quantise_gelu_backward_op.register_fake
def fake_quantise_gelu_backward(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate values and scales."""
    return x.new_empty(x.shape, dtype=FORMAT), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def quantise_gelu_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_gelu` in Triton, which is imported when a CUDA tensor first asks for it."""
    from .cuda import quantise_gelu

    return quantise_gelu(x)


def quantise_gelu_backward_cuda(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_gelu_backward` in Triton, imported when a CUDA tensor first asks for it."""
    from .cuda import quantise_gelu_backward

    return quantise_gelu_backward(gradient, x)


if find_triton():
    quantise_gelu_op.register_kernel("cuda", quantise_gelu_cuda)
    quantise_gelu_backward_op.register_kernel("cuda", quantise_gelu_backward_cuda)
