"""The loaders: images held in memory, or decoded by worker processes as they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safer_fast.data.augmentation import Augmentation, DeviceAugmentation, draw_augmentation
from safer_fast.data.batch import Batch, Loader
from safer_fast.data.formats import Source
from safer_fast.data.images import LARGEST_UNCROPPED_SIZE, ImageFormat, find_sizes
from safer_fast.data.reading import Reader, Rows, decode_all, read_batches
from safer_fast.data.seeds import derive_seed, make_generator

# Sets up to this many decoded bytes are held in memory.
MEMORY_LIMIT = 2**30


@dataclass(frozen=True)
class Ordering:
    """How a loader goes through its images.

    augmentation: none, shift, crop or random-resized-crop; None makes an evaluation loader.
    """

    batch_size: int
    seed: int
    augmentation: str | None = None


def make_loader(
    source: Source,
    rows: Rows,
    image_format: ImageFormat,
    ordering: Ordering,
    num_workers: int,
    device: torch.device | None = None,
) -> Loader:
    """A loader of the given rows: in memory where that is possible and they are small, else not.

    Random-resized crops need the images in their own size. Images above 64 pixels that have to be
    resized are streamed too: they would take long to decode before the first step. What is held in
    memory lies on `device`, if one is given.
    """
    loader = StreamLoader(source, rows, image_format, ordering, num_workers)
    size = image_format.size
    num_bytes = len(rows) * image_format.num_channels * size * size
    is_quick = size <= LARGEST_UNCROPPED_SIZE or set(find_sizes([source])) == {(size, size)}
    if num_bytes > MEMORY_LIMIT or not is_quick or ordering.augmentation == "random-resized-crop":
        return loader
    images, labels = decode_all(source, rows, image_format, num_workers), source.labels[rows]
    if device is None:
        return InMemoryLoader(images, labels, ordering)
    return DeviceLoader(images, labels, ordering, device)


class IndexedLoader(ABC):
    """The order of images; subclasses read them. Satisfies `Loader`.

    Raises ValueError when there are fewer training images than fill a batch.
    """

    def __init__(self, num_images: int, ordering: Ordering) -> None:
        self.num_images = num_images
        self.batch_size, self.seed = ordering.batch_size, ordering.seed
        self.augmentation = ordering.augmentation
        if self.augmentation is not None and self.batch_size > num_images:
            raise ValueError(
                f"batch_size: expected at most {num_images} training images, got {self.batch_size}"
            )

    def __len__(self) -> int:
        if self.augmentation is not None:
            return self.num_images // self.batch_size
        return -(-self.num_images // self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """See `Loader.epoch`."""
        if self.augmentation is None:
            return self._batches(torch.split(torch.arange(self.num_images), self.batch_size), None)
        order = torch.randperm(
            self.num_images, generator=make_generator(self.seed, "order", number)
        )
        return self._batches(torch.split(order, self.batch_size)[: len(self)], number)

    def probe(self, num_images: int, number: int) -> Iterator[Batch]:
        """See `Loader.probe`."""
        order = torch.randperm(
            self.num_images, generator=make_generator(self.seed, "probe", number)
        )
        return self._batches(torch.split(order[:num_images], self.batch_size), None)

    @abstractmethod
    def _batches(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Reads the images of each index tensor [B], augmented as in `epoch` unless it is None."""

    def _draw(self, epoch: int | None) -> Augmentation | None:
        """The epoch's augmentation where it works on batches."""
        if epoch is None or self.augmentation not in ("shift", "crop"):
            return None
        generator = make_generator(self.seed, "augmentation", epoch)
        return draw_augmentation(self.augmentation, self.num_images, generator)


class InMemoryLoader(IndexedLoader):
    """Images held in memory. images: uint8 [N, C, S, S]; labels: int64 [N].

    augmentation: any but random-resized-crop.
    """

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], ordering: Ordering
    ) -> None:
        super().__init__(len(images), ordering)
        self.images, self.labels = images, labels

    def _batches(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        augment = self._draw(epoch)
        for batch in batches:
            indices = batch.numpy()
            images = self.images[indices]
            if augment is not None:
                images = augment(images, indices)
            yield Batch(torch.from_numpy(images), torch.from_numpy(self.labels[indices]))


class DeviceLoader(IndexedLoader):
    """The images of an `InMemoryLoader`, held and augmented on a device: the same batches, there.

    An epoch's order and draws are copied once; a batch costs a few small operations.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        ordering: Ordering,
        device: torch.device,
    ) -> None:
        super().__init__(len(images), ordering)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def _batches(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        device, drawn = self.images.device, self._draw(epoch)
        augment = None if drawn is None else DeviceAugmentation(drawn, device)
        order = torch.cat(list(batches)).to(device)
        for indices in torch.split(order, [len(batch) for batch in batches]):
            images = self.images[indices]
            if augment is not None:
                images = augment(images, indices)
            yield Batch(images, self.labels[indices])


class StreamLoader(IndexedLoader):
    """Decodes images in worker processes; what they give does not depend on how many there are."""

    def __init__(
        self,
        source: Source,
        rows: Rows,
        image_format: ImageFormat,
        ordering: Ordering,
        num_workers: int,
    ) -> None:
        super().__init__(len(rows), ordering)
        self.source, self.rows, self.image_format = source, rows, image_format
        self.num_workers = num_workers

    def _batches(self, batches: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        crop_seed = None
        if epoch is not None and self.augmentation == "random-resized-crop":
            crop_seed = derive_seed(self.seed, "augmentation", epoch)
        reader = Reader(self.source, self.rows, self.image_format, self._draw(epoch), crop_seed)
        pin_memory = torch.cuda.is_available()
        for images, labels in read_batches(reader, batches, self.num_workers, pin_memory):
            yield Batch(images, labels)
