"""Choice of the matrices that gain from FP8; each shape is timed once on a machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from safer_fast.attacks.float8 import fitting
from safer_fast.attacks.float8_layers import Float8Linear, Form
from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.device import allow_recompiling
from safer_fast.runtime.timing_cache import cache_file, machine, milliseconds, remember, remembered

MARGIN = 1.05
"""Smallest speedup for which FP8 is used: below it, noise of the clock would decide the bits."""
MOST_ROWS = 2**16
"""More are not timed: they only take longer."""
SECONDS = 0.2
WARM_UP = 3
FORMS: tuple[Form, ...] = get_args(Form)
"""Forms of a product in order of preference: a later one must be faster by `MARGIN`."""


class Product(NamedTuple):
    """x [rows, inputs] times a matrix [outputs, inputs]."""

    rows: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Float8Layers:
    """Layers whose products are in FP8, and how many times as fast each shape was measured to be.

    rescaled: names of those whose products are scaled in a pass of their own. speeds: of the chosen
    form, by "outputs x inputs", those too that are not worth it; empty where nothing was timed.
    """

    names: Sequence[str]
    rescaled: Sequence[str] = ()
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

    A shape is timed once on a machine, with both forms of its product, and remembered in `cache`
    (default: float8.json in the user's cache folder).
    """
    products = _products(model, fitting(model), image_size, batch_size)
    file, device = cache or cache_file("float8.json"), model.mean.device
    chosen: dict[Product, tuple[Form, float]] = {}
    for product in sorted(set(products.values())):
        key = f"{machine(device)} {' '.join(map(str, product))} {is_compiled}, {', '.join(FORMS)}"
        known = remembered(file, _speeds).get(key)
        if known is None:
            known = remember(file, key, measure(product, device, is_compiled), _speeds)
        chosen[product] = best_form(known)
    names = [name for name, product in products.items() if chosen[product][1] >= MARGIN]
    rescaled = [name for name in names if chosen[products[name]][0] == "rescaled"]
    speeds = {
        f"{product.outputs} x {product.inputs}{' rescaled' if form == 'rescaled' else ''}": speed
        for product, (form, speed) in chosen.items()
    }
    return Float8Layers(names, rescaled, speeds)


def best_form(speeds: Mapping[Form, float]) -> tuple[Form, float]:
    """The form that is used, and its speed: a later one of `FORMS` must be faster by `MARGIN`."""
    best = FORMS[0]
    for form in FORMS[1:]:
        if speeds[form] >= MARGIN * speeds[best]:
            best = form
    return best, speeds[best]


def _speeds(stored: Any) -> dict[Form, float]:
    """Convert a JSON value; raises ValueError, TypeError or AttributeError."""
    if set(stored) != set(FORMS):
        raise ValueError(f"expected {FORMS}, got {stored}")
    return {form: float(stored[form]) for form in FORMS}


def measure(product: Product, device: torch.device, is_compiled: bool) -> dict[Form, float]:
    """Time in bf16 over time in FP8, by form; each is the least of several: the rest is noise."""
    ways: tuple[Form | None, ...] = (None, *FORMS)
    runs = [product_run(product, device, form, is_compiled) for form in ways]
    for _ in range(WARM_UP):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    while not times[0] or time.perf_counter() - started < SECONDS:
        for run, values in zip(runs, times, strict=True):
            values.append(milliseconds(run, device))
    in_bfloat16, *in_float8 = map(min, times)
    return {form: round(in_bfloat16 / ms, 3) for form, ms in zip(FORMS, in_float8, strict=True)}


def product_run(
    product: Product, device: torch.device, form: Form | None, is_compiled: bool
) -> Callable[[], None]:
    """Norm, product, and the gradient of the norm's input, as in an attack on a frozen network.

    form: of the product in FP8; None: in bf16.
    """
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
    layer = Float8Linear.adopt(linear, _Always(form is not None), form or "rows")
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
