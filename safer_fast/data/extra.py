"""Extra images: a second source that fills a share of every training batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from safer_fast.data.batch import Batch
from safer_fast.data.order import OrderedLoader, Ordering
from safer_fast.data.subset import Indices


class MixedLoader(OrderedLoader):
    """Training batches of real images, followed by extra ones such as those of a generator.

    An epoch has every real image once, and its length is that of the real images. Extra images come
    in passes of their own, which last over epochs: a pass has every extra image once, in an order
    and with crops of its own. An epoch's number decides where in the passes it begins, so nothing
    has to be stored to resume. Either loader may be of any backend.

    real: of the training images. extra: of the others. ordering: that of the whole batches.
    fraction: the share of extra images in each batch, in (0, 1).
    Raises ValueError if a batch has no room for an image of each kind.
    """

    def __init__(
        self,
        real: OrderedLoader,
        extra: OrderedLoader,
        ordering: Ordering,
        fraction: float,
    ) -> None:
        num_real = ordering.batch_size - round(ordering.batch_size * fraction)
        if not 0 < num_real < ordering.batch_size:
            raise ValueError(
                "data.extra_fraction: expected a share that leaves room for a real and an extra "
                f"image in a batch of {ordering.batch_size}, got {fraction:g}"
            )
        super().__init__(real.num_images, replace(ordering, batch_size=num_real), real._classes)
        self.real, self.extra, self.backend = real, extra, real.backend
        largest = -(-self.num_images // len(self))
        share = round(largest * fraction / (1 - fraction))
        self.num_extra = min(max(share, 1), ordering.batch_size - largest)
        self.batch_size = self._part_of(largest + self.num_extra)

    @property
    def images_per_epoch(self) -> int:
        """See `Loader.images_per_epoch`."""
        return self.num_images + len(self) * self.num_extra

    @property
    def digest(self) -> str:
        """See `Loader.digest`."""
        both = f"{self.real.digest}{self.extra.digest}".encode()
        return hashlib.blake2b(both, digest_size=8).hexdigest()

    def _batches(self, number: int, limit: int | None) -> list[Indices]:
        """Indices of each batch: of real images, then places of extra ones from `num_images` on."""
        places = self.num_images + np.arange(len(self) * self.num_extra)
        pairs = zip(super()._batches(number, limit), np.split(places, len(self)), strict=True)
        return [np.concatenate(pair) for pair in pairs]

    def _read(self, batches: Sequence[Indices], epoch: int | None, size: int) -> Iterator[Batch]:
        if epoch is None:
            yield from self.real._read(batches, None, size)
            return
        first = (epoch - 1) * len(self) * self.num_extra
        real = [indices[indices < self.num_images] for indices in batches]
        places = [indices[indices >= self.num_images] - self.num_images for indices in batches]
        extra = self._read_extra([first + numbers for numbers in places])
        for batch, others in zip(self.real._read(real, epoch, 0), extra, strict=True):
            yield _joined([batch, *others])

    def _read_extra(self, batches: Sequence[Indices]) -> Iterator[list[Batch]]:
        """Yield the extra images of each batch, in a part for each pass that it reaches into.

        batches: places in all passes, one after another; each follows the one before.
        """
        num_images, current = self.extra.num_images, -1
        reader: Iterator[Batch] = iter(())
        for number, batch in enumerate(batches):
            parts = []
            for turn in np.unique(batch // num_images).tolist():
                if turn != current:
                    _close(reader)
                    current, reader = turn, self._read_pass(turn, batches[number:])
                parts.append(next(reader))
            yield parts
        _close(reader)

    def _read_pass(self, turn: int, batches: Sequence[Indices]) -> Iterator[Batch]:
        """Read those images of each batch that are in pass `turn` (from 0), if it has any."""
        order = self.extra._permutation("extra", turn)
        places = [batch[batch // len(order) == turn] % len(order) for batch in batches]
        return self.extra._read([order[part] for part in places if len(part)], turn + 1, 0)


def _joined(batches: Sequence[Batch]) -> Batch:
    """The images that count of all batches, on the GPU if any of them is there."""
    devices = [batch.images.device for batch in batches]
    device = next((found for found in devices if found.type == "cuda"), devices[0])
    moved = [batch.to(device, non_blocking=True) for batch in batches]
    counted = [batch.num_images for batch in batches]
    return Batch(
        torch.cat([batch.images[:count] for batch, count in zip(moved, counted, strict=True)]),
        torch.cat([batch.labels[:count] for batch, count in zip(moved, counted, strict=True)]),
    )


def _close(reader: Iterator[Batch]) -> None:
    """End the worker processes of a reader that has given all that is wanted."""
    close = getattr(reader, "close", None)
    if close is not None:
        close()
