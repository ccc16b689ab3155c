"""Norm, perturbation and restore in plain PyTorch: the truth for the tests of the other two."""

import torch
from torch import Tensor


def sum_squares(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """See `sum_squares` of the package."""
    x = x.double()
    if weight is not None:
        x = x * weight
    return x.square().sum().to(torch.float32)


def perturb_(
    compute: Tensor, master: Tensor, gradient: Tensor, scale: Tensor, adaptive: bool
) -> None:
    """See `perturb_` of the package."""
    # The gradient is widened first: a 0-d scale times a bf16 gradient would be rounded to bf16.
    gradient = gradient.to(master.dtype)
    step = scale * master.square() * gradient if adaptive else scale * gradient
    compute.copy_(master + step)


def restore_(compute: Tensor, master: Tensor) -> None:
    """See `restore_` of the package."""
    compute.copy_(master)
