"""Images that a model is given, checked: their kind, shape, dtype, device and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FARTHEST = 0.5
"""Distance from [0, 1] that a value may have: searches step outside before they are clipped. Images
normalised to [-1, 1] lie farther out."""


def check_images(images: Tensor, mean: Tensor, is_arranged: bool) -> None:
    """Raise ValueError unless images are floats [B, C, H, W] of the channels that `mean` has.

    is_arranged: they may be in patches [B, N, C p p].
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images: expected a tensor [B, C, H, W], got {type(images).__name__}")
    if not (images.ndim == 4 or (images.ndim == 3 and is_arranged)):
        raise ValueError(f"images: expected [B, C, H, W], got {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images: expected floats in [0, 1], got {images.dtype}")
    if torch.promote_types(images.dtype, mean.dtype) != mean.dtype:
        raise ValueError(f"images: expected {mean.dtype} as the model is in, got {images.dtype}")
    if images.ndim == 4 and images.shape[1] != mean.shape[1]:
        raise ValueError(
            f"images: expected [B, {mean.shape[1]}, H, W], as many channels as the model takes, "
            f"got {list(images.shape)}"
        )
    if images.device != mean.device:
        raise ValueError(f"images: expected on {mean.device} as the model is, got {images.device}")


def check_values(images: Tensor) -> None:
    """Raise ValueError for values far outside [0, 1]; this waits for the device."""
    try:
        low, high = torch.stack(images.detach().aminmax()).tolist()
    except RuntimeError:  # tensors without values: fake ones, or those within torch.func.vmap
        return
    if low < -FARTHEST or high > 1 + FARTHEST:
        raise ValueError(
            f"images: expected pixels in [0, 1], got values from {low:g} to {high:g} (divide "
            "bytes by 255; the model normalises by itself)"
        )


def check_size(images: Tensor, size: int, error: Exception) -> None:
    """Raise ValueError if a network failed by `error` on images of another size than its own.

    size: edge in pixels of the images that it was trained on.
    """
    height, width = images.shape[-2:]
    is_other = images.ndim == 4 and (height, width) != (size, size)
    if is_other and not isinstance(error, torch.OutOfMemoryError):
        raise ValueError(
            f"images: expected {size}x{size} pixels, which the network was made for, got "
            f"{height}x{width}"
        ) from error


@torch.no_grad()
def check_taken(name: str, network: nn.Module, num_channels: int, size: int) -> None:
    """Raise ValueError if a network, put into eval mode, fails on an image of this edge in pixels.

    It is for architectures without an argument for the size of images, which timm does not check.
    """
    device = next(network.parameters()).device
    try:
        network.eval()(torch.zeros(1, num_channels, size, size, device=device))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--data.image_size: expected a size that {name} takes, got {size}: {reason}"
        ) from error
