"""Batch and Loader: the contract between data and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from safer_fast.runtime.micro_batch import fill_


@dataclass
class Batch:
    """Images with their labels, padded to the size that all batches of a split share.

    images: uint8 in 0..255 or float32 in [0, 1], [B, C, H, W]. labels: int64 [B], or probabilities
    float32 [B, K] of mixed images. num_padding: number of images at the end that only fill the
    batch up and count for nothing. position: place of the first image in the epoch or probe, over
    all ranks, from 0: image k has position k whatever the number of ranks, as long as no image
    before it is left out of its part of the batch.
    """

    images: Tensor
    labels: Tensor
    num_padding: int = 0
    position: int = 0

    @property
    def num_images(self) -> int:
        """Number of images that count; they come first."""
        return len(self.labels) - self.num_padding

    def weights(self) -> Tensor:
        """Weight of each image in a mean, float32 [B] on the batch's device; their sum is 1, or 0
        if no image counts."""
        rows = torch.arange(len(self.labels), device=self.labels.device)
        return (rows < self.num_images).float() / max(self.num_images, 1)

    def padded(self, size: int) -> Batch:
        """The batch, filled up to `size` with copies of its images (see `fill_`)."""
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


def resized(batch: Batch, size: int | None) -> Batch:
    """Resize a batch to square images of this edge, bilinear and antialiased, as float32 pixels.

    None: the batch as it is.
    """
    if size is None:
        return batch
    pixels = functional.interpolate(
        as_pixels(batch.images), size=(size, size), mode="bilinear", antialias=True
    )
    return replace(batch, images=pixels.clamp_(0, 1))


def as_pixels(images: Tensor) -> Tensor:
    """Convert images to float32 pixels in [0, 1]: bytes are divided by 255, floats are kept.

    images: uint8 or floating point, any shape. The range of floats is not checked.
    """
    pixels = images.to(torch.float32)
    return pixels if images.is_floating_point() else pixels / 255


class Loader(Protocol):
    """Batches of one split, in an order that depends only on the seed and the epoch.

    Each rank has its own loader, which yields its part of every batch.
    """

    @property
    def num_images(self) -> int:
        """Number of images in the split, over all ranks."""

    @property
    def images_per_epoch(self) -> int:
        """Number of images of a whole epoch, over all ranks: of the split, and extra ones."""

    @property
    def digest(self) -> str:
        """Hash of the number of images and their classes in order, sixteen hexadecimal digits."""

    @property
    def batch_size(self) -> int:
        """Number of images in every batch of an epoch, including padding."""

    @property
    def backend(self) -> str:
        """Name of the backend that prepares the batches: dali, torch or device."""

    def __len__(self) -> int:
        """Number of batches per epoch."""

    def epoch(self, number: int, start: int = 0, limit: int | None = None) -> Iterator[Batch]:
        """Yield the batches of epoch `number` (from 1), starting at batch `start` (from 0).

        Every image comes exactly once; batches from `start` on are the same as in a whole epoch. A
        training loader shuffles and augments; the others yield every image in order and unaugmented
        for every number. limit: number of images that are read, over all ranks; batches without any
        of them are left out. A training loader takes the first images of its order; the others take
        a stratified subset that depends only on the labels: a larger subset begins with a smaller
        one. All ranks yield the same number of batches, some of them possibly all padding.
        Raises ValueError naming the file if an image cannot be read and is not to be skipped.
        """

    def probe(self, num_images: int, number: int) -> Iterator[Batch]:
        """Yield up to `num_images` different unaugmented images, drawn with seed and `number`.

        They cover as many classes as there is room for. The last batch may be smaller than the
        others, and a rank's part of it empty; all ranks yield the same number of batches.
        """
