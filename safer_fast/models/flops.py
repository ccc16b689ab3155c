"""Floating-point operations of a step: those the method needs, and those the code computes.

Ideal, per step of a batch: K attack iterations of the whole network, each forward and gradient of
the images; the prefix once; and for each pass of SAM forward and backward of the suffix with the
weight gradients of the selected layers. Matrix multiplications count (2 m n k), all else is left
out, in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from safer_fast.config.schema import Config
from safer_fast.models.families import STEM
from safer_fast.models.layer_outputs import uncalled_layers, watching_layers
from safer_fast.models.robust_model import RobustModel

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
"""Edge of the matrices that `matmul_rate` multiplies."""


EXPECTED_STEPS = 3
"""Iterations of `attack.steps auto` in the estimate of a run's work."""


def estimate_run(model: RobustModel, config: Config, image_size: int, num_images: int) -> float:
    """Estimate the operations of a run of `num_images` images an epoch; backward as forward."""
    image = torch.zeros(1, model.mean.shape[1], image_size, image_size, device=model.mean.device)
    with model.without_savings():
        forward = sum(cost.forward for cost in costs(model, image).values())
    steps = config.attack.most_steps
    if config.attack.steps == "auto":
        steps = min(steps, EXPECTED_STEPS)
    passes = steps + (2 if config.sam.rho > 0 else 1)
    return config.epochs * num_images * passes * 2 * forward


@dataclass(frozen=True)
class Cost:
    """Forward operations in layers (with weights) and in attention (activations alone)."""

    layers: float
    attention: float

    @property
    def forward(self) -> float:
        """Operations of the forward pass."""
        return self.layers + self.attention

    @property
    def input_gradient(self) -> float:
        """Operations of the input's gradient: those of a layer once, of attention twice."""
        return self.layers + 2 * self.attention


def ideal_flops(
    model: RobustModel, images: Tensor, cut: int, layers: list[str], steps: int, passes: int
) -> dict[str, float]:
    """Operations that the method needs in each phase: attack, prefix, and all passes of SAM."""
    parts = costs(model, images)
    weights = layer_costs(model, images)
    whole = Cost(sum(p.layers for p in parts.values()), sum(p.attention for p in parts.values()))
    prefix = sum(cost.forward for block, cost in parts.items() if block < cut)
    suffix = sum(c.forward + c.input_gradient for block, c in parts.items() if block >= cut)
    selected = sum(weights[name] for name in layers)
    return {
        "attack": steps * (whole.forward + whole.input_gradient),
        "prefix": prefix,
        "sam": passes * (suffix + selected),
    }


def costs(model: RobustModel, images: Tensor) -> dict[int, Cost]:
    """Cost of the stem (STEM), of every block, and of norm and head (`num_blocks`)."""
    by_layer = layer_costs(model, images)
    found = {}
    with torch.no_grad():
        features = model.prefix(images, STEM)
        for block in range(STEM, model.num_blocks):
            total, features = count(lambda x=features, b=block: model.block(x, b))  # type: ignore[misc]
            found[block] = _split(model, block, total, by_layer)
        total, _ = count(lambda: model.suffix(features, model.num_blocks))
        found[model.num_blocks] = _split(model, model.num_blocks, total, by_layer)
    return found


def layer_costs(model: RobustModel, images: Tensor) -> dict[str, float]:
    """Forward operations of each layer: 2 x weights x positions."""
    network, found = model.network, dict.fromkeys(model.layers, 0.0)

    def record(name: str, output: Tensor) -> None:
        weight = network.get_submodule(name).get_parameter("weight")
        found[name] = 2.0 * weight.numel() * output.numel() / weight.shape[0]

    with torch.no_grad():
        uncalled = uncalled_layers(network, model.layers, lambda: model(images[:1]))
        with watching_layers(network, model.layers, record, uncalled):
            model(images)
    return found


def count(run: Callable[[], Any]) -> tuple[float, Any]:
    """Count the operations of `run`, with attention as plain products; return its result too."""
    with sdpa_kernel(SDPBackend.MATH), _Counter() as counter:  # type: ignore[no-untyped-call]
        result = run()
    return counter.total, result


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Time a large matrix product on the device; return its operations per second."""
    size = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    for _ in range(3):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums torch's own formulas; its FlopCounterMode fails on autograd.grad of a leaf."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if flops := flop_registry.get(func.overloadpacket):
            self.total += flops(*args, **(kwargs or {}), out_val=result)
        return result


def _split(model: RobustModel, block: int, total: float, by_layer: dict[str, float]) -> Cost:
    layers = sum(cost for name, cost in by_layer.items() if model.block_of(name) == block)
    return Cost(layers, total - layers)
