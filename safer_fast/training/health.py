"""Losses, gradient norms and attack success of training steps, summed on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from safer_fast import kernels
from safer_fast.runtime.ranks import Ranks
from safer_fast.training.objectives import Targets


class Health:
    """Figures of training steps, in device tensors that never move, so CUDA graphs may write them.

    Rank 0 alone counts what is the same on all ranks.

    Args:
        flat: the gradients [n] that the passes of a step write, and one number behind them.
        is_sharpness_aware: true for a step of two passes; the first gradient is then kept, 4 bytes
            for each selected weight, to be compared with the second.
        num_attack_steps: most iterations of the training attack.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        flat: Tensor,
        is_sharpness_aware: bool,
        num_attack_steps: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.loss, self.worst_loss, self.num_right = flat.new_zeros(3)
        self.skips = Skips(flat.device)
        self.sums = DeviceSums()
        self._gradient, self._ranks = flat[:-1], ranks or Ranks()
        self._first = torch.zeros_like(self._gradient) if is_sharpness_aware else None
        self.shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("attacked", "correct", "gradient_cosine", "gradient_norm", "images"), ()
        )
        self.shapes |= dict.fromkeys(("loss", "loss_rise", "skipped", "taken"), ())
        self.shapes["right"] = (num_attack_steps,)
        """Shapes of the sums that `record` adds to, by name."""

    @property
    def is_sharpness_aware(self) -> bool:
        """True for steps of two passes, whose gradients are compared."""
        return self._first is not None

    def note_pass(self, loss: Tensor, num_right: Tensor, is_second: bool) -> Tensor:
        """Remember loss and hits, 0-d, of a pass over the batch: at w, or `is_second` at w + e.

        Returns the sum of both losses, 0-d, which is finite only if both are.
        """
        self.worst_loss.copy_(loss)
        if not is_second:
            self.loss.copy_(loss)
            self.num_right.copy_(num_right)
        both: Tensor = self.loss + loss
        return both

    def keep_gradient(self) -> None:
        """Remember the current gradient as the first of two."""
        if self._first is not None:
            self._first.copy_(self._gradient)

    def record(self, targets: Targets, hits: Tensor, squares: Tensor, is_skipped: Tensor) -> None:
        """Add a step to the sums, right before its update; it is skipped where `is_skipped` is 1.

        hits: `ReplayedAttack.hits` of its attack. squares: ||g||^2 of the last gradient, 0-d.
        """
        norm, cosine = self._compare(squares)
        rights = hits[:-1]
        counts_steps = self._ranks.is_first
        counted = (1.0 - is_skipped) * counts_steps
        self.sums.add(
            loss=targets.total(self.loss),
            loss_rise=targets.total(self.worst_loss - self.loss),
            correct=self.num_right,
            images=targets.num_images(),
            skipped=is_skipped * counts_steps,
            taken=counted,
            gradient_norm=torch.where(counted > 0, norm, 0.0),
            gradient_cosine=torch.where(counted > 0, cosine, 0.0),
            right=torch.where(rights < 0, self.num_right, rights),
            attacked=hits[-1],
        )
        self.skips.count(is_skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """Copy counts of skipped steps, `skips` [2], and the sums of all ranks, `sums` [ranks, n].

        All ranks must call it at the same point.
        """
        return {"skips": self.skips.state(), "sums": self._ranks.gather(self.sums.values())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set counts and sums to what `state_dict` returned; other names are ignored.

        Where the number of ranks has changed, rank 0 has the sums of all.
        """
        self.skips.load(state["skips"])
        sums = state["sums"]
        if len(sums) == self._ranks.num_ranks:
            own = sums[self._ranks.rank]
        else:
            own = sums.sum(0) if self._ranks.is_first else torch.zeros_like(sums[0])
        if own.numel():  # a step was taken
            self.sums.load(self.shapes, own.to(self._gradient.device))

    def _compare(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """Norm of the first gradient, and its cosine with the last; 0-d each."""
        if self._first is None:
            return last.sqrt(), torch.zeros_like(last)
        first = kernels.sum_squares(self._first)
        product = torch.dot(self._first, self._gradient)
        lengths = (first * last).sqrt()
        return first.sqrt(), torch.where(lengths > 0, product / lengths, 0.0)


def health_figures(sums: Mapping[str, float], is_sharpness_aware: bool) -> dict[str, Any]:
    """Compute the figures of metrics.jsonl from the sums of one or more steps.

    gradient_norm, and gradient_cosine where steps have two passes, are means over steps;
    attack_success is the share of images classified wrongly after 0, 1, ... at most so many
    iterations of the attack, None without an attack.
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
    """Running sums, by name, that stay on the device until `take`.

    Their tensors never move, so CUDA graphs of a step may add to them. Sums are fp64 on every
    device: a few elements cost nothing, and counts and losses of a whole epoch stay exact where
    fp32 would drop the last digits.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def values(self) -> Tensor:
        """Copy the sums in order of their names, fp64 [n], on the device."""
        ordered = [self._sums[name].reshape(-1) for name in sorted(self._sums)]
        return torch.cat(ordered) if ordered else torch.zeros(0, dtype=torch.float64)

    def load(self, shapes: Mapping[str, tuple[int, ...]], values: Tensor) -> None:
        """Set the sums of these names and shapes to what `values` returned."""
        sizes = [math.prod(shapes[name]) for name in sorted(shapes)]
        for name, value in zip(sorted(shapes), torch.split(values, sizes), strict=True):
            self._sums[name] = value.reshape(shapes[name]).clone()

    def add(self, **values: Tensor) -> None:
        """Add each 0-d or 1-d tensor to the sum of its name, without waiting for the device."""
        for name, value in values.items():
            assert value.dim() <= 1, f"{name}: expected at most 1 dimension, got {value.dim()}"
            if name in self._sums:
                self._sums[name].add_(value.detach())
            else:
                self._sums[name] = value.detach().clone().double()

    def take(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the sums as floats, in one transfer to the host, and reset them to 0.

        Sums of a 1-d tensor are named name_0, name_1 and so on. reduce: maps the sums [n] of this
        rank to those of all ranks.
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
    """Numbers of steps skipped in a row: until now, and at most so far; 0-d float32 each."""

    def __init__(self, device: torch.device) -> None:
        self.in_a_row, self.longest = torch.zeros(2, device=device)

    def count(self, is_skipped: Tensor) -> None:
        """Count one more step, skipped where `is_skipped`, 0-d, is 1."""
        self.in_a_row.add_(1).mul_(is_skipped)
        torch.maximum(self.longest, self.in_a_row, out=self.longest)

    def most_in_a_row(self) -> int:
        """Return the largest number of steps skipped in a row; waits for the device."""
        return int(self.longest)

    def state(self) -> Tensor:
        """Copy both numbers, [2]."""
        return torch.stack([self.in_a_row, self.longest])

    def load(self, state: Tensor) -> None:
        """Set both numbers to what `state` returned."""
        self.in_a_row.copy_(state[0])
        self.longest.copy_(state[1])
