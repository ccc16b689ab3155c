"""What every loader gives and what a loader is: the contract between data and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Batch:
    """Images with their labels.

    images: uint8 in 0..255 or float32 in [0, 1], [B, C, H, W]; labels: int64 [B].
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`; `non_blocking` copies overlap only from pinned memory."""
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
        )

    def pinned(self) -> Batch:
        """The same batch in pinned memory, from which a GPU copies without waiting."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory())


def as_pixels(images: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: bytes are divided by 255, floats are taken to be pixels already.

    images: uint8 or floating point, any shape. The range of floats is not checked.
    """
    pixels = images.to(torch.float32)
    return pixels if images.is_floating_point() else pixels / 255


class Loader(Protocol):
    """Batches of one split, in an order that depends on the seed and the epoch and nothing else."""

    @property
    def num_images(self) -> int:
        """Images in the split."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of epoch `number`, counted from 1, on the CPU.

        A training loader shuffles, augments, and drops the last partial batch; the others give
        every image once, in order and unaugmented, whatever the number.
        Raises ValueError that names the file when an image cannot be read.
        """

    def probe(self, num_images: int, number: int) -> Iterator[Batch]:
        """At most `num_images` different images, unaugmented, drawn with the seed and `number`."""
