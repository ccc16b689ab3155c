"""Batch augmentations on the device: random erasing, Mixup, CutMix."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safer_fast.config.schema import DataConfig
from safer_fast.data.batch import Batch, as_pixels
from safer_fast.runtime.seeds import derive_seed, make_generator

ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
POSITIONS_PER_DRAW = 1024


class Mixing:
    """The batch augmentations of a run.

    Erased rectangles depend on the seed, the epoch and the image's position in it. Mixup and CutMix
    draw once for a batch, from seed, epoch and `index`, the same on all ranks; each rank mixes the
    images of its own part, so that the pairs depend on the number of ranks.
    """

    def __init__(self, config: DataConfig, num_classes: int, seed: int) -> None:
        self.erasing, self.seed = config.random_erasing, seed
        self.mixup: Any = None
        if config.mixup or config.cutmix:
            from timm.data.mixup import Mixup

            # smoothing is the objective's
            self.mixup = Mixup(  # type: ignore[no-untyped-call]
                config.mixup, config.cutmix, label_smoothing=0.0, num_classes=num_classes
            )

    def __call__(self, batch: Batch, epoch: int, index: int) -> Batch:
        """Augment a batch: float32 pixels in [0, 1], and labels as probabilities [B, K] if images
        are mixed. The host does not wait for the device."""
        images = as_pixels(batch.images)
        if self.erasing:
            images = erase(images, self.erasing, self._draws(batch, epoch))
        if self.mixup is None:
            return replace(batch, images=images)
        # Mixup works in place: the caller's images must not change
        own = images.clone() if images is batch.images else images
        seed = derive_seed(self.seed, "mixup", epoch, index) % 2**32
        images, labels = _drawing_from(seed, self.mixup, own, batch.labels)
        return replace(batch, images=images, labels=labels)

    def _draws(self, batch: Batch, epoch: int) -> Tensor:
        """Random numbers for `erase`, drawn for groups of positions of a fixed size, so that they
        depend neither on batches nor on ranks."""
        num_images, num_numbers = len(batch.labels), 5 + batch.images.shape[1]
        first, skipped = divmod(batch.position, POSITIONS_PER_DRAW)
        last = (batch.position + max(num_images, 1) - 1) // POSITIONS_PER_DRAW
        groups = [
            torch.rand(
                POSITIONS_PER_DRAW,
                num_numbers,
                generator=make_generator(self.seed, "erase", epoch, group),
                dtype=torch.float64,
            )
            for group in range(first, last + 1)
        ]
        return torch.cat(groups)[skipped : skipped + num_images]


def erase(images: Tensor, probability: float, draws: Tensor) -> Tensor:
    """Paint a rectangle of one random colour over some images, float [B, C, H, W] in [0, 1].

    Random erasing (Zhong et al., 2020): 2 to 33 % of the area, aspect ratio 0.3 to 3.3, uniform in
    its logarithm. A rectangle that does not fit is cut off at the image's size, not drawn again.
    draws: for each image numbers in [0, 1), float64 [B, 5 + C] on the CPU.
    """
    height, width = images.shape[2:]
    draws = draws.T
    area = height * width * _between(*ERASED_AREA, draws[1])
    lowest, highest = map(math.log, ERASED_RATIO)
    ratio = torch.exp(_between(lowest, highest, draws[2]))
    tall = torch.sqrt(area * ratio).round().clamp(1, height)
    wide = torch.sqrt(area / ratio).round().clamp(1, width)
    tall = torch.where(draws[0] < probability, tall, 0.0)
    top = (draws[3] * (height - tall + 1)).floor()
    left = (draws[4] * (width - wide + 1)).floor()
    numbers = torch.cat([torch.stack([top, left, tall, wide]), draws[5:]]).float()
    numbers = numbers.to(images.device, non_blocking=True)  # [4 + C, B]
    top, left, tall, wide = numbers[:4, :, None]  # [B, 1] each
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    is_row = (rows >= top) & (rows < top + tall)  # [B, H]
    is_column = (columns >= left) & (columns < left + wide)  # [B, W]
    colour = numbers[4:].T[:, :, None, None]  # [B, C, 1, 1]
    return torch.where(is_row[:, None, :, None] & is_column[:, None, None, :], colour, images)


def _between(low: float, high: float, share: Tensor) -> Tensor:
    return low + (high - low) * share


def _drawing_from(seed: int, function: Any, *arguments: Any) -> Any:
    """Call a function that draws from numpy's global generator: seeded for it, then restored."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        return function(*arguments)
    finally:
        np.random.set_state(state)
