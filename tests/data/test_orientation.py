"""Photos whose EXIF says that they lie on their side come as they are stored, wherever they lie."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.datasets import ImageFolder

from safer_fast.data.images import fit
from tests.support.pictures import SMALL, encode, images_by_label, load, photo, whole, write
from tests.support.sets import write_parquet, write_tar

SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6
# Of the wanted size, wide, and high: what is turned and then cropped differs everywhere.
SIZES = [(SMALL, SMALL), (50, 75), (80, 48), (SMALL, SMALL)]
PHOTOS = [
    encode(photo(*size, seed), "jpeg", quality=95, exif=SIDEWAYS) for seed, size in enumerate(SIZES)
]


def stored(file: bytes) -> Tensor:
    """The pixels of a file as they are stored, at the wanted size."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    assert image.getexif()[0x0112] == 6
    return torch.from_numpy(np.asarray(fit(image, SMALL)).transpose(2, 0, 1).copy())


def as_folder(path: Path, files: Sequence[bytes]) -> Path:
    return write(path, files)


def as_shard(path: Path, files: Sequence[bytes]) -> Path:
    path.mkdir()
    pairs = [((f"{n}.jpg", file), (f"{n}.cls", b"%d" % n)) for n, file in enumerate(files)]
    return write_tar(path / "a.tar", [member for pair in pairs for member in pair])


def as_parquet(path: Path, files: Sequence[bytes]) -> Path:
    path.mkdir()
    return write_parquet(path / "a.parquet", list(files), np.arange(len(files)))


@pytest.mark.parametrize("backend", ["torch", "device", "dali"])
@pytest.mark.parametrize("make", [as_folder, as_shard, as_parquet])
def test_orientation_is_left_alone_in_every_format_by_every_backend(
    tmp_path: Path, make: Callable[[Path, Sequence[bytes]], Path], backend: str
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    data = load(
        make(tmp_path / "data", PHOTOS),
        backend,
        2,
        image_size=SMALL,
        augmentation="none",
        validation_fraction=0.3,
    )
    # dali resizes tensors, which are rounded otherwise
    tolerance = 2 if backend == "dali" else 0
    assert whole(data).backend == data.train.backend == backend
    evaluated = images_by_label(whole(data).epoch(1))
    assert len(evaluated) == len(PHOTOS)
    trained = images_by_label(data.train.epoch(1))
    probed = images_by_label(data.train.probe(3, 0))  # as selection, gallery and export see them
    for found in (evaluated, trained, probed):
        for label, image in found.items():
            difference = (image.int() - stored(PHOTOS[label]).int()).abs().max()
            assert difference <= tolerance, (label, difference)


def test_orientation_is_left_alone_by_timm_and_torchvision_too(tmp_path: Path) -> None:
    path = as_folder(tmp_path, PHOTOS)
    transform = create_transform(
        (3, SMALL, SMALL), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0, interpolation="bilinear"
    )
    image, label = ImageFolder(str(path), transform)[0]
    loaded = images_by_label(
        whole(load(path, "torch", 2, image_size=SMALL, validation_fraction=0.3)).epoch(1)
    )
    assert torch.equal((image * 255).round().to(torch.uint8), loaded[label])
