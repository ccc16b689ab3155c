"""Reading batches of images from a source, in worker processes or in this one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from safer_fast.data.augmentation import Augmentation
from safer_fast.data.formats import Source
from safer_fast.data.images import ImageFormat, decode, fit
from safer_fast.data.seeds import derive_seed

# Small, because what workers give back lies in shared memory, of which containers have little.
BYTES_PER_TASK = 2**20
TASKS_PER_WORKER = 8

Rows = NDArray[np.int64]
Samples = tuple[Tensor, Tensor]


def read_batches(
    reader: Reader, batches: Sequence[Tensor], num_workers: int, pin_memory: bool = False
) -> Iterator[Samples]:
    """Images uint8 [B, C, S, S] and labels int64 [B] of each index tensor [B], in their order.

    Raises ValueError that names the image when one cannot be used.
    """
    loader: DataLoader[Any] = DataLoader(
        reader,
        batch_sampler=[indices.tolist() for indices in batches],
        num_workers=min(num_workers, len(batches)),
        collate_fn=_as_they_are,
        pin_memory=pin_memory,
        # Its own, so that loading draws nothing from the global one.
        generator=torch.Generator(),
    )
    for samples in loader:
        if isinstance(samples, ValueError):
            raise samples
        yield samples


def decode_all(
    source: Source, rows: Rows, image_format: ImageFormat, num_workers: int
) -> NDArray[np.uint8]:
    """All images of `rows` as one array [N, C, S, S].

    Raises ValueError that names the first image that cannot be used. Large sets are decoded by
    processes: for images this small, threads wait for the interpreter more than they decode.
    """
    size = image_format.size
    images = np.empty((len(rows), image_format.num_channels, size, size), dtype=np.uint8)
    images_per_task = max(1, BYTES_PER_TASK // images[0].nbytes)
    batches = torch.split(torch.arange(len(rows)), images_per_task)
    num_workers = min(num_workers, len(batches) // TASKS_PER_WORKER)
    decoded = read_batches(Reader(source, rows, image_format), batches, num_workers)
    for start, (pixels, _) in zip(range(0, len(rows), images_per_task), decoded, strict=True):
        images[start : start + images_per_task] = pixels.numpy()
    return images


class Reader(Dataset[Any]):
    """Reads whole batches, which DataLoader's workers ask for through `__getitems__`.

    augment: applied to batches. crop_seed: random-resized crops and flips, drawn with this seed
    and the image's index; without it images are fitted to their size.
    """

    def __init__(
        self,
        source: Source,
        rows: Rows,
        image_format: ImageFormat,
        augment: Augmentation | None = None,
        crop_seed: int | None = None,
    ) -> None:
        self.source, self.rows, self.image_format = source, rows, image_format
        self.augment, self.crop_seed = augment, crop_seed
        size = [image_format.size, image_format.size]
        self.random_crop = v2.Compose(
            [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        )

    def __getitems__(self, indices: list[int]) -> Samples | ValueError:
        """Images and labels, or the error that a bad image causes.

        An error is given back and not raised, because DataLoader would re-raise it as a page of
        traceback.
        """
        try:
            pixels = np.stack([self._read(index) for index in indices])  # [B, S, S] or with C
        except ValueError as error:
            return ValueError(str(error))
        images = pixels.reshape(*pixels.shape[:3], -1).transpose(0, 3, 1, 2)  # [B, C, S, S]
        if self.augment is not None:
            images = self.augment(images, np.array(indices))
        labels = self.source.labels[self.rows[indices]]
        return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)

    def _read(self, index: int) -> NDArray[np.uint8]:
        """[S, S] or [S, S, C]."""
        image = decode(self.source, int(self.rows[index]), self.image_format)
        if self.crop_seed is None:
            image = fit(image, self.image_format.size)
        else:
            # torchvision draws from the global generator: lend it and give it back. Only the
            # CPU's: torch.manual_seed would reseed the GPU's too.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derive_seed(self.crop_seed, "image", index))
                image = self.random_crop(image)
        return np.asarray(image)


def _as_they_are(samples: Any) -> Any:
    return samples
