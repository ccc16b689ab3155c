"""The loaders that are compared: our backends, timm's and torchvision's, over one file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from safer_fast.config.schema import DataConfig
from safer_fast.data import load_data, prefetch_to_device

SIZE, SHORT_SIDE = 224, 256
SMALL_SIZE, PADDING = 32, 4


@dataclass(frozen=True)
class Pipeline:
    """From a file to batches on the device.

    num_workers: processes or threads that work during an epoch. epoch: images [B, C, S, S] of each
    batch of the epoch of this number.
    """

    name: str
    num_workers: int
    epoch: Callable[[int], Iterator[Tensor]]


@dataclass(frozen=True)
class Setting:
    """File, batch size and device, which all loaders of a comparison share."""

    file: Path
    batch_size: int
    device: torch.device


def ours(
    setting: Setting,
    backend: Literal["dali", "torch", "device"],
    num_workers: int,
    *,
    size: int = SIZE,
    is_training: bool = True,
) -> Pipeline:
    """A backend of ours, with copies to the device as training has them; all rows are used.

    Only sets on the device have a validation split cut off: they would be decoded twice else.
    """
    file = str(setting.file)
    config = DataConfig(
        path=file,
        validation_path=None if backend == "device" else file,
        image_size=size,
        augmentation="random-resized-crop" if size == SIZE else "crop",
        backend=backend,
        num_workers=num_workers,
    )
    data = load_data(config, batch_size=setting.batch_size, seed=0, device=setting.device)
    loader = data.train if is_training else data.validation

    def epoch(number: int) -> Iterator[Tensor]:
        batches = prefetch_to_device(loader.epoch(number), setting.device)
        return (batch.images[: batch.num_images] for batch in batches)

    return Pipeline(
        f"safer_fast {loader.backend}", 0 if backend == "device" else num_workers, epoch
    )


def timm(setting: Setting, num_workers: int, *, is_normalised: bool = True) -> Pipeline:
    """The loader of timm for training; its workers outlive an epoch, as shipped.

    is_normalised: as shipped, its prefetcher makes pixels float32 and normalises them on the
    device. Without, what the prefetcher reads: uint8, as ours gives.
    """
    prefetcher = create_loader(
        Pictures(setting.file),
        input_size=(3, SIZE, SIZE),
        batch_size=setting.batch_size,
        is_training=True,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=num_workers,
        device=setting.device,
    )
    loader = prefetcher if is_normalised else prefetcher.loader
    name = "timm create_loader" + ("" if is_normalised else ", uint8")
    return Pipeline(name, num_workers, lambda number: (images for images, _ in loader))


def torchvision(
    setting: Setting, num_workers: int, *, size: int = SIZE, is_training: bool = True
) -> Pipeline:
    """DataLoader over transforms of torchvision; its workers start with every epoch."""
    on_gpu = setting.device.type == "cuda"
    loader: Iterable[Any] = DataLoader(
        Pictures(setting.file, transform(size, is_training)),
        batch_size=setting.batch_size,
        shuffle=is_training,
        drop_last=is_training,
        num_workers=num_workers,
        pin_memory=on_gpu,
    )

    def epoch(number: int) -> Iterator[Tensor]:
        return (images.to(setting.device, non_blocking=True) for images, _ in loader)

    return Pipeline("torchvision", num_workers, epoch)


def transform(size: int, is_training: bool) -> v2.Compose:
    """From a PIL image to uint8 [C, size, size], with the crops of our backends."""
    if not is_training:
        crop = [v2.Resize(SHORT_SIDE, antialias=True), v2.CenterCrop(size)]
    elif size == SIZE:
        crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    else:
        crop = [v2.RandomCrop(size, padding=PADDING), v2.RandomHorizontalFlip()]
    return v2.Compose([*crop, v2.PILToTensor()])


class Pictures(Dataset[Any]):
    """PIL images of a parquet file, through a transform, and labels: a data set as others have it.

    The encoded images lie in memory, so that nobody's disk is measured.
    """

    def __init__(
        self, file: Path, transform: Callable[[Image.Image], Tensor] | None = None
    ) -> None:
        table = pq.read_table(file, columns=["image", "label"])
        self.encoded: list[bytes] = [row["bytes"] for row in table["image"].to_pylist()]
        self.labels: list[int] = table["label"].to_pylist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.open(io.BytesIO(self.encoded[index])).convert("RGB")
        return image if self.transform is None else self.transform(image), self.labels[index]


def with_rows(file: Path, num_rows: int, copy: Path) -> Path:
    """A parquet file `copy` with the first rows of another, more than once if it has fewer."""
    table = pq.read_table(file)
    pq.write_table(table.take(np.arange(num_rows) % table.num_rows), copy)
    return copy
