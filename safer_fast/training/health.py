"""How a step goes: its losses, its gradients, its attack; summed up on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from safer_fast import kernels
from safer_fast.training.objectives import Targets


class Health:
    """What a step notices about itself, in tensors that stay where they are.

    flat: where the step's passes leave their gradients [n], and behind them a number that is none.
    is_sharpness_aware: whether there are two passes; then the first gradient is kept until it can
    be compared with the second, 4 bytes for each selected weight. num_attack_steps: the attack's.
    counts_steps: whether this rank counts what is the same on all of them.
    """

    def __init__(
        self,
        flat: Tensor,
        is_sharpness_aware: bool,
        num_attack_steps: int,
        counts_steps: bool = True,
    ) -> None:
        self.loss, self.worst_loss, self.num_right = flat.new_zeros(3)
        self.skips = Skips(flat.device)
        self.sums = DeviceSums()
        self._gradient, self._counts_steps = flat[:-1], counts_steps
        self._first = torch.zeros_like(self._gradient) if is_sharpness_aware else None
        self.shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("attacked", "correct", "gradient_cosine", "gradient_norm", "images"), ()
        )
        self.shapes |= dict.fromkeys(("loss", "loss_rise", "skipped", "taken"), ())
        self.shapes["right"] = (num_attack_steps,)
        """The sums that `record` adds to, by name."""

    @property
    def is_sharpness_aware(self) -> bool:
        """Whether two gradients are compared."""
        return self._first is not None

    def keep_gradient(self) -> None:
        """The gradient that lies there now is the first of two."""
        if self._first is not None:
            self._first.copy_(self._gradient)

    def record(self, targets: Targets, hits: Tensor, squares: Tensor, is_skipped: Tensor) -> None:
        """Adds up a step that is about to be applied, or is skipped where `is_skipped` [] is 1.

        hits: `ReplayedAttack.hits` of its attack. squares: ||g||^2 of the last gradient, 0-d.
        """
        norm, cosine = self._compare(squares)
        counted = (1.0 - is_skipped) * self._counts_steps
        self.sums.add(
            loss=targets.total(self.loss),
            loss_rise=targets.total(self.worst_loss - self.loss),
            correct=self.num_right,
            images=targets.num_images(),
            skipped=is_skipped * self._counts_steps,
            taken=counted,
            gradient_norm=torch.where(counted > 0, norm, 0.0),
            gradient_cosine=torch.where(counted > 0, cosine, 0.0),
            right=hits[:-1],
            attacked=hits[-1],
        )

    def _compare(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """Length of the first gradient, and its cosine with the last; 0-d each."""
        if self._first is None:
            return last.sqrt(), torch.zeros_like(last)
        first = kernels.sum_squares(self._first)
        product = torch.dot(self._first, self._gradient)
        lengths = (first * last).sqrt()
        return first.sqrt(), torch.where(lengths > 0, product / lengths, 0.0)


def health_figures(sums: Mapping[str, float], is_sharpness_aware: bool) -> dict[str, Any]:
    """What the sums of one or more steps, or of all steps of an epoch, say of them.

    Means over steps: gradient_norm, and gradient_cosine where there were two passes. attack_success
    is the share of images classified wrongly after 0, 1, ... steps of the attack, None without.
    """
    taken, images = max(sums["taken"], 1), max(sums["images"], 1)
    num_attack_steps = sum(name.startswith("right_") for name in sums)
    success = None
    if sums["attacked"]:
        rights = [sums[f"right_{k}"] / sums["attacked"] for k in range(num_attack_steps)]
        success = [1 - right for right in (*rights, sums["correct"] / images)]
    return {
        "loss_rise": sums["loss_rise"] / images,
        "gradient_norm": sums["gradient_norm"] / taken,
        "gradient_cosine": sums["gradient_cosine"] / taken if is_sharpness_aware else None,
        "attack_success": success,
    }


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
