"""How many images go through the network at a time: as many as asked for, or as memory holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


class MicroBatch:
    """The number of images that a phase takes at a time.

    Args:
        flag: what a user sets it by, for messages.
        size: the number; auto: all of a batch, and half as many after each out-of-memory.
        release: called after an out-of-memory, to let go of memory that can be had again.
        report: told of every change.
    """

    def __init__(
        self,
        flag: str = "micro_batch",
        size: int | Literal["auto"] = "auto",
        release: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.flag, self.is_auto = flag, size == "auto"
        self.size = None if size == "auto" else size
        self._release, self._report = release, report

    def run(self, num_images: int, work: Callable[[int], None]) -> None:
        """Calls `work` with the number of images to take at a time, until memory suffices.

        `work` must start afresh whenever it is called. Raises ValueError where the number is set,
        or is 1, and memory does not suffice.
        """
        while True:
            size = min(self.size or num_images, num_images)
            try:
                work(size)
                return
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            # here, where no traceback keeps the tensors of the failed attempt alive
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

    def _shrink(self, size: int, reason: str) -> None:
        if not self.is_auto or size == 1:
            advice = "a smaller model or image" if size == 1 else "auto or a smaller number"
            raise ValueError(f"{self.flag}: expected {advice}, got {size} images at once: {reason}")
        self.size = -(-size // 2)
        self._release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._report(f"{self.flag}: {self.size} images at a time, {size} do not fit in memory")


def fill_(values: Tensor, num_images: int) -> Tensor:
    """Rows from `num_images` on become copies of those before, zeros where there are none.

    Copies, because statistics of batches may be taken over all of them.
    """
    missing = len(values) - num_images
    if missing and num_images:
        values[num_images:] = values[torch.arange(missing, device=values.device) % num_images]
    elif missing:
        values.zero_()
    return values
