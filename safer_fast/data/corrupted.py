"""The corruptions of ImageNet-C, made on the fly by the library imagecorruptions."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from PIL import Image

from safer_fast.data.formats.source import Source
from safer_fast.data.images import ImageFormat, decode, fit
from safer_fast.runtime.seeds import derive_seed

INSTALL = 'pip install "safer_fast[corruptions]"'
SMALLEST = 32
"""Edge in pixels of the smallest images that the library takes."""


class Corruption(NamedTuple):
    """A corruption by the name in ImageNet-C, at a severity from 1 to 5."""

    name: str
    severity: int

    def __str__(self) -> str:
        return f"{self.name} {self.severity}"


class CorruptedSource(Source):
    """The images of a source, resized and cropped for evaluation, then corrupted.

    Draws depend on the corruption and the row alone (Hendrycks & Dietterich, 2019). Raises
    ValueError without the library, and for images smaller than it takes.
    """

    def __init__(self, source: Source, image_format: ImageFormat, corruption: Corruption) -> None:
        check_library()
        if image_format.size < SMALLEST:
            raise ValueError(
                f"--corruptions: expected images of at least {SMALLEST} pixels a side, "
                f"got {image_format.size}"
            )
        self.source, self.image_format, self.corruption = source, image_format, corruption
        self.labels, self.class_names, self.flag = source.labels, source.class_names, source.flag

    def read(self, index: int) -> Image.Image:
        image = fit(decode(self.source, index, self.image_format), self.image_format.size)
        return corrupt(
            image, self.corruption, derive_seed(0, f"corruption {self.corruption}", index)
        )

    def describe(self, index: int) -> str:
        return self.source.describe(index)


def check_library() -> None:
    """Raise ValueError where the library is not installed."""
    if find_spec("imagecorruptions") is None:
        raise ValueError(
            f"--corruptions: expected imagecorruptions to be installed ({INSTALL}), got none"
        )


def corrupt(image: Image.Image, corruption: Corruption, seed: int) -> Image.Image:
    """A corrupted copy of an image, grey or RGB; numpy's global generator is left as it was."""
    import imagecorruptions

    # one corruption compiles its loop, and seeds the generator of that code by itself
    own = {"seed": seed % 2**31} if corruption.name == "glass_blur" else {}
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        pixels = imagecorruptions.corrupt(
            np.asarray(image), corruption.severity, corruption.name, **own
        )
    finally:
        np.random.set_state(state)
    corrupted = Image.fromarray(pixels)
    return corrupted if corrupted.mode == image.mode else corrupted.convert(image.mode)
