"""Image files of many kinds, sets of them, and what batches of two loaders have in common."""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from safer_fast.config.schema import DataConfig
from safer_fast.data import Batch, Data, Loader, load_data

LARGE = 72
SMALL = 45
# Height and width: landscape, portrait, square, narrow, of the wanted size, and smaller than it.
SIZES = [(96, 120), (130, 90), (100, 100), (80, 211), (190, 76), (72, 72), (40, 64), (50, 30)]
NUM_IMAGES = 24
ONE_LINE = r"^[a-z_.]+: expected [^\n]+, got [^\n]+$"


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth gradient with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([255 * y / height, 255 * x / width, 40 + 3 * (x + y + 7 * seed) % 200], 2)
    noisy = smooth + rng.normal(0, 8, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def write(path: Path, files: Iterable[bytes]) -> Path:
    """A folder of images, of as many classes: labels are the numbers of the images."""
    for number, file in enumerate(files):
        (path / f"{number:03}").mkdir(parents=True)
        # PIL and DALI go by the content
        (path / f"{number:03}" / "photo.jpg").write_bytes(file)
    return path


def load(
    path: Path,
    backend: Any = "dali",
    batch_size: int = 5,
    reported: list[str] | None = None,
    device: torch.device | None = None,
    **settings: Any,
) -> Data:
    """The data at `path`, whose test split is all of it; reports fail the test unless expected."""
    defaults: dict[str, Any] = {"num_workers": 0, "test_path": str(path)}
    config = DataConfig(path=str(path), backend=backend, **(defaults | settings))
    report = pytest.fail if reported is None else reported.append
    return load_data(config, batch_size=batch_size, seed=3, device=device, report=report)


def load_photos(path: Path, backend: Any = "dali", **settings: Any) -> Data:
    return load(path, backend, image_size=LARGE, **settings)


def whole(data: Data) -> Loader:
    """The evaluation loader of all images."""
    assert data.test is not None
    return data.test


def assert_same(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.num_padding == other.num_padding


def images_by_label(batches: Iterable[Batch]) -> dict[int, Tensor]:
    """The images that count; none of them may come twice."""
    pairs = [
        (int(label), image)
        for batch in batches
        for label, image in zip(
            batch.labels[: batch.num_images], batch.images[: batch.num_images], strict=True
        )
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def differences(first: Iterable[Batch], second: Iterable[Batch]) -> list[float]:
    """Mean absolute difference of each pair of batches in levels of 255; the rest is the same."""
    found = []
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.labels.cpu(), other.labels.cpu())
        assert one.num_padding == other.num_padding
        assert one.images.shape == other.images.shape
        found.append(
            float((one.images.cpu().int() - other.images.cpu().int()).abs().float().mean())
        )
    return found


def find_data(name: str) -> Path:
    """A file of the shared test data; skips the test where there is none."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    file = Path(os.environ.get("SAFER_FAST_TEST_DATA", beside)) / name
    if not file.exists():
        pytest.skip(f"{name} is not there: set SAFER_FAST_TEST_DATA to the folder that has it")
    return file


def num_alive(pipelines: list[weakref.ref[Any]]) -> int:
    return sum(pipeline() is not None for pipeline in pipelines)
