"""Plain PyTorch for quantising rows to FP8. This is the truth; it is never made faster."""

import torch
from torch import Tensor
from torch.nn import functional

FORMAT = torch.float8_e4m3fn
LEAST_SCALE = 2.0**-120
"""Scale of rows so small that the reciprocals of theirs would overflow."""


def quantise(x: Tensor, dtype: torch.dtype = FORMAT) -> tuple[Tensor, Tensor]:
    """Quantise rows [M, K]: FP8 values [M, K] and fp32 scales [M, 1]; x is about values * scales.

    The largest of a row becomes the largest number of the format; rows of zeros stay zeros. A row
    with NaN or infinity becomes NaN throughout: nothing of it is hidden. Rounded three times, the
    largest is at most that number times 1 + 2^-21, which the format rounds to it: no value needs to
    be clamped.
    """
    x = x.float()
    scales = x.abs().amax(dim=-1, keepdim=True) * (1 / torch.finfo(dtype).max)
    scales = scales.clamp(min=LEAST_SCALE)  # clamp keeps NaN
    scales = torch.where(torch.isfinite(scales), scales, torch.nan)
    return (x * scales.reciprocal()).to(dtype), scales


def quantise_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise` of x Phi(x), in fp32."""
    return quantise(functional.gelu(x.float()))


def quantise_gelu_backward(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise` of gradient * (Phi(x) + x phi(x)), in fp32."""
    return quantise(torch.ops.aten.gelu_backward(gradient.float(), x.float()))
