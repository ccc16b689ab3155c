"""Decoding: from a row of a source to an image of the wanted channels and size."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional

from safer_fast.data.augmentation import Crop
from safer_fast.data.formats import EncodedSource, Source
from safer_fast.data.formats.source import IMAGE_FORMATS, RowError
from safer_fast.runtime.machine_errors import machine_error

GREY_MODES = {"1", "L", "LA"}
EIGHT_BIT_MODES = GREY_MODES | {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
NUM_PEEKS = 64
HEAD_BYTES = 2**16
# Larger images are resized to 256/224 of the wanted size before the centre is cropped.
LARGEST_UNCROPPED_SIZE = 64
ImageOrTensor = TypeVar("ImageOrTensor", bound=Any)
"""A PIL image or a tensor uint8 [C, H, W], depending on the decoder."""


class BadImageError(ValueError):
    """An image that cannot be used: unreadable, or not of 8 bits per channel."""


@dataclass(frozen=True)
class ImageFormat:
    """Size and channels that all images of a data set are converted to.

    size: edge in pixels. num_channels: 1 or 3. example: describes an image whose size all others
    must have; None if images are resized.
    """

    size: int
    num_channels: int
    example: str | None = None


def find_sizes(sources: Iterable[Source]) -> dict[tuple[int, int], str]:
    """Sizes (width, height) of up to 64 evenly spaced images per source, each with an example."""
    sizes: dict[tuple[int, int], str] = {}
    for source in sources:
        for index, image in _readable(source, _spread(source)):
            sizes.setdefault(image.size, source.describe(index))
        if not sizes:
            open_image(source, 0)  # raises what is wrong with it
    return sizes


def find_num_channels(source: Source) -> int:
    """1 if every image is grey, else 3; all are opened only if a sample of them is grey."""
    for rows in (_spread(source), range(len(source))):
        if any(image.mode not in GREY_MODES for _, image in _readable(source, rows)):
            return 3
    return 1


def _readable(source: Source, rows: Iterable[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield the images that can be opened; the others are reported when they are decoded."""
    for index in rows:
        with suppress(BadImageError):
            yield index, open_image(source, index)


def _spread(source: Source) -> list[int]:
    count = min(NUM_PEEKS, len(source))
    return [int(index) for index in np.linspace(0, len(source) - 1, count)]


def decode(source: Source, index: int, image_format: ImageFormat) -> Image.Image:
    """Decode one image, in mode L or RGB and in its own size.

    Raises BadImageError naming the image if it is unreadable or does not have 8 bits per channel,
    ValueError if it does not have the required size, and MachineError if the machine is to blame.
    """
    image = open_image(source, index)
    try:
        image.load()
    except Exception as error:
        raise _unreadable(source, index, error) from error
    check_size(image, source, index, image_format)
    mode = "L" if image_format.num_channels == 1 else "RGB"
    if image.mode == "P" and "transparency" in image.info:
        # converting in one step, PIL would warn and guess
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def open_image(source: Source, index: int) -> Image.Image:
    """Open one image without reading its pixels; raises BadImageError as `decode` does."""
    # PIL's decoders raise any exception on damaged files, not only OSError.
    try:
        image = source.read(index)
    except Exception as error:
        raise _unreadable(source, index, error) from error
    return _of_eight_bits(image, source, index)


def open_encoded(source: EncodedSource, index: int) -> tuple[NDArray[np.uint8], Image.Image]:
    """Read an image file and open the image, from its first bytes if they suffice.

    Raises BadImageError as `decode` does.
    """
    encoded = read_encoded(source, index)
    try:
        try:
            image = Image.open(io.BytesIO(encoded[:HEAD_BYTES].data), formats=IMAGE_FORMATS)
        except OSError:
            image = Image.open(io.BytesIO(encoded.data), formats=IMAGE_FORMATS)
    except Exception as error:
        raise _unreadable(source, index, error) from error
    return encoded, _of_eight_bits(image, source, index)


def read_encoded(source: EncodedSource, index: int) -> NDArray[np.uint8]:
    """Read the bytes of an image file; raises BadImageError if that fails, MachineError if the
    machine is to blame."""
    try:
        return source.encoded(index)
    except Exception as error:
        raise _unreadable(source, index, error) from error


def _of_eight_bits(image: Image.Image, source: Source, index: int) -> Image.Image:
    if image.mode not in EIGHT_BIT_MODES:
        raise BadImageError(
            f"{source.flag}: expected an image of 8 bits per channel, "
            f"got mode {image.mode}: {source.describe(index)}"
        )
    return image


def check_size(image: Image.Image, source: Source, index: int, image_format: ImageFormat) -> None:
    """Raise ValueError if the format requires one size for all images and this one has another."""
    size = image_format.size
    if image_format.example is not None and image.size != (size, size):
        raise ValueError(
            "data.image_size: expected one size for all images or --data.image_size, "
            f"got {size}x{size} ({image_format.example}) "
            f"and {image.width}x{image.height} ({source.describe(index)})"
        )


def fit(image: ImageOrTensor, size: int) -> ImageOrTensor:
    """The image at size x size: unchanged, or its short side resized and its centre cropped.

    Above 64 pixels the short side becomes size * 256 / 224, as is usual for ImageNet.
    """
    if functional.get_size(image) == [size, size]:
        return image
    resized = functional.resize(image, [short_side(size)], antialias=True)
    cropped: ImageOrTensor = functional.center_crop(resized, [size, size])
    return cropped


def short_side(size: int) -> int:
    """Pixels that the short side of an image is resized to before its centre is cropped."""
    return size if size <= LARGEST_UNCROPPED_SIZE else round(size * 256 / 224)


def centre(size: tuple[int, int], wanted: int) -> tuple[int, int, int, int]:
    """Geometry of `fit` for an image of this width and height: resized width and height, then top
    and left of the crop."""
    width, height = size
    if width == height == wanted:
        return width, height, 0, 0
    short = short_side(wanted)
    long = short * max(size) // min(size)
    new_width, new_height = (short, long) if width <= height else (long, short)
    top, left = round((new_height - wanted) / 2), round((new_width - wanted) / 2)
    return new_width, new_height, top, left


def crop_to(image: ImageOrTensor, crop: Crop, size: int) -> ImageOrTensor:
    """Crop the image, resize the crop to size x size, and mirror it if the crop is flipped."""
    place = (crop.top, crop.left, crop.height, crop.width)
    resized = functional.resized_crop(image, *place, [size, size], antialias=True)
    flipped: ImageOrTensor = functional.horizontal_flip(resized) if crop.is_flipped else resized
    return flipped


def _unreadable(source: Source, index: int, error: Exception) -> ValueError:
    """The error for an image that cannot be read, or for a machine that cannot read it."""
    if isinstance(error, RowError) and not machine_error(error, source.flag, ""):
        return BadImageError(str(error))
    return machine_error(error, source.flag, source.describe(index)) or BadImageError(
        f"{source.flag}: expected an image, got an unreadable one: {source.describe(index)}"
    )
