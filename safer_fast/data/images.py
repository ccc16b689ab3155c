"""From a row of a source to a decoded image of the wanted channels and size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional

from safer_fast.data.formats import Source

GREY_MODES = {"1", "L", "LA"}
EIGHT_BIT_MODES = GREY_MODES | {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
NUM_PEEKS = 64
# Larger images are resized to 256/224 of the wanted size before the centre is cropped.
LARGEST_UNCROPPED_SIZE = 64


@dataclass(frozen=True)
class ImageFormat:
    """What every image of a set is brought to.

    size: edge in pixels. num_channels: 1 or 3. example: describes an image of the size that all
    others must have; None where they are resized instead.
    """

    size: int
    num_channels: int
    example: str | None = None


def find_sizes(sources: Iterable[Source]) -> dict[tuple[int, int], str]:
    """Sizes (width, height) among a few evenly spaced images, each with where one such image is."""
    sizes: dict[tuple[int, int], str] = {}
    for source in sources:
        for index in _spread(source):
            sizes.setdefault(_open(source, index).size, source.describe(index))
    return sizes


def find_num_channels(source: Source) -> int:
    """1 if every image is grey, else 3; all of them are opened only where the first looks are."""
    for rows in (_spread(source), range(len(source))):
        if any(_open(source, index).mode not in GREY_MODES for index in rows):
            return 3
    return 1


def _spread(source: Source) -> list[int]:
    count = min(NUM_PEEKS, len(source))
    return [int(index) for index in np.linspace(0, len(source) - 1, count)]


def decode(source: Source, index: int, image_format: ImageFormat) -> Image.Image:
    """One image in mode L or RGB, in its own size.

    Raises ValueError that names the image when it is unreadable, not of 8 bits, or not of the
    size that the format asks for.
    """
    image = _open(source, index)
    try:
        image.load()
    except Exception as error:
        raise _unreadable(source, index) from error
    size = image_format.size
    if image_format.example is not None and image.size != (size, size):
        raise ValueError(
            "data.image_size: expected one size for all images or --data.image_size, "
            f"got {size}x{size} ({image_format.example}) "
            f"and {image.width}x{image.height} ({source.describe(index)})"
        )
    mode = "L" if image_format.num_channels == 1 else "RGB"
    if image.mode == "P" and "transparency" in image.info:
        # In one step PIL would warn and guess.
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def fit(image: Image.Image, size: int) -> Image.Image:
    """The image at size x size: itself, or resized on its short side and cropped to the centre.

    Above 64 pixels the short side becomes size * 256 / 224, as is usual for ImageNet.
    """
    if image.size == (size, size):
        return image
    short_side = size if size <= LARGEST_UNCROPPED_SIZE else round(size * 256 / 224)
    resized = functional.resize(image, [short_side], antialias=True)
    cropped: Image.Image = functional.center_crop(resized, [size, size])
    return cropped


def _open(source: Source, index: int) -> Image.Image:
    # PIL's decoders raise whatever they stumble over, not only OSError.
    try:
        image = source.read(index)
    except Exception as error:
        raise _unreadable(source, index) from error
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"{source.flag}: expected an image of 8 bits per channel, "
            f"got mode {image.mode}: {source.describe(index)}"
        )
    return image


def _unreadable(source: Source, index: int) -> ValueError:
    return ValueError(
        f"{source.flag}: expected an image, got an unreadable one: {source.describe(index)}"
    )
