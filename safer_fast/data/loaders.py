"""Loaders: data sets held on the device, images decoded on demand, and noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from safer_fast.data.augmentation import PADDING, DeviceDraws, Draws, augment, draw, pad
from safer_fast.data.bad_images import BadImages
from safer_fast.data.batch import Batch
from safer_fast.data.formats import Source
from safer_fast.data.images import ImageFormat
from safer_fast.data.order import OrderedLoader, Ordering, RankShare
from safer_fast.data.reading import Reader, read_batches
from safer_fast.data.subset import Indices
from safer_fast.runtime.seeds import derive_seed, make_generator


class SetLoader(OrderedLoader):
    """A decoded data set in memory, padded for random crops.

    images: uint8 [N, C, S, S]; labels: int64 [N]. augmentation: any but random-resized-crop.
    """

    backend = "device"

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], ordering: Ordering
    ) -> None:
        super().__init__(len(images), ordering, labels)
        self.margin = PADDING.get(self.augmentation or "", 0)
        self.padded = pad(images, self.margin) if self.margin else images
        self.labels = labels

    def _draws(self, epoch: int | None) -> Draws | None:
        if epoch is None or self.augmentation not in PADDING:
            return None
        return draw(self.augmentation, self.num_images, self.seed, epoch)

    def _kept(self) -> slice:
        """Rows or columns of an image without its padding."""
        return slice(self.margin, self.padded.shape[2] - self.margin)


class CpuSetLoader(SetLoader):
    """A data set in CPU memory, augmented with numpy: the work is too small for torch's threads."""

    def _read(self, batches: Sequence[Indices], epoch: int | None, size: int) -> Iterator[Batch]:
        draws, kept = self._draws(epoch), self._kept()
        for real in batches:
            indices = _filled(real, size)
            if draws is None:
                images = self.padded[indices, :, kept, kept]
            else:
                images = augment(self.padded, indices, draws, indices)
            labels = torch.from_numpy(self.labels[indices])
            yield Batch(torch.from_numpy(images), labels, len(indices) - len(real))


class GpuSetLoader(SetLoader):
    """A data set in GPU memory; batches are bit-identical to those of `CpuSetLoader`.

    An epoch's order and draws are copied once; a batch costs a few small operations, and the host
    never waits for the device.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        ordering: Ordering,
        device: torch.device,
    ) -> None:
        super().__init__(images, labels, ordering)
        self.set = torch.from_numpy(self.padded).to(device)
        self.classes = torch.from_numpy(self.labels).to(device)
        self.padded = self.padded[:0]

    def _read(self, batches: Sequence[Indices], epoch: int | None, size: int) -> Iterator[Batch]:
        if not batches:
            return
        device, drawn, kept = self.set.device, self._draws(epoch), self._kept()
        draws = None if drawn is None else DeviceDraws(drawn, device)
        filled = [_filled(indices, size) for indices in batches]
        order = torch.from_numpy(np.concatenate(filled)).to(device)
        parts = torch.split(order, [len(indices) for indices in filled])
        for indices, real in zip(parts, batches, strict=True):
            images = self.set[indices]
            if draws is None:
                images = images[:, :, kept, kept].contiguous()
            else:
                images = draws.augment(images, indices)
            yield Batch(images, self.classes[indices], len(indices) - len(real))


def _filled(indices: Indices, size: int) -> Indices:
    """The indices, repeated up to `size` of them; an empty array stays empty."""
    return np.resize(indices, size) if 0 < len(indices) < size else indices


class StreamLoader(OrderedLoader):
    """Decodes images in worker processes; batches do not depend on the number of workers.

    randaugment: magnitude, 0 for none.
    """

    backend = "torch"

    def __init__(
        self,
        source: Source,
        rows: Indices,
        image_format: ImageFormat,
        ordering: Ordering,
        bad: BadImages,
        *,
        num_workers: int = 0,
        prefetch: int = 2,
        randaugment: int = 0,
    ) -> None:
        super().__init__(len(rows), ordering, source.labels[rows])
        self.source, self.rows, self.image_format, self.bad = source, rows, image_format, bad
        self.num_workers, self.prefetch, self.randaugment = num_workers, prefetch, randaugment

    def _read(self, batches: Sequence[Indices], epoch: int | None, size: int) -> Iterator[Batch]:
        pin_memory = torch.cuda.is_available()
        for samples in read_batches(
            self._reader(epoch, size),
            batches,
            self.bad,
            self.num_workers,
            self.prefetch,
            pin_memory,
        ):
            yield samples.batch()

    def _reader(self, epoch: int | None, size: int) -> Reader:
        if epoch is None or self.augmentation is None:
            return Reader(self.source, self.rows, self.image_format, size)
        seed, draws = derive_seed(self.seed, "augmentation", epoch), None
        if self.augmentation in PADDING:
            draws = draw(self.augmentation, self.num_images, self.seed, epoch)
        return Reader(
            self.source,
            self.rows,
            self.image_format,
            size,
            draws,
            seed if self.augmentation == "random-resized-crop" else None,
            self.randaugment,
            derive_seed(self.seed, "randaugment", epoch),
        )


class SyntheticLoader(OrderedLoader):
    """Yields the same noise on the device again and again, to time steps without data loading.

    The noise depends only on the seed.
    """

    backend = "device"

    def __init__(
        self,
        num_images: int,
        num_classes: int,
        image_format: ImageFormat,
        ordering: Ordering,
        device: torch.device,
    ) -> None:
        super().__init__(num_images, ordering)
        size, num_channels = image_format.size, image_format.num_channels
        # a probe's batches may be larger than an epoch's, and an epoch's are padded
        most = self.ordering.batch_size
        (largest,) = self._parts([np.arange(most)])
        num_rows = max(most, largest.position + self.batch_size)
        images = torch.randint(
            256,
            (num_rows, num_channels, size, size),
            dtype=torch.uint8,
            generator=make_generator(self.seed, "synthetic"),
        )
        labels = torch.randint(
            num_classes, (num_rows,), generator=make_generator(self.seed, "synthetic labels")
        )
        self.batch = Batch(images, labels).to(device)

    def _parts(self, batches: Sequence[Indices], limit: int | None = None) -> list[RankShare]:
        """Rows of the noise in place of indices of images."""
        return super()._parts([np.arange(len(batch)) for batch in batches], limit)

    def _read(self, batches: Sequence[Indices], epoch: int | None, size: int) -> Iterator[Batch]:
        for rows in batches:
            first = int(rows[0]) if len(rows) else 0
            kept = slice(first, first + max(size, len(rows)))
            num_padding = max(size - len(rows), 0)
            yield Batch(self.batch.images[kept], self.batch.labels[kept], num_padding)
