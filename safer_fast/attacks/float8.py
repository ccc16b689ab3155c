"""An attack that is less exact than amp, as the network is frozen there and only signs count.

Features go from block to block in bf16, and matrices may be multiplied in FP8.
Activations, output gradients and weights are scaled row by row, so that the largest of each row is
the largest number of the format. Nothing is kept from one call to the next, and a row is read once
by the kernel that makes it (a norm, GELU, attention): torch.compile joins both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from safer_fast.models.exact_savings import TokenBlock
from safer_fast.models.robust_model import RobustModel

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e4m3fn
"""Formats of activations and weights, and of output gradients. Rows have scales of their own, so
that the three bits of e4m3's mantissa are worth more than the range of e5m2."""
MULTIPLE = 16
"""Rows and columns of a matrix must be multiples of it for a GPU's FP8 product."""
PAYS_FROM = 2**21
"""Matrices of fewer elements stay as they are where nothing is timed: an estimate, as quantising
would cost what the product gains."""
LEAST_CAPABILITY = (8, 9)
LEAST_SCALE = 2.0**-120
"""Of rows so small that their quotients would overflow."""


def check_float8(device: torch.device) -> None:
    """Raise ValueError for a GPU that has no FP8 products: those before Ada and Hopper.

    The same holds where PyTorch has none with scales of rows, as for some GPUs newer than it.
    """
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        major, minor = capability
        raise ValueError(
            "--attack.precision: expected amp or bf16 on a GPU without FP8 (compute capability "
            f"8.9 or newer), got fp8 on {name} ({major}.{minor})"
        )
    try:
        values, scales = quantise(torch.ones(MULTIPLE, MULTIPLE, device=device), FORWARD)
        multiply(values, scales, values, scales, torch.ones_like(scales[:, 0]))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--attack.precision: expected amp or bf16 where PyTorch {torch.__version__} has no "
            f"FP8 product with a scale for each row, got fp8 on {name} ({reason})"
        ) from error


def fitting(model: RobustModel, least: int = 0) -> list[str]:
    """Names of the layers that FP8 is for: linear ones of the blocks with `least` elements or more.

    Edges are multiples of 16. A last block that computes class tokens alone has little to gain.
    """
    spared = {m for b in model.blocks if isinstance(b, TokenBlock) for m in b.inner.modules()}
    names = []
    for name in model.layers:
        module = model.network.get_submodule(name)
        in_block = 0 <= model.block_of(name) < model.num_blocks
        fits = type(module) is nn.Linear and all(n % MULTIPLE == 0 for n in module.weight.shape)
        if in_block and fits and module not in spared and module.weight.numel() >= least:
            names.append(name)
    return names


class Switch(Protocol):
    """The owner of a layer, which says whether the layer multiplies in FP8."""

    is_on: bool


