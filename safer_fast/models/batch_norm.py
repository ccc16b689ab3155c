"""State of a network beside its weights: buffers, such as the running statistics of batch norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from safer_fast.runtime.ranks import Ranks


class BatchNormStatistics:
    """Running statistics of the batch norms among some modules; does nothing where there are none.

    Each rank normalises by its own part of a batch, as DistributedDataParallel does; the statistics
    are then averaged over ranks.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        norms = [each for each in modules if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        self._own: list[Tensor] = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._own]

    def keep(self) -> None:
        """Remember the current statistics, for `undo_where` to restore."""
        if self._own:
            torch._foreach_copy_(self._kept, self._own)

    def average(self, ranks: Ranks) -> None:
        """Set the statistics to their mean over ranks, the same on each."""
        ranks.average_([buffer for buffer in self._own if buffer.is_floating_point()])

    def undo_where(self, is_skipped: Tensor) -> None:
        """Restore what `keep` remembered where `is_skipped`, 0-d, is 1: decided on the device."""
        for buffer, kept in zip(self._own, self._kept, strict=True):
            buffer.copy_(torch.where(is_skipped > 0, kept, buffer))


def buffers_state(network: nn.Module) -> dict[str, Tensor]:
    """Copy the buffers that are part of a network's state dict, by name."""
    return {name: buffer.clone() for name, buffer in _buffers(network).items()}


def load_buffers_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the buffers of a network to what `buffers_state` returned."""
    buffers = _buffers(network)
    for name, value in state.items():
        buffers[name].copy_(value)


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    return {name: value for name, value in network.state_dict().items() if name not in parameters}
