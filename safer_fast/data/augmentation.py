"""Random crops and flips, drawn per epoch (small images) or per image (random resized crops)."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safer_fast.runtime.seeds import make_generator

PADDING = {"shift": 1, "crop": 4}
"""Pixels of zero padding around each image before it is cropped, by kind of augmentation."""


LARGEST_UNAUGMENTED_SIZE = 16
LARGEST_CROP_SIZE = 64


def choose_augmentation(name: str, image_size: int) -> str:
    """The augmentation that `data.augmentation` means for images of this edge in pixels."""
    if name != "auto":
        return name
    if image_size <= LARGEST_UNAUGMENTED_SIZE:
        return "none"
    return "crop" if image_size <= LARGEST_CROP_SIZE else "random-resized-crop"


@dataclass(frozen=True)
class Draws:
    """Random offsets and flips of all images for one epoch.

    They are drawn in advance, so that the augmentation of an image depends neither on its batch nor
    on the process that reads it.
    top, left: int64 [N] in 0..2*padding, the corner of the crop. flip: bool [N].
    """

    padding: int
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    flip: NDArray[np.bool_]


def draw(name: str, num_images: int, seed: int, epoch: int) -> Draws:
    """Draw an epoch of `shift` (by up to one pixel) or `crop` (pad 4, crop, flip half of them)."""
    generator = make_generator(seed, "augmentation", epoch)
    padding = PADDING[name]
    top, left = torch.randint(2 * padding + 1, (2, num_images), generator=generator).numpy()
    flip = torch.rand(num_images, generator=generator).numpy() < 0.5
    return Draws(padding, top, left, flip if name == "crop" else np.zeros_like(flip))


def pad(images: NDArray[np.uint8], padding: int) -> NDArray[np.uint8]:
    """Images [N, C, H, W] with zero padding on all sides."""
    margin = (padding, padding)
    return np.pad(images, [(0, 0), (0, 0), margin, margin])


def augment(
    padded: NDArray[np.uint8], rows: NDArray[np.int64], draws: Draws, indices: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Crop and flip the images in `rows` [B] of `padded` [N, C, H, W], as drawn for `indices` [B].

    A loop over images with plain Python numbers is the fastest way (measured: indexed copies take
    twice as long, and torch would wake its threads for a fraction of a millisecond).
    """
    channels, height, width = padded.shape[1:]
    height, width = height - 2 * draws.padding, width - 2 * draws.padding
    augmented = np.empty((len(rows), channels, height, width), dtype=np.uint8)
    drawn = (draws.top, draws.left, draws.flip)
    numbers = zip(rows.tolist(), *(values[indices].tolist() for values in drawn), strict=True)
    for position, (row, top, left, is_flipped) in enumerate(numbers):
        window = padded[row, :, top : top + height, left : left + width]
        augmented[position] = window[:, :, ::-1] if is_flipped else window
    return augmented


class DeviceDraws:
    """The crops and flips of `augment`, for images on a device; the host never waits for it."""

    def __init__(self, draws: Draws, device: torch.device) -> None:
        self.padding = draws.padding
        self.top, self.left, self.flip = (
            torch.from_numpy(values).to(device) for values in (draws.top, draws.left, draws.flip)
        )

    def augment(self, padded: Tensor, indices: Tensor) -> Tensor:
        """Augmented images uint8 [B, C, H, W] of `padded`, as drawn for `indices`, int64 [B]."""
        batch, channels = padded.shape[:2]
        height, width = (edge - 2 * self.padding for edge in padded.shape[2:])
        down = torch.arange(height, device=padded.device)
        across = torch.arange(width, device=padded.device)
        rows = self.top[indices, None] + down  # [B, H]
        flipped = self.flip[indices, None]
        columns = self.left[indices, None] + torch.where(flipped, across.flip(0), across)  # [B, W]
        rows = rows.view(batch, 1, height, 1).expand(-1, channels, -1, padded.shape[3])
        columns = columns.view(batch, 1, 1, width).expand(-1, channels, height, -1)
        return padded.gather(2, rows).gather(3, columns)


SMALLEST_AREA, LARGEST_AREA = 0.08, 1.0
NARROWEST, WIDEST = 3 / 4, 4 / 3
NUM_TRIES = 10


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image, in its pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool


def draw_crop(width: int, height: int, seed: int, index: int) -> Crop:
    """Draw the random resized crop of image `index`; the same seed and index give the same crop.

    The Inception crop (Szegedy et al., 2015) as torchvision and timm draw it: 8 to 100 % of the
    area, aspect ratio 3/4 to 4/3, uniform in its logarithm, ten tries before the largest centred
    crop of an allowed ratio. Half of the crops are mirrored. index must be less than 2**64.
    """
    # Python guarantees that these numbers stay the same across versions; a torch or numpy
    # generator for each image takes twice as long to set up.
    draw = random.Random((seed << 64) | index).random
    is_flipped = draw() < 0.5
    for _ in range(NUM_TRIES):
        area = width * height * (SMALLEST_AREA + draw() * (LARGEST_AREA - SMALLEST_AREA))
        ratio = math.exp(math.log(NARROWEST) + draw() * math.log(WIDEST / NARROWEST))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draw() * (height - crop_height + 1))
            left = int(draw() * (width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width, is_flipped)
    return _central(width, height, is_flipped)


def _central(width: int, height: int, is_flipped: bool) -> Crop:
    """The largest centred crop of an allowed ratio."""
    ratio = width / height
    crop_width = width if ratio <= WIDEST else round(height * WIDEST)
    crop_height = height if ratio >= NARROWEST else round(width / NARROWEST)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return Crop(top, left, crop_height, crop_width, is_flipped)
