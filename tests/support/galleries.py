"""Galleries of random images."""

from __future__ import annotations

import torch

from safer_fast.runs.gallery import (
    Gallery,
)


def new_gallery(count: int = 3, channels: int = 3, side: int = 6) -> Gallery:
    """Images between 0.25 and 0.75, of which the attack moved image k by up to 0.1 (k + 1)."""
    generator = torch.Generator().manual_seed(count)
    images = 0.25 + 0.5 * torch.rand(count, channels, side, side, generator=generator)
    steps = 0.1 * torch.arange(1, count + 1).view(-1, 1, 1, 1)
    moves = torch.rand(images.shape, generator=generator) * 2 - 1
    moves[:, 0, 0, 0] = 1
    classes = torch.arange(count) % 3
    return Gallery(
        images=images,
        adversarial=(images + steps.clamp(max=0.2) * moves).clamp(0, 1),
        labels=classes,
        predicted_before=classes,
        predicted_after=(classes + torch.arange(count) % 2) % 3,
        confidence_before=torch.linspace(0.5, 1, count),
        confidence_after=torch.linspace(0.4, 0.6, count),
    )
