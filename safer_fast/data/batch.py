"""What every loader gives and what a loader is: the contract between data and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from safer_fast.runtime.micro_batch import fill_


@dataclass
class Batch:
    """Images with their labels, filled up to a size that is the same for all batches of a split.

    images: uint8 in 0..255 or float32 in [0, 1], [B, C, H, W]. labels: int64 [B], or probabilities
    float32 [B, K] of mixed images. num_padding: the last images that are there only to fill the
    batch up, and count for nothing. position: where the first image stands among all images of the
    epoch, or of the probe, of all ranks together, counted from 0: image k has position k whatever
    the number of ranks, as long as none before it is left out of its part of the batch.
    """

    images: Tensor
    labels: Tensor
    num_padding: int = 0
    position: int = 0

    @property
    def num_images(self) -> int:
        """Images that count; they come first."""
        return len(self.labels) - self.num_padding

    def weights(self) -> Tensor:
        """What each image counts for in a mean, float32 [B] on the batch's device; sum 1, or 0
        where no image counts."""
        rows = torch.arange(len(self.labels), device=self.labels.device)
        return (rows < self.num_images).float() / max(self.num_images, 1)

    def padded(self, size: int) -> Batch:
        """The batch with copies of its images up to `size`, see `fill_`."""
        missing = size - len(self.labels)
        if missing <= 0:
            return self
        images = self.images.new_empty(size, *self.images.shape[1:])
        labels = self.labels.new_empty(size)
        images[:-missing], labels[:-missing] = self.images, self.labels
        kept, num_padding = size - missing, self.num_padding + missing
        return Batch(fill_(images, kept), fill_(labels, kept), num_padding, self.position)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`; `non_blocking` copies overlap only from pinned memory."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pinned(self) -> Batch:
        """The same batch in pinned memory, from which a GPU copies without waiting."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def as_pixels(images: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: bytes are divided by 255, floats are taken to be pixels already.

    images: uint8 or floating point, any shape. The range of floats is not checked.
    """
    pixels = images.to(torch.float32)
    return pixels if images.is_floating_point() else pixels / 255


class Loader(Protocol):
    """Batches of one split, in an order that depends on the seed and the epoch and nothing else.

    Of several ranks each has its own loader, which gives its part of every batch.
    """

    @property
    def num_images(self) -> int:
        """Images in the split, of all ranks together."""

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that are the same for the same number of images of the same
        classes in the same order."""

    @property
    def batch_size(self) -> int:
        """Images of every batch of an epoch, padding included."""

    @property
    def backend(self) -> str:
        """What prepares the batches: dali, torch or device."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, number: int, start: int = 0, limit: int | None = None) -> Iterator[Batch]:
        """The batches of epoch `number`, counted from 1, from batch `start` on, counted from 0.

        Every image comes exactly once; what comes from `start` on is what would have come there
        anyway. A training loader shuffles and augments, the others give every image in order and
        unaugmented, whatever the number. limit: only so many images count, of all ranks together;
        the others are not read, and batches of none but them do not come. A training loader takes
        the first of its order; the others take a stratified subset that depends on the labels
        alone, in an order of its own: a larger subset begins with a smaller one. Every rank has as
        many batches, some perhaps of nothing but padding.
        Raises ValueError that names the file when an image cannot be read and is not to be skipped.
        """

    def probe(self, num_images: int, number: int) -> Iterator[Batch]:
        """At most `num_images` different images, unaugmented, drawn with the seed and `number`.

        They hold as many classes as they have room for.
        The last batch may be smaller than the others, and a rank's part of it empty; every rank
        has as many batches.
        """
