"""Perturbation of selected weights to w + e, and the exact way back to w."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from safer_fast import kernels
from safer_fast.models.arenas import Range


def ascend_(
    groups: Iterable[Sequence[Range]],
    rho: float,
    *,
    adaptive: bool = False,
    relative: bool = False,
) -> None:
    """Set what the network reads to w + e, the worst weights in each group's ball of radius rho.

    e = rho * g / ||g|| over all ranges of a group together (SAM, Foret et al., 2021, equation 2);
    `adaptive`: e = rho * w^2 g / ||w g|| (ASAM, Kwon et al., 2021, with T = |w| for every weight);
    `relative`: the radius is rho * ||w|| of the group (AWP, Wu et al., 2020, equation 9). A zero
    gradient leaves the weights as they are. Masters and gradients are only read.
    """
    for ranges in groups:
        scale = rho * inverse_norm(gradient_squares(ranges, adaptive))
        if relative:
            scale = scale * weight_norm(ranges)
        perturb_(ranges, scale, adaptive=adaptive)


def perturb_(ranges: Iterable[Range], scale: Tensor, *, adaptive: bool = False) -> None:
    """Set compute <- cast(master + scale * gradient) for each range; `scale` is a 0-d tensor."""
    for part in ranges:
        kernels.perturb_(part.compute, part.master, part.gradient, scale, adaptive)


def restore_(ranges: Iterable[Range]) -> None:
    """Set compute <- cast(master): the same weights, bit for bit, as before `ascend_`."""
    for part in ranges:
        kernels.restore_(part.compute, part.master)


def gradient_squares(ranges: Iterable[Range], adaptive: bool = False) -> Tensor:
    """||g||^2 of all ranges together, or ||w g||^2; 0-d float32 on the device."""
    sums = [
        kernels.sum_squares(part.gradient, part.master if adaptive else None) for part in ranges
    ]
    return torch.stack(sums).sum()


def weight_norm(ranges: Iterable[Range]) -> Tensor:
    """||w|| of all ranges together; 0-d float32 on the device."""
    return torch.stack([kernels.sum_squares(part.master) for part in ranges]).sum().sqrt()


def inverse_norm(squares: Tensor) -> Tensor:
    """1 / sqrt(squares), and 0 where that is 0; NaN stays NaN."""
    return torch.where(squares == 0, 0.0, squares.rsqrt())
