"""Augmentations of small images, a whole batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

PADDING = {"shift": 1, "crop": 4}


@dataclass
class Augmentation:
    """One epoch's random offsets and flips, drawn for every image ahead.

    So what happens to an image depends neither on the batch that it is in nor on who reads it.
    padding: pixels of zeros around each image. top, left: int64 [N] in 0..2*padding, the corner
    of the part that is kept. flip: bool [N].
    """

    padding: int
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    flip: NDArray[np.bool_]

    def __call__(self, images: NDArray[np.uint8], indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Augmented copies. images: uint8 [B, C, H, W]; indices: int64 [B], which of N they are.

        In numpy, because torch would wake all its threads for a fraction of a millisecond of
        copying; image by image, because that is faster than one indexed copy (measured).
        """
        height, width = images.shape[2:]
        margin = (self.padding, self.padding)
        padded = np.pad(images, [(0, 0), (0, 0), margin, margin])
        augmented = np.empty_like(images)
        for position, index in enumerate(indices):
            top, left = self.top[index], self.left[index]
            window = padded[position, :, top : top + height, left : left + width]
            augmented[position] = window[:, :, ::-1] if self.flip[index] else window
        return augmented


class DeviceAugmentation:
    """The same crops and flips, by the same draws, for images on a device; nothing waits for it."""

    def __init__(self, drawn: Augmentation, device: torch.device) -> None:
        self.padding = drawn.padding
        self.top, self.left, self.flip = (
            torch.from_numpy(values).to(device) for values in (drawn.top, drawn.left, drawn.flip)
        )

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Augmented copies. images: uint8 [B, C, H, W]; indices: int64 [B], which of N they are."""
        batch, channels, height, width = images.shape
        padded = functional.pad(images, [self.padding] * 4)
        down = torch.arange(height, device=images.device)
        across = torch.arange(width, device=images.device)
        rows = self.top[indices, None] + down  # [B, H]
        flipped = self.flip[indices, None]
        columns = self.left[indices, None] + torch.where(flipped, across.flip(0), across)  # [B, W]
        rows = rows.view(batch, 1, height, 1).expand(-1, channels, -1, padded.shape[3])
        columns = columns.view(batch, 1, 1, width).expand(-1, channels, height, -1)
        return padded.gather(2, rows).gather(3, columns)


def draw_augmentation(name: str, num_images: int, generator: torch.Generator) -> Augmentation:
    """Draws an epoch of `shift` (by up to one pixel) or `crop` (pad 4, crop, flip every other)."""
    padding = PADDING[name]
    top, left = torch.randint(2 * padding + 1, (2, num_images), generator=generator).numpy()
    flip = torch.rand(num_images, generator=generator).numpy() < 0.5
    return Augmentation(padding, top, left, flip if name == "crop" else np.zeros_like(flip))