class LowPrecision:
    """Features in bf16, FP8 copies of layers' matrices, and the switch that makes a model use them.

    names: of layers, all of them `fitting`; none: features alone. Copies of layers that training
    changes are made anew before each attack, the others after `move`.
    """

    def __init__(self, model: RobustModel, names: Sequence[str]) -> None:
        self.is_on = False
        self._model = model
        self.layers = {
            name: Float8Linear.adopt(cast(nn.Linear, model.network.get_submodule(name)), self)
            for name in names
        }
        self._moving: list[str] | None = []
        self._is_valid = False

    def move(self, names: Sequence[str] | None) -> None:
        """Name the layers that training changes from now on, None: all; copy all of them anew."""
        self._moving = None if names is None else [name for name in names if name in self.layers]
        self._is_valid = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the weights that may have changed since the last call."""
        moving: Iterable[str] = self.layers if self._moving is None else self._moving
        for name in moving if self._is_valid else self.layers:
            self.layers[name].quantise_weight()
        self._is_valid = True

    @contextmanager
    def used(self) -> Iterator[None]:
        """Make the network compute with the copies, on features in bf16, within a `with` block."""
        self.refresh()
        self.switch(True)
        try:
            yield
        finally:
            self.switch(False)

    def switch(self, is_on: bool) -> None:
        """Make the network compute with the copies as they are, or as in amp, from now on."""
        self.is_on = is_on
        self._model.feature_dtype = torch.bfloat16 if is_on else None


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in FP8 while its owner is on, and else as nn.Linear.

    In FP8 only the input gets a gradient.
    """

    owner: Any
    rows: Tensor  # weight as FP8 [out, in], one scale for each output
    row_scales: Tensor
    columns: Tensor  # its transpose as FP8 [in, out], one scale for each input
    column_scales: Tensor

    @classmethod
    def adopt(cls, linear: nn.Linear, owner: Switch) -> Float8Linear:
        """Turn a linear module into one of this class, in place; its parameters stay."""
        outputs, inputs = linear.weight.shape
        device = linear.weight.device
        linear.__class__ = cls
        assert isinstance(linear, Float8Linear)
        # no buffers: they are made of the weights, and part of no checkpoint
        linear.owner = owner
        linear.rows = torch.zeros(outputs, inputs, dtype=FORWARD, device=device)
        linear.row_scales = torch.ones(outputs, 1, device=device)
        linear.columns = torch.zeros(inputs, outputs, dtype=FORWARD, device=device)
        linear.column_scales = torch.ones(inputs, 1, device=device)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        if not self.owner.is_on:
            return functional.linear(x, self.weight, self.bias)
        product: Tensor = _Product.apply(
            x, self.rows, self.row_scales, self.columns, self.column_scales, self.bias
        )
        return product

    def quantise_weight(self) -> None:
        """Write the weight as it is now to the copies, which stay where they are."""
        for weight, values, scales in (
            (self.weight, self.rows, self.row_scales),
            (self.weight.t(), self.columns, self.column_scales),
        ):
            new_values, new_scales = quantise(weight, FORWARD)
            values.copy_(new_values)
            scales.copy_(new_scales)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [M, K] as FP8 [M, K] and scales, float32 [M, 1]: x is about values * scales.

    The largest of a row becomes the largest number of the format; rows of zeros stay zeros. A row
    with NaN or infinity becomes NaN throughout: nothing of it is hidden.
    """
    largest = torch.finfo(dtype).max
    x = x.float()
    scales = x.abs().amax(dim=-1, keepdim=True) / largest
    divisors = scales.clamp(min=LEAST_SCALE)  # clamp keeps NaN
    values = (x / divisors).clamp(-largest, largest)
    values = torch.where(torch.isfinite(scales), values, torch.nan)
    return values.to(dtype), divisors


def multiply(
    left: Tensor,
    left_scales: Tensor,
    right: Tensor,
    right_scales: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """(scaled left) (scaled right)^T + bias, rounded once: FP8 [M, K], [N, K] -> bfloat16 [M, N].

    Scales are [M, 1] and [N, 1], the bias [N]. On a GPU its FP8 units multiply and add up in fp32;
    elsewhere the same values are multiplied in fp32, so that what differs is the order of sums.
    """
    product = gpu_product if left.device.type == "cuda" else simulated_product
    if bias is not None:
        bias = bias.to(torch.bfloat16)
    return product(left, left_scales, right, right_scales, bias)


def gpu_product(
    left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """`multiply` on a GPU; a bias is bfloat16."""
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
    """`multiply` without a GPU; a bias is bfloat16."""
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
        rows: Tensor,
        row_scales: Tensor,
        columns: Tensor,
        column_scales: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(columns, column_scales)
        ctx.dtype = x.dtype
        flat = x.reshape(-1, x.shape[-1])
        product = multiply(*quantise(flat, FORWARD), rows, row_scales, bias)
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        columns, scales = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        product = multiply(*quantise(flat, BACKWARD), columns, scales)
        product = product.view(*gradient.shape[:-1], -1).to(ctx.dtype)
        return product, None, None, None, None, None
