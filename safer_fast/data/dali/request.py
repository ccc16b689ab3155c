"""Requests to DALI: parts of files to decode, and their resizing on a CPU."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from safer_fast.data.augmentation import Crop
from safer_fast.data.images import ImageFormat, centre, fit
from safer_fast.runtime.micro_batch import fill_


@dataclass
class Request:
    """Parts of image files that make one batch.

    files: encoded images. sizes: width and height of each in pixels. crops: the part of each; None:
    the centre, as `fit` takes it. indices: of the images in the split. faults: an error for each
    image left out. batch_size: the batch is filled up to this many images.
    """

    image_format: ImageFormat
    batch_size: int = 0
    files: list[NDArray[np.uint8]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    crops: list[Crop | None] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    faults: list[ValueError] = field(default_factory=list)

    def add(
        self,
        file: NDArray[np.uint8],
        size: tuple[int, int],
        crop: Crop | None,
        index: int,
        label: int,
    ) -> None:
        """Add one more image."""
        self.files.append(file)
        self.sizes.append(size)
        self.crops.append(crop)
        self.indices.append(index)
        self.labels.append(label)

    def boxes(self) -> tuple[Any, ...]:
        """Files, and corner and size of the box to decode of each, int32 [B, 2] each.

        DALI accepts no empty batch: an empty request decodes one pixel.
        """
        if not self.files:
            return self._of_one_pixel().boxes()
        pairs = zip(self.sizes, self.crops, strict=True)
        boxes = np.array([_box(*pair) for pair in pairs], dtype=np.int32)
        return (self.files, np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:]))

    def regions(self) -> tuple[Any, ...]:
        """Corners of the region of each box that becomes the image, float32 [B, 2] each, and 1 for
        a mirrored image, int32 [B]."""
        if not self.files:
            return self._of_one_pixel().regions()
        pairs = zip(self.sizes, self.crops, strict=True)
        regions = np.array([_region(*pair, self.image_format.size) for pair in pairs], np.float32)
        flips = np.array([crop is not None and crop.is_flipped for crop in self.crops], np.int32)
        return (
            np.ascontiguousarray(regions[:, :2]),
            np.ascontiguousarray(regions[:, 2:]),
            flips,
        )

    def _of_one_pixel(self) -> Request:
        request = Request(self.image_format)
        pixel = Image.new("L" if self.image_format.num_channels == 1 else "RGB", (1, 1))
        request.add(as_file(pixel), (1, 1), Crop(0, 0, 1, 1, False), 0, 0)
        return request

    def finish(self, parts: Any) -> Tensor:
        """Resize decoded parts uint8 [H, W, C] on the CPU to uint8 [B, C, S, S], filled up."""
        num_channels, size = self.image_format.num_channels, self.image_format.size
        num_slots = max(self.batch_size, len(self.files))
        images = torch.empty(num_slots, num_channels, size, size, dtype=torch.uint8)
        with one_thread():
            for position, crop in enumerate(self.crops):
                pixels = torch.utils.dlpack.from_dlpack(parts[position]).permute(2, 0, 1)
                if crop is None:
                    images[position] = fit(pixels, size)
                else:
                    resized = _resized(pixels, size)
                    images[position] = resized.flip(2) if crop.is_flipped else resized
        return fill_(images, len(self.files))


def _resized(pixels: Tensor, size: int) -> Tensor:
    """Resize uint8 [C, H, W] to size x size as torchvision does, without its many checks."""
    if pixels.shape[1:] == (size, size):
        return pixels
    return functional.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread within the block.

    More of them, and DALI's, wait for each other: resizing takes 17 times as long on two cores.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def as_file(image: Image.Image) -> NDArray[np.uint8]:
    """Encode an image in a format without compression (PPM)."""
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def _box(size: tuple[int, int], crop: Crop | None) -> tuple[int, int, int, int]:
    """Top, left, height and width of the box to decode of an image of this width and height."""
    if crop is None:
        return (0, 0, size[1], size[0])
    return (crop.top, crop.left, crop.height, crop.width)


def _region(
    size: tuple[int, int], crop: Crop | None, wanted: int
) -> tuple[float, float, float, float]:
    """Top, left, bottom and right of the region of the decoded box that is resized.

    It is the part that `fit` keeps of an image of this width and height, or all of a crop.
    """
    if crop is not None:
        return (0.0, 0.0, float(crop.height), float(crop.width))
    width, height = size
    new_width, new_height, top, left = centre(size, wanted)
    down, across = height / new_height, width / new_width
    return (top * down, left * across, (top + wanted) * down, (left + wanted) * across)
