"""Shapes of a network's attention, and the choice of the kernel that computes it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.attention import Pinned, Shape, Wanted, pin_attention


def attention_shape(model: RobustModel, image_size: int) -> Shape | None:
    """Shape of the model's largest self-attention by torch, None without any.

    Runs the model once, on one image of zeros.
    """
    size = (1, model.mean.shape[1], image_size, image_size)
    with torch.no_grad(), _Watch() as watch:
        model(torch.zeros(size, device=model.mean.device))
    return max(watch.work, key=lambda shape: watch.work[shape], default=None)


def pin_for(model: RobustModel, image_size: int, batch_size: int, wanted: Wanted) -> Pinned | None:
    """Pin the kernel of the model's attention on its device; None if torch computes none."""
    shape = attention_shape(model, image_size)
    case = (batch_size, model.compute_dtype, model.mean.device)
    return None if shape is None else pin_attention(wanted, shape, *case)


class _Watch(TorchFunctionMode):
    """Sums the work of torch's self-attention by shape; cross-attention is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Counter[Shape] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            self._add(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _add(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any
    ) -> None:
        if query.shape == key.shape == value.shape and query.ndim == 4:
            windows, heads, tokens, width = query.shape
            shape = Shape(windows, heads, tokens, width, attn_mask is not None)
            self.work[shape] += query.numel() * tokens
