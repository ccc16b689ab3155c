"""What a step counts on the device until somebody asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class DeviceSums:
    """Running sums of numbers that stay on the device until they are asked for.

    They stay where they are, so that recordings of a step may add to them. Sums are fp64 on every
    device: a few elements cost nothing there, and counts and losses of a whole epoch stay exact
    where fp32 would drop the last digits.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def values(self) -> Tensor:
        """A copy of the sums in order of their names, fp64 [n], on the device."""
        ordered = [self._sums[name].reshape(-1) for name in sorted(self._sums)]
        return torch.cat(ordered) if ordered else torch.zeros(0, dtype=torch.float64)

    def load(self, shapes: Mapping[str, tuple[int, ...]], values: Tensor) -> None:
        """The sums of these names and shapes are what `values` once gave."""
        sizes = [math.prod(shapes[name]) for name in sorted(shapes)]
        for name, value in zip(sorted(shapes), torch.split(values, sizes), strict=True):
            self._sums[name] = value.reshape(shapes[name]).clone()

    def add(self, **values: Tensor) -> None:
        """Adds each 0-d or 1-d tensor to the sum of its name, without waiting for the device."""
        for name, value in values.items():
            assert value.dim() <= 1, f"{name}: expected at most 1 dimension, got {value.dim()}"
            if name in self._sums:
                self._sums[name].add_(value.detach())
            else:
                self._sums[name] = value.detach().clone().double()

    def take(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The sums as floats, in one transfer to the host; all of them start again from 0.

        Those of a 1-d tensor are called name_0, name_1 and so on. reduce: gives the sums of all
        ranks in place of those [n] of this one.
        """
        if not self._sums:
            return {}
        values = reduce(self.values()).tolist()
        for total in self._sums.values():
            total.zero_()
        return dict(zip(self._labels(), values, strict=True))

    def _labels(self) -> list[str]:
        labels = []
        for name in sorted(self._sums):
            total = self._sums[name]
            labels += [f"{name}_{k}" for k in range(len(total))] if total.dim() else [name]
        return labels


class Skips:
    """How many steps in a row were skipped: now, and at most so far; 0-d float32 each."""

    def __init__(self, device: torch.device) -> None:
        self.in_a_row, self.longest = torch.zeros(2, device=device)

    def count(self, is_skipped: Tensor) -> None:
        """One more step, skipped where `is_skipped`, 0-d, is 1."""
        self.in_a_row.add_(1).mul_(is_skipped)
        torch.maximum(self.longest, self.in_a_row, out=self.longest)

    def most_in_a_row(self) -> int:
        """The most that were skipped one after the other; waits for the device."""
        return int(self.longest)
