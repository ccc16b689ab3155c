"""Augmentations of small images, a whole batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

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


def draw_augmentation(name: str, num_images: int, generator: torch.Generator) -> Augmentation:
    """Draws an epoch of `shift` (by up to one pixel) or `crop` (pad 4, crop, flip every other)."""
    padding = PADDING[name]
    top, left = torch.randint(2 * padding + 1, (2, num_images), generator=generator).numpy()
    flip = torch.rand(num_images, generator=generator).numpy() < 0.5
    return Augmentation(padding, top, left, flip if name == "crop" else np.zeros_like(flip))
