"""Flags of gradients that an attack cannot use, and of random starts that fool on their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from safer_fast.attacks.correctness import is_right


def is_blind(gradient: Tensor) -> Tensor:
    """Images whose gradient [B, ...] is exactly zero or not finite everywhere; bool [B].

    One pass over the gradient. Nothing waits for the device.
    """
    inner = tuple(range(1, gradient.ndim))
    largest: Tensor = torch.linalg.vector_norm(
        gradient, torch.inf, dim=inner
    )  # [B], NaN where one is
    is_of_use = (largest > 0) & (largest < torch.inf)
    return is_of_use.logical_not()


class Watch:
    """Flags of `num_images` images under a gradient attack, bool [B] each, on the device.

    blind: whose gradient was zero or not finite at an iteration. Where all logits of a batch are
    the same, the network says nothing of the pixels, and no gradient is hidden: those do not count.
    starts_right: which are right where the attack starts. Both stay where they are, so that
    recordings may write to them.
    """

    def __init__(self, num_images: int, device: torch.device) -> None:
        self.blind: Tensor
        self.starts_right: Tensor
        self.blind, self.starts_right = torch.zeros(2, num_images, dtype=torch.bool, device=device)
        self._has_begun, self._is_flat = torch.zeros(2, dtype=torch.bool, device=device)

    def begin(self) -> None:
        """Clear all flags: an attack starts."""
        for flags in (self.blind, self.starts_right, self._has_begun):
            flags.zero_()

    def seeing(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        """The loss, whose evaluation notes which images start right and whether logits differ."""

        def noting(logits: Tensor, labels: Tensor) -> Tensor:
            known = logits.detach()
            started = torch.where(self._has_begun, self.starts_right, is_right(known, labels))
            self.starts_right.copy_(started)
            self._has_begun.fill_(True)
            if len(known) > 1:
                self._is_flat.copy_((known == known[:1]).all())
            return loss(logits, labels)

        return noting

    def note(self, gradient: Tensor) -> None:
        """Flag images whose gradient [B, ...] of the loss that was evaluated last is of no use."""
        self.blind.logical_or_(is_blind(gradient) & ~self._is_flat)

    def put(self, part: slice, other: Watch) -> None:
        """Copy the flags of `other` to the images of this part; it may have more at its end."""
        count = len(self.blind[part])
        self.blind[part] = other.blind[:count]
        self.starts_right[part] = other.starts_right[:count]
