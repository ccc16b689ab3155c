"""Random crops of images of any size, drawn image by image from a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

SMALLEST_AREA, LARGEST_AREA = 0.08, 1.0
NARROWEST, WIDEST = 3 / 4, 4 / 3
NUM_TRIES = 10


@dataclass(frozen=True)
class Crop:
    """A part of an image, in pixels of the image, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool


def draw_crop(width: int, height: int, seed: int, index: int) -> Crop:
    """The random resized crop of the image `index`; the same seed and index give the same crop.

    The Inception crop (Szegedy et al., 2015) as torchvision and timm draw it: 8 to 100 % of the
    area, aspect ratio 3/4 to 4/3, uniform in its logarithm, ten tries before the largest centred
    crop of an allowed ratio. Every other one is mirrored. index must be less than 2**64.
    """
    # Python promises that these numbers stay the same; a generator of torch or numpy for each
    # image takes twice as long to set up.
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
