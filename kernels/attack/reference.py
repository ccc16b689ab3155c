"""The attack steps in plain PyTorch: the truth that the other two are tested against."""

import torch
from torch import Tensor


def linf_step_(
    adversarial: Tensor, images: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor
) -> None:
    """See `linf_step_` of the package."""
    # sign(NaN) is 0, which would hide a broken gradient.
    sign = torch.where(gradient.isnan(), gradient, gradient.sign()).to(adversarial.dtype)
    moved = adversarial + step_size * sign
    adversarial.copy_(moved.clamp(images - epsilon, images + epsilon).clamp(0, 1))


def l2_step_(
    adversarial: Tensor, images: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor
) -> None:
    """See `l2_step_` of the package."""
    length = norm_of_each_image(gradient)
    direction = gradient / length.masked_fill(length == 0, 1)
    difference = adversarial.double() + step_size * direction - images
    distance = norm_of_each_image(difference)
    # A distance that is NaN is not within epsilon, and makes the whole image NaN.
    scale = torch.where(distance <= epsilon, 1, epsilon / distance)
    adversarial.copy_((images + scale * difference).clamp(0, 1))


def norm_of_each_image(tensor: Tensor) -> Tensor:
    """The L2 norm of each image in fp64, `[B, 1, ...]`."""
    dims = tuple(range(1, tensor.dim()))
    norm: Tensor = torch.linalg.vector_norm(tensor.double(), dim=dims, keepdim=True)
    return norm
