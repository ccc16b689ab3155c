"""The statistics that batch norms learn while they are trained: alike on all ranks, and undone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from safer_fast.runtime.ranks import Ranks


class BatchNormStatistics:
    """The running statistics of the batch norms among these modules; nothing where there are none.

    Each rank normalises by its own part of a batch, as DistributedDataParallel does; what is
    learned from that is averaged.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        norms = [each for each in modules if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        self._own: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._own]

    def keep(self) -> None:
        """Those of now are what `undo_where` gives back."""
        if self._own:
            torch._foreach_copy_(self._kept, self._own)

    def average(self, ranks: Ranks) -> None:
        """All ranks have the mean of theirs."""
        ranks.average_([buffer for buffer in self._own if buffer.is_floating_point()])

    def undo_where(self, is_skipped: Tensor) -> None:
        """Those that were kept are back where `is_skipped`, 0-d, is 1: decided on the device."""
        for buffer, kept in zip(self._own, self._kept, strict=True):
            buffer.copy_(torch.where(is_skipped > 0, kept, buffer))
