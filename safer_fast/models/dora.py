"""Layers whose weight has a trained magnitude and low-rank factors (DoRA, Liu et al., 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class DoraLayer(nn.Module):
    """A layer that computes with m (W + B A) / ||W + B A|| in place of its weight W, row by row.

    The magnitudes m, one for each output, start as the norms of W's rows: the layer's function is
    unchanged. The weight is computed in float32 and then rounded as the layer's own weight is, so
    that training sees the very weight that is merged in the end.

    Args:
        factors: PEFT's module around the layer (linear or a 2-d convolution), which holds A and B.
        name: of PEFT's adapter.
        master: W in float32, in its shape; it is read anew in each call.
    """

    def __init__(self, factors: Any, name: str, master: Tensor) -> None:
        super().__init__()
        self.factors, self._name, self._master = factors, name, master
        self.magnitude = nn.Parameter(row_norms(master))

    @property
    def weight(self) -> nn.Parameter:
        """Weight of the layer inside, under the name that it has in layers without factors."""
        weight: nn.Parameter = self.factors.base_layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        own = self.factors.base_layer
        with torch.autocast(self._master.device.type, enabled=False):
            product = self.factors.get_delta_weight(self._name)
            weight = magnified(self._master, product, self.magnitude).to(own.weight.dtype)
        if isinstance(own, nn.Linear):
            return functional.linear(x, weight, own.bias)
        output: Tensor = own._conv_forward(x, weight, own.bias)
        return output


def magnified(weight: Tensor, product: Tensor, magnitude: Tensor) -> Tensor:
    """Compute m (W + B A) / ||W + B A||, row by row (the paper's equation 5).

    Norms are constants in the gradient (section 4.3 of the paper). Rows of zeros in W have no
    direction to keep, and become those of W + B A.
    """
    moved = weight + product
    with torch.no_grad():
        norms = row_norms(moved).clamp(min=torch.finfo(moved.dtype).tiny)
        is_zero = row_norms(weight) == 0
    scale = torch.where(is_zero, 1.0, magnitude / norms)
    return moved * scale.view(-1, *[1] * (weight.ndim - 1))


def row_norms(weight: Tensor) -> Tensor:
    """Compute the norm of the weights of each output: [K, ...] -> [K]."""
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms
