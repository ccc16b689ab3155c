"""Checks of the operations' arguments, made once, in the public functions."""

from collections.abc import Callable

import torch
from torch import Tensor

SINGLE_OR_HALF = (torch.float32, torch.bfloat16, torch.float16)


def check_same_shape_and_device(first_name: str, first: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless every tensor has the shape and the device of the first one."""
    for name, tensor in others.items():
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {tuple(first.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}"
            )


def check_floating(**tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has a floating-point dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def as_scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """Convert `value` to a 0-d fp32 tensor on the device of `like`, without a host sync."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float32, device=like.device)
    if value.dim() != 0 or value.dtype != torch.float32:
        raise ValueError(
            f"{name} must be a float or a 0-d torch.float32 tensor, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device {like.device}, got {value.device}")
    return value


def run_in_memory_order(
    kernel: Callable[..., object], first: Tensor, others: list[Tensor], scalars: list[Tensor]
) -> None:
    """Run a kernel that updates `first` on tensors that all have the same memory order.

    Tensors that are all contiguous or all channels_last are passed as they are. Others are copied,
    and the result is copied back.
    """
    tensors = [first, *others]
    if have_one_memory_order(tensors):
        kernel(first, *others, *scalars)
        return
    contiguous = [tensor.contiguous() for tensor in tensors]
    kernel(*contiguous, *scalars)
    if contiguous[0] is not first:
        first.copy_(contiguous[0])


def have_one_memory_order(tensors: list[Tensor]) -> bool:
    """True if the n-th element in memory is the same element in every tensor."""
    return all(tensor.is_contiguous() for tensor in tensors) or all(
        tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors
    )
