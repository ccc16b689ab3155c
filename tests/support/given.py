"""A few digits as Python holds them, for data given in Python."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = load_digits()
PIXELS = np.round(DIGITS.images * 255 / 16).astype(np.uint8)[:160]
LABELS = DIGITS.target[:160].astype(np.int64)
NAMES = [f"digit-{number}" for number in range(10)]


def pictures() -> list[Image.Image]:
    """The images as PIL has them."""
    return [Image.fromarray(pixels) for pixels in PIXELS]


def hugging_face() -> Any:
    """The images and named labels as a dataset of Hugging Face."""
    rows = datasets.Dataset.from_dict({"image": pictures(), "label": LABELS.tolist()})
    return rows.cast_column("label", datasets.ClassLabel(names=NAMES))
