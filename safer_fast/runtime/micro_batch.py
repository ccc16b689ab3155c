"""Micro-batches: the number of images in the network at a time, as set or as memory allows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from safer_fast.config.messages import first_line


class MicroBatch:
    """The number of images that a phase processes at a time.

    Args:
        flag: the setting, for messages.
        size: the number; auto: all of a batch, halved after an out-of-memory error.
        release: called after an out-of-memory error, to free memory that can be recomputed; returns
            true if there was any, and the same number is tried once more.
        report: receives a line for every change.
    """

    def __init__(
        self,
        flag: str = "micro_batch",
        size: int | Literal["auto"] = "auto",
        release: Callable[[], bool] = lambda: False,
        report: Callable[[str], None] = print,
    ) -> None:
        self.flag, self.is_auto = flag, size == "auto"
        self.size = None if size == "auto" else size
        self._release, self._report = release, report

    def run(self, num_images: int, work: Callable[[int], None]) -> None:
        """Call `work` with the number of images to process at a time, until memory suffices.

        `work` must start anew whenever it is called. Raises ValueError if memory does not suffice
        and the number is set by the user or is 1.
        """
        while True:
            size = min(self.size or num_images, num_images)
            try:
                work(size)
                return
            except torch.OutOfMemoryError as error:
                reason = first_line(error)
            # here, where no traceback keeps the tensors of the failed attempt alive
            if not self._free():
                self._shrink(size, reason)

    def in_parts(self, work: Callable[..., None], *tensors: Tensor) -> None:
        """Call `work(part, *rows)` on part after part of tensors [B, ...] of one length.

        `part` is a slice, `rows` are the tensors' rows in it. After an out-of-memory the parts are
        smaller and begin again at 0, so `work` overwrites what it left before.
        """
        num_images = len(tensors[0])

        def work_through(size: int) -> None:
            for first in range(0, num_images, size):
                part = slice(first, first + size)
                work(part, *(values[part] for values in tensors))

        if num_images:
            self.run(num_images, work_through)

    def _free(self) -> bool:
        """Free what can be computed again; true if there was anything."""
        is_freed = self._release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return is_freed

    def _shrink(self, size: int, reason: str) -> None:
        if not self.is_auto or size == 1:
            advice = "a smaller model or image" if size == 1 else "auto or a smaller number"
            raise ValueError(f"{self.flag}: expected {advice}, got {size} images at once: {reason}")
        self.size = -(-size // 2)
        self._report(f"{self.flag}: {self.size} images at a time, {size} do not fit in memory")


def fill_(values: Tensor, num_images: int) -> Tensor:
    """Fill the rows from `num_images` on with copies of those before, or zeros if there are none.

    Copies, because batch statistics may be computed over all rows.
    """
    missing = len(values) - num_images
    if missing and num_images:
        values[num_images:] = values[torch.arange(missing, device=values.device) % num_images]
    elif missing:
        values.zero_()
    return values
