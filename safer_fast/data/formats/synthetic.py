"""Noise in the shape of ImageNet, for benchmarks without a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from safer_fast.data.formats.source import OpenRequest, Source

SIZE = 224
NUM_CLASSES = 1000
NUM_IMAGES = {"train": 1_281_167, "validation": 50_000}


class SyntheticSource(Source):
    """RGB noise of 224x224 pixels that depends only on the index; labels evenly distributed."""

    def __init__(self, split: str, flag: str) -> None:
        self.split, self.flag, self.class_names = split, flag, None
        self.labels = np.arange(NUM_IMAGES[split], dtype=np.int64) % NUM_CLASSES

    def read(self, index: int) -> Image.Image:
        generator = np.random.default_rng(index)
        return Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))

    def describe(self, index: int) -> str:
        return f"row {index} of synthetic ({self.split})"


def open_synthetic(_: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """Open noise with the numbers of images and classes of ImageNet's splits."""
    return {split: SyntheticSource(split, request.flag) for split in NUM_IMAGES}
