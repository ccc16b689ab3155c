"""Low-rank factors trained in place of a layer's weights (LoRA, Hu et al., 2022; DoRA), by PEFT."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from safer_fast.models.arenas import ParameterArenas, TrainedWeights
from safer_fast.models.layer_outputs import uncalled_layers
from safer_fast.models.robust_model import RobustModel

INSTALL = "pip install peft"
_NAME = "default"  # of PEFT's adapter


class Adapters:
    """Factors A [rank, in] and B [out, rank] beside layers, which then compute (W + B A) x + b.

    While they are attached the network's modules of these names are PEFT's, around the layers,
    whose parameters keep their storage. B starts as zeros, A as random numbers, so the network's
    function is unchanged. The factors have two arenas of their own, in the dtypes of layers.

    Args:
        network: the module; its layers are linear or 2-d convolutions.
        layers: names of the layers, each with the names of its parameters, its weight first.
        rank: of the factors, at least 1; the scale of their product is 1.
        dtype: of the factors' compute copies.
        seed: of the random numbers in A.
        masters: arenas of the network, for DoRA: layers have magnitudes m [out] as well, and
            compute with m (W + B A) / ||W + B A||, and all is float32; None: LoRA.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Mapping[str, Sequence[str]],
        rank: int,
        dtype: torch.dtype,
        seed: int,
        masters: ParameterArenas | None = None,
    ) -> None:
        self._network = network
        self._weights = {name: names[0] for name, names in layers.items()}
        self._own = {name: network.get_submodule(name) for name in layers}
        device = next(network.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            self._around: dict[str, Any] = _inject(network, list(layers), rank)
        self._attached: dict[str, nn.Module] = dict(self._around)
        if masters is not None:
            dtype = torch.float32
            self._attached = {name: self._magnify(name, masters) for name in layers}
            self.attach()
        holder = _Holder({name: self._trained(name) for name in layers})
        self.arenas = ParameterArenas(holder, holder.layers(), dtype)

    def selection(self) -> TrainedWeights:
        """Select all factors; those of a layer are a group of its name."""
        chosen = self.arenas.select(None)
        names = dict(zip(self.arenas.layers, self._own, strict=True))
        groups = {names[key]: ranges for key, ranges in chosen.groups.items()}
        return replace(chosen, names=list(self._own), groups=groups)

    def state_dict(self) -> dict[str, Tensor]:
        """Copy the factors' masters, by name."""
        return self.arenas.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the factors' masters, and what the network reads, to what `state_dict` returned."""
        self.arenas.load_state_dict(state)

    @torch.no_grad()
    def merge_into(self, arenas: ParameterArenas, master: Tensor) -> None:
        """Merge the masters of all that is trained into weights laid out as `arenas.master`."""
        for key, (name, product) in zip(self.arenas.layers, self._products().items(), strict=True):
            weight, parts = arenas.view(self._weights[name], master), self.arenas.layers[key]
            if len(parts) == 2:
                weight.add_(product)
            else:
                magnitude = self.arenas.view(parts[2], self.arenas.master)
                weight.copy_(magnified(weight, product, magnitude))

    def detach(self) -> None:
        """Put the network's own modules back; the factors are kept."""
        for name, module in self._own.items():
            _put(self._network, name, module)

    def attach(self) -> None:
        """Put the modules with factors back."""
        for name, module in self._attached.items():
            _put(self._network, name, module)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Detach the factors within the context."""
        self.detach()
        try:
            yield
        finally:
            self.attach()

    def _factors(self, name: str) -> list[nn.Parameter]:
        around = self._around[name]
        return [around.lora_A[_NAME].weight, around.lora_B[_NAME].weight]

    def _trained(self, name: str) -> list[nn.Parameter]:
        """A and B, and the magnitudes if there are any."""
        layer = self._attached[name]
        own = [layer.magnitude] if isinstance(layer, DoraLayer) else []
        return [*self._factors(name), *own]

    def _magnify(self, name: str, arenas: ParameterArenas) -> DoraLayer:
        """Make DoRA's layer of PEFT's, whose factors it reads."""
        master = arenas.view(self._weights[name], arenas.master)
        return DoraLayer(self._around[name], _NAME, master)

    @torch.no_grad()
    def _products(self) -> dict[str, Tensor]:
        """Compute B A for each weight from the masters: float32, in the weight's shape."""
        products = {}
        for key, name in zip(self.arenas.layers, self._own, strict=True):
            factors, parts = self._factors(name), self.arenas.layers[key][:2]
            read = [factor.data for factor in factors]
            try:
                for factor, part in zip(factors, parts, strict=True):
                    factor.data = self.arenas.view(part, self.arenas.master)
                products[name] = self._around[name].get_delta_weight(_NAME)
            finally:
                for factor, data in zip(factors, read, strict=True):
                    factor.data = data
        return products


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


def check_adapters() -> None:
    """Raise ValueError if PEFT is not installed."""
    if find_spec("peft") is None:
        raise ValueError(
            f"--selection.lora_rank: expected the package peft, got none: {INSTALL}, or leave it 0"
        )


@torch.no_grad()
def check_called(model: RobustModel, layers: Sequence[str], image: Tensor) -> None:
    """Raise ValueError for layers whose weights the network reads without calling the modules."""
    if missed := uncalled_layers(model.network, layers, lambda: model(image)):
        raise ValueError(
            f"--selection.lora_rank: expected layers that are called as modules, got {missed[0]}, "
            "which this network reads another way"
        )


class _Holder(nn.Module):
    """Module that holds the factors as parameters, those of a layer in a submodule, for arenas."""

    def __init__(self, factors: Mapping[str, Sequence[nn.Parameter]]) -> None:
        super().__init__()
        for index, parameters in enumerate(factors.values()):
            module = nn.Module()
            for name, parameter in zip("ABm", parameters, strict=False):
                module.register_parameter(name, parameter)
            self.add_module(str(index), module)

    def layers(self) -> dict[str, tuple[str, ...]]:
        return {
            name: tuple(f"{name}.{own}" for own, _ in module.named_parameters())
            for name, module in self.named_children()
        }


def _inject(network: nn.Module, names: Sequence[str], rank: int) -> dict[str, Any]:
    """Put PEFT's modules around the layers, with factors in float32; return them."""
    with _without_our_kernels():
        from peft import LoraConfig, inject_adapter_in_model

    pattern = "|".join(re.escape(name) for name in names)  # PEFT matches a list against suffixes
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern)
    inject_adapter_in_model(config, network, adapter_name=_NAME)
    del network.peft_config  # PEFT refuses a second injection of the same adapter
    around: dict[str, Any] = {name: network.get_submodule(name) for name in names}
    for module in around.values():
        module.eval()
        for factors in (module.lora_A, module.lora_B):
            factors[_NAME].float()
    return around


@contextmanager
def _without_our_kernels() -> Iterator[None]:
    """Hide our folder `kernels`, which transformers would take for the published package."""
    found = None if "kernels" in sys.modules else find_spec("kernels")
    origin = None if found is None else found.origin
    is_ours = origin is not None and Path(origin).with_name("_library.py").is_file()
    if not is_ours:
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]  # import raises ImportError
    try:
        yield
    finally:
        del sys.modules["kernels"]


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent) if parent else network, child, module)
