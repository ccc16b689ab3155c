"""One step of a projected gradient attack, in place.

Public functions, which check their arguments, and the operators that they dispatch to. Formula:
Madry et al. 2018 (arXiv 1706.06083), section 2.1.
"""

import torch
from torch import Tensor

from .._arguments import (
    SINGLE_OR_HALF,
    as_scalar,
    check_floating,
    check_same_shape_and_device,
    run_in_memory_order,
)
from .._library import find_triton
from . import reference


@torch.no_grad()
def linf_step_(
    adversarial: Tensor,
    images: Tensor,
    gradient: Tensor,
    step_size: Tensor | float,
    epsilon: Tensor | float,
) -> Tensor:
    """Move `adversarial` by `step_size` along the sign of `gradient`, then project it to the ball.

        clamp(clamp(adversarial + step_size * sign(gradient), images -+ epsilon), 0, 1)

    All three tensors have one shape. `adversarial` and `images` have one dtype (fp32 is the fast
    one), `gradient` may have another; `step_size` and `epsilon`, in units of a pixel in [0, 1], are
    floats or 0-d fp32 tensors on the same device. If the gradient is NaN the pixel becomes NaN.
    Mutates and returns `adversarial`; raises ValueError for arguments that do not fit together.
    """
    scalars = check_step(adversarial, images, gradient, step_size, epsilon)
    kernel = linf_step_op if is_served(adversarial, gradient) else reference.linf_step_
    run_in_memory_order(kernel, adversarial, [images, gradient], scalars)
    return adversarial


@torch.no_grad()
def l2_step_(
    adversarial: Tensor,
    images: Tensor,
    gradient: Tensor,
    step_size: Tensor | float,
    epsilon: Tensor | float,
) -> Tensor:
    """Move each image by `step_size` along its gradient, then project it to the L2 ball.

    Per image d = adversarial + step_size * gradient / ||gradient|| - images, then `clamp(images + d
    * min(1, epsilon / ||d||), 0, 1)`. An image whose gradient is zero does not move; one with a
    NaN, or with an infinity in its gradient, becomes NaN as a whole. Norms are taken in fp64.

    Arguments are those of `linf_step_`, with shapes `[B, ...]`. Mutates and returns `adversarial`;
    raises ValueError for arguments that do not fit together.
    """
    scalars = check_step(adversarial, images, gradient, step_size, epsilon)
    if adversarial.dim() < 2:
        raise ValueError(f"adversarial must have shape [B, ...], got {tuple(adversarial.shape)}")
    kernel = l2_step_op if is_served(adversarial, gradient) else reference.l2_step_
    run_in_memory_order(kernel, adversarial, [images, gradient], scalars)
    return adversarial


def check_step(
    adversarial: Tensor,
    images: Tensor,
    gradient: Tensor,
    step_size: Tensor | float,
    epsilon: Tensor | float,
) -> list[Tensor]:
    """Check the arguments and return the two scalars as tensors; raises ValueError."""
    check_same_shape_and_device("adversarial", adversarial, images=images, gradient=gradient)
    check_floating(adversarial=adversarial, gradient=gradient)
    if images.dtype != adversarial.dtype:
        raise ValueError(
            f"images must have the dtype of adversarial, {adversarial.dtype}, got {images.dtype}"
        )
    return [
        as_scalar("step_size", step_size, adversarial),
        as_scalar("epsilon", epsilon, adversarial),
    ]


def is_served(adversarial: Tensor, gradient: Tensor) -> bool:
    """True if C++ and Triton support these dtypes; the reference runs for others."""
    return adversarial.dtype == torch.float32 and gradient.dtype in SINGLE_OR_HALF


@torch.library.custom_op("safer_fast::linf_step_", mutates_args={"adversarial"})
def linf_step_op(
    adversarial: Tensor, images: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor
) -> None:
    """Operator behind `linf_step_`, for tensors in one memory order."""
    reference.linf_step_(adversarial, images, gradient, step_size, epsilon)


@torch.library.custom_op("safer_fast::l2_step_", mutates_args={"adversarial"})
def l2_step_op(
    adversarial: Tensor, images: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor
) -> None:
    """Operator behind `l2_step_`, for tensors in one memory order."""
    reference.l2_step_(adversarial, images, gradient, step_size, epsilon)


@linf_step_op.register_fake
@l2_step_op.register_fake
def fake_step(
    adversarial: Tensor, images: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor
) -> None:
    """Do nothing: the operators return nothing."""


def linf_step_cuda(
    adversarial: Tensor, images: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor
) -> None:
    """`linf_step_` in Triton, which is imported when a CUDA tensor first asks for it."""
    from .cuda import linf_step_

    linf_step_(adversarial, images, gradient, step_size, epsilon)


def l2_step_cuda(
    adversarial: Tensor, images: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor
) -> None:
    """`l2_step_` in Triton, which is imported when a CUDA tensor first asks for it."""
    from .cuda import l2_step_

    l2_step_(adversarial, images, gradient, step_size, epsilon)


if find_triton():
    linf_step_op.register_kernel("cuda", linf_step_cuda)
    l2_step_op.register_kernel("cuda", l2_step_cuda)
