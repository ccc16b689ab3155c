"""Choice of the matrices that gain from FP8; each shape is timed once on a machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safer_fast.attacks.float8 import Float8Linear, fitting
from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.device import allow_recompiling
from safer_fast.runtime.timing_cache import cache_file, machine, milliseconds, remember, remembered

MARGIN = 1.05
"""Smallest speedup for which FP8 is used: below it, noise of the clock would decide the bits."""
MOST_ROWS = 2**16
"""More are not timed: they only take longer."""
SECONDS = 0.2
WARM_UP = 3


class Product(NamedTuple):
    """x [rows, inputs] times a matrix [outputs, inputs]."""

    rows: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Float8Layers:
    """Layers whose products are in FP8, and how many times as fast each shape was measured to be.

    speeds: by "outputs x inputs", those too that are not worth it; empty where nothing was timed.
    """

    names: Sequence[str]
    speeds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """A few words for the banner."""
        if not self.names:
            return "attack in bf16"
        return f"attack in FP8 ({len(self.names)} matrices{self._timed(', ')})"

    def why_none(self) -> str:
        """Reason why no layer was chosen."""
        timed = self._timed("")
        return f"no matrix of a block is faster: {timed}" if timed else "no matrix is so large"

    def _timed(self, before: str) -> str:
        shapes = ", ".join(f"{shape} {speed:.2f}" for shape, speed in self.speeds.items())
        return shapes and before + shapes


def choose_measured(
    model: RobustModel,
    image_size: int,
    batch_size: int,
    is_compiled: bool,
    cache: Path | None = None,
) -> Float8Layers:
    """Layers that FP8 makes faster for a batch of such images on this device.

    A shape is timed once on a machine and remembered in `cache` (default: float8.json in the user's
    cache folder).
    """
    products = _products(model, fitting(model), image_size, batch_size)
    file, device = cache or cache_file("float8.json"), model.mean.device
    speeds: dict[Product, float] = {}
    for product in sorted(set(products.values())):
        key = f"{machine(device)} {' '.join(map(str, product))} {is_compiled}"
        known = remembered(file, float).get(key)
        if known is None:
            known = remember(file, key, measure(product, device, is_compiled), float)
        speeds[product] = known
    names = [name for name, product in products.items() if speeds[product] >= MARGIN]
    return Float8Layers(names, {f"{p.outputs} x {p.inputs}": speed for p, speed in speeds.items()})


def measure(product: Product, device: torch.device, is_compiled: bool) -> float:
    """Time in bf16 over time in FP8, the least of several in turn: the rest is noise."""
    runs = [product_run(product, device, is_float8, is_compiled) for is_float8 in (False, True)]
    for _ in range(WARM_UP):
        for run in runs:
            run()
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    while not times[0] or time.perf_counter() - started < SECONDS:
        for run, values in zip(runs, times, strict=True):
            values.append(milliseconds(run, device))
    in_bfloat16, in_float8 = map(min, times)
    return round(in_bfloat16 / in_float8, 3)


def product_run(
    product: Product, device: torch.device, is_float8: bool, is_compiled: bool
) -> Callable[[], None]:
    """Norm, product, and the gradient of the norm's input, as in an attack on a frozen network."""
    generator = torch.Generator(device).manual_seed(0)
    size = (product.rows, product.inputs)
    x = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
    norm = nn.LayerNorm(product.inputs, device=device)
    sizes = (product.inputs, product.outputs)
    # a run that finds its times remembered draws the same numbers as one that takes them
    linear = nn.Linear(*sizes, device="meta", dtype=torch.bfloat16).to_empty(device=device)
    for parameter in (*norm.parameters(), *linear.parameters()):
        parameter.requires_grad_(False)
    linear.weight.normal_(std=product.inputs**-0.5, generator=generator)
    linear.bias.zero_()
    layer = Float8Linear.adopt(linear, _Always(is_float8))
    layer.quantise_weight()
    slope = torch.randn(
        product.rows, product.outputs, generator=generator, device=device, dtype=torch.bfloat16
    )

    def forward(values: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            result: Tensor = layer(norm(values))
        return result

    if is_compiled:
        allow_recompiling()
        forward = torch.compile(forward, dynamic=False)

    def run() -> None:
        values = x.detach().requires_grad_()
        torch.autograd.grad(forward(values), values, slope)

    return run


@dataclass
class _Always:
    """The switch of a layer that is always or never in FP8."""

    is_on: bool


def _products(
    model: RobustModel, names: Collection[str], image_size: int, batch_size: int
) -> dict[str, Product]:
    """Shapes of the layers' products for a batch. The model runs once, on one image of zeros."""
    products: dict[str, Product] = {}

    def note(name: str, linear: nn.Linear) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
            rows = min(batch_size * inputs[0].numel() // linear.in_features, MOST_ROWS)
            products[name] = Product(rows, linear.in_features, linear.out_features)

        return hook

    layers = {name: model.network.get_submodule(name) for name in names}
    handles = [m.register_forward_hook(note(n, m)) for n, m in layers.items()]
    size = (1, model.mean.shape[1], image_size, image_size)
    try:
        with torch.no_grad():
            model(torch.zeros(size, device=model.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return products
