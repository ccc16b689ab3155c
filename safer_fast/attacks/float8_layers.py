"""Layers of a frozen network that multiply in FP8, and their products.

Activations, output gradients and weights are scaled row by row, so that the largest of each row is
the largest number of the format. Nothing is kept from one call to the next, and a row is read once
by the kernel that makes it: torch.compile joins quantising to a norm or a sum, an op of our own to
GELU and to its gradient.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from safer_fast.kernels import quantise_gelu, quantise_gelu_backward
from safer_fast.kernels.float8 import FORMAT, quantise

FORWARD, BACKWARD = FORMAT, FORMAT
"""Formats of activations and weights, and of output gradients. Rows have scales of their own, so
that the three bits of e4m3's mantissa are worth more than the range of e5m2."""

Form = Literal["rows", "rescaled"]
"""Place of the scales in a product: in the product itself, or in a pass over what it returns. A
library's kernel for scales of rows may be slower than the one for none."""
MLP = "timm.layers.mlp.Mlp"
"""Class of MLPs whose GELU is joined to quantising, by its full name."""


class Switch(Protocol):
    """The owner of a layer, which says whether the layer multiplies in FP8."""

    is_on: bool


class Matrix(NamedTuple):
    """A quantised weight: rows [out, in], columns [in, out], a scale for each row of both."""

    rows: Tensor
    row_scales: Tensor
    columns: Tensor
    column_scales: Tensor
    bias: Tensor | None


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in FP8 while its owner is on, and else as nn.Linear.

    In FP8 only the input gets a gradient.
    """

    owner: Any
    form: Form
    rows: Tensor  # weight as FP8 [out, in], one scale for each output
    row_scales: Tensor
    columns: Tensor  # its transpose as FP8 [in, out], one scale for each input
    column_scales: Tensor

    @classmethod
    def adopt(cls, linear: nn.Linear, owner: Switch, form: Form = "rows") -> Float8Linear:
        """Turn a linear module into one of this class, in place; its parameters stay."""
        outputs, inputs = linear.weight.shape
        device = linear.weight.device
        linear.__class__ = cls
        assert isinstance(linear, Float8Linear)
        # no buffers: they are made of the weights, and part of no checkpoint
        linear.owner, linear.form = owner, form
        linear.rows = torch.zeros(outputs, inputs, dtype=FORWARD, device=device)
        linear.row_scales = torch.ones(outputs, 1, device=device)
        linear.columns = torch.zeros(inputs, outputs, dtype=FORWARD, device=device)
        linear.column_scales = torch.ones(inputs, 1, device=device)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        if not self.owner.is_on:
            return functional.linear(x, self.weight, self.bias)
        product: Tensor = _Product.apply(x, self.form, *self.matrix())
        return product

    def matrix(self) -> Matrix:
        """The copies as they are, and the bias."""
        return Matrix(self.rows, self.row_scales, self.columns, self.column_scales, self.bias)

    def quantise_weight(self) -> None:
        """Write the weight as it is now to the copies, which stay where they are."""
        for weight, values, scales in (
            (self.weight, self.rows, self.row_scales),
            (self.weight.t(), self.columns, self.column_scales),
        ):
            new_values, new_scales = quantise(weight, FORWARD)
            values.copy_(new_values)
            scales.copy_(new_scales)


class Float8Mlp(nn.Module):
    """A timm MLP that quantises as GELU, and its gradient, leave the registers.

    It does so while both of its layers multiply in FP8, and computes as its own class otherwise.
    """

    fc1: Any
    fc2: Any

    @staticmethod
    def adopt(mlp: nn.Module) -> None:
        """Make the MLP one of this class too, in place, if GELU stands between its layers alone."""
        act = getattr(mlp, "act", None)
        is_gelu = type(act) is nn.GELU and act.approximate == "none"
        kind: Any = type(mlp)
        is_plain = f"{kind.__module__}.{kind.__qualname__}" == MLP
        if is_plain and is_gelu and isinstance(mlp.norm, nn.Identity) and BACKWARD == FORMAT:
            mlp.__class__ = _joined_with(kind)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1, self.fc2
        both = isinstance(first, Float8Linear) and isinstance(second, Float8Linear)
        if both and first.owner.is_on and not self.training:
            forms = (first.form, second.form)
            product: Tensor = _GeluProducts.apply(x, forms, *first.matrix(), *second.matrix())
            return product
        plain: Tensor = super().forward(x)
        return plain


@functools.cache
def _joined_with(kind: type[Any]) -> type[Any]:
    """A class of MLPs that is Float8Mlp first."""
    return type(f"Float8{kind.__name__}", (Float8Mlp, kind), {})


def multiply(
    left: Tensor,
    left_scales: Tensor,
    right: Tensor,
    right_scales: Tensor,
    bias: Tensor | None = None,
    form: Form = "rows",
) -> Tensor:
    """(scaled left) (scaled right)^T + bias: FP8 [M, K], [N, K] -> bfloat16 [M, N].

    Scales are [M, 1] and [N, 1], the bias [N]. On a GPU its FP8 units multiply and add up in fp32;
    elsewhere the same values are multiplied in fp32, so that what differs is the order of sums.
    "rows" rounds once, "rescaled" before the scales, too.
    """
    product = gpu_product if left.device.type == "cuda" else simulated_product
    if bias is not None:
        bias = bias.to(torch.bfloat16)
    if form == "rows":
        return product(left, left_scales, right, right_scales, bias)
    one = left_scales.new_ones(())
    unscaled = product(left, one, right, one, None).float() * left_scales * right_scales.t()
    if bias is not None:
        unscaled = unscaled + bias.float()
    return unscaled.to(torch.bfloat16)


def gpu_product(
    left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """`multiply` on a GPU, also with a 0-d scale for each whole matrix; a bias is bfloat16."""
    return torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scales,
        scale_b=right_scales.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def simulated_product(
    left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """`multiply` without a GPU, also with a 0-d scale for each matrix; a bias is bfloat16."""
    with torch.autocast(left.device.type, enabled=False):
        product = (left.float() @ right.float().t()) * left_scales * right_scales.t()
        if bias is not None:
            product = product + bias.float()
    return product.to(torch.bfloat16)


class _Product(torch.autograd.Function):
    """x [..., K] -> x W^T + bias [..., N]; nothing of x is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        form: Form,
        rows: Tensor,
        row_scales: Tensor,
        columns: Tensor,
        column_scales: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(columns, column_scales)
        ctx.dtype, ctx.form = x.dtype, form
        flat = x.reshape(-1, x.shape[-1])
        product = multiply(*quantise(flat, FORWARD), rows, row_scales, bias, form)
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, scales = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        product = multiply(*quantise(flat, BACKWARD), columns, scales, form=ctx.form)
        product = product.view(*gradient.shape[:-1], -1).to(ctx.dtype)
        return (product, *[None] * 6)


class _GeluProducts(torch.autograd.Function):
    """x [..., K] -> gelu(x V^T + c) W^T + b [..., N]; kept is what enters GELU, in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forms: tuple[Form, Form], *matrices: Tensor) -> Tensor:
        first, second = Matrix(*matrices[:5]), Matrix(*matrices[5:])
        flat = x.reshape(-1, x.shape[-1])
        hidden = multiply(
            *quantise(flat, FORWARD), first.rows, first.row_scales, first.bias, forms[0]
        )
        ctx.save_for_backward(
            hidden, first.columns, first.column_scales, second.columns, second.column_scales
        )
        ctx.dtype, ctx.forms = x.dtype, forms
        product = multiply(
            *quantise_gelu(hidden), second.rows, second.row_scales, second.bias, forms[1]
        )
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, columns, column_scales, outer, outer_scales = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        slope = multiply(*quantise(flat, BACKWARD), outer, outer_scales, form=ctx.forms[1])
        rows = quantise_gelu_backward(slope, hidden)
        product = multiply(*rows, columns, column_scales, form=ctx.forms[0])
        product = product.view(*gradient.shape[:-1], -1).to(ctx.dtype)
        return (product, *[None] * 11)
