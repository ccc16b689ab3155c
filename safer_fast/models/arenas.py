"""Parameters in two arenas: fp32 masters, and compute copies that the network reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from safer_fast import kernels

ALIGNMENT = 64
"""Elements that every parameter's slot is a multiple of: 16-byte accesses in every dtype."""


@dataclass(frozen=True)
class Range:
    """A contiguous range of selected weights: compute copy, master and gradient, flat [n] each."""

    compute: Tensor
    master: Tensor
    gradient: Tensor
    is_decayed: bool = True
    shape: tuple[int, ...] = ()
    """Shape of the parameter it holds; empty where neighbours are merged."""


@dataclass(frozen=True)
class ParameterSlot:
    """Location of a parameter: dtype of its compute arena, and offsets there and in the masters."""

    dtype: torch.dtype
    compute_offset: int
    master_offset: int
    shape: torch.Size
    is_decayed: bool

    @property
    def num_elements(self) -> int:
        """Number of elements, without padding."""
        return self.shape.numel()

    @property
    def end(self) -> int:
        """First aligned master offset behind the parameter."""
        return _aligned(self.master_offset + self.num_elements)


@dataclass
class TrainedWeights:
    """Selected parameters, a gradient view for each, and the ranges that hold them.

    `groups` has the ranges of each layer, one for each parameter; parameters of no layer are groups
    of their own. `ranges` are the same weights with neighbours merged, for the fewest launches.
    `flat` [n + 1] holds all gradients and `extra`, so that ranks sum both in one all-reduce.
    `unread` are the parameters that the last differentiated loss did not depend on.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    gradient_views: list[Tensor]
    ranges: list[Range]
    groups: dict[str, list[Range]]
    flat: Tensor
    unread: list[nn.Parameter] = field(default_factory=list)

    @property
    def extra(self) -> Tensor:
        """One number, 0-d, that is summed over ranks with the gradients."""
        return self.flat[-1]

    def gradients_of(self, loss: Tensor) -> list[Tensor]:
        """Differentiate a loss: a gradient for each of `parameters`, zeros for the unread.

        Raises ValueError if the loss depends on none of them.
        """
        if not loss.requires_grad:
            raise ValueError(
                f"{', '.join(self.names[:3])}: expected a layer that the network's forward pass "
                "reads, got one that it never does: no training would change its output"
            )
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = list(zip(self.parameters, found, strict=True))
        self.unread = [parameter for parameter, gradient in pairs if gradient is None]
        return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs]

    def store_gradients(self, gradients: Sequence[Tensor], adds: bool = False) -> None:
        """Store gradients, one for each of `parameters`, in the ranges; with `adds` add them."""
        (torch._foreach_add_ if adds else torch._foreach_copy_)(
            self.gradient_views, list(gradients)
        )


class ParameterArenas:
    """Moves every parameter of a module into two arenas, whose storage never moves again.

    `master` is one flat float32 tensor; `compute[dtype]` are flat tensors whose slices are the
    module's parameters. Parameters of `layers` (weights first, then biases) are stored in
    `layer_dtype`, all others in float32, on the module's device. No parameter requires gradients
    any more; a step turns them on for its selection. Raises ValueError for parameters that are not
    float32.
    """

    def __init__(
        self, module: nn.Module, layers: Mapping[str, Sequence[str]], layer_dtype: torch.dtype
    ) -> None:
        self.layer_dtype = layer_dtype
        self.parameters = dict(module.named_parameters())
        self.layers = {name: tuple(names) for name, names in layers.items()}
        device = next(iter(self.parameters.values())).device
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise ValueError(f"parameter {name}: expected float32, got {parameter.dtype}")
        self.places = _places(self.parameters, self.layers, layer_dtype)
        sizes = _sizes(self.places)
        self.master = torch.zeros(sum(sizes.values()), device=device)
        self.compute = {
            dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()
        }
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            self.view(name, self.master).copy_(parameter)
            parameter.data = self._compute_view(name)
        self.load_compute()

    def view(self, name: str, source: Tensor) -> Tensor:
        """View a parameter's values, in its shape; `source` is flat and laid out as `master`."""
        place = self.places[name]
        return source.narrow(0, place.master_offset, place.num_elements).view(place.shape)

    def load_compute(self, source: Tensor | None = None) -> None:
        """Set what the network reads to cast(source): the masters, or weights laid out alike."""
        source = self.master if source is None else source
        offset = 0
        for arena in self.compute.values():
            kernels.restore_(arena, source.narrow(0, offset, arena.numel()))
            offset += arena.numel()

    def state_dict(
        self, source: Tensor | None = None, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Copy parameters by name (default: all), float32, from the masters or from `source`."""
        source = self.master if source is None else source
        chosen = self.places if names is None else names
        return {name: self.view(name, source).detach().clone() for name in chosen}

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Set the masters, and what the network reads, to these weights of all parameters."""
        self.master.copy_(self.vector_of(weights))
        self.load_compute()

    def vector_of(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Copy the weights of a state dict into a flat tensor laid out as `master`."""
        vector = torch.zeros_like(self.master)
        for name in self.places:
            self.view(name, vector).copy_(weights[name])
        return vector

    def select(self, names: Iterable[str] | None = None) -> TrainedWeights:
        """Select the parameters of these layers (None: every parameter), with zero gradients."""
        owners = {parameter: layer for layer, own in self.layers.items() for parameter in own}
        chosen = list(self.layers) if names is None else list(names)
        wanted = set(self.places) if names is None else set()
        for layer in chosen:
            wanted.update(self.layers[layer])
        ordered = [name for name in self.places if name in wanted]
        num_elements = sum(_aligned(self.places[name].num_elements) for name in ordered)
        gradient = torch.zeros(num_elements + 1, device=self.master.device)
        groups: dict[str, list[Range]] = {}
        views, merged, offset = [], _Merged(self, gradient), 0
        for name in ordered:
            place = self.places[name]
            groups.setdefault(owners.get(name, name), []).append(
                self._range(place, gradient, offset)
            )
            views.append(gradient.narrow(0, offset, place.num_elements).view(place.shape))
            merged.add(place, offset)
            offset += _aligned(place.num_elements)
        return TrainedWeights(
            names=chosen,
            parameters=[self.parameters[name] for name in ordered],
            gradient_views=views,
            ranges=merged.ranges(),
            groups=groups,
            flat=gradient,
        )

    def _range(
        self, place: ParameterSlot, gradient: Tensor, offset: int, size: int | None = None
    ) -> Range:
        shape = place.shape if size is None else ()
        size = _aligned(place.num_elements) if size is None else size
        return Range(
            compute=self.compute[place.dtype].narrow(0, place.compute_offset, size),
            master=self.master.narrow(0, place.master_offset, size),
            gradient=gradient.narrow(0, offset, size),
            is_decayed=place.is_decayed,
            shape=shape,
        )

    def _compute_view(self, name: str) -> Tensor:
        place = self.places[name]
        arena = self.compute[place.dtype]
        return arena.narrow(0, place.compute_offset, place.num_elements).view(place.shape)


class _Merged:
    """Collects slots in order, and merges those that are adjacent in the arenas."""

    def __init__(self, arenas: ParameterArenas, gradient: Tensor) -> None:
        self.arenas, self.gradient = arenas, gradient
        self.runs: list[tuple[ParameterSlot, int, int]] = []

    def add(self, place: ParameterSlot, offset: int) -> None:
        if self.runs:
            first, start, end = self.runs[-1]
            alike = (first.dtype, first.is_decayed) == (place.dtype, place.is_decayed)
            if alike and end == place.master_offset:
                self.runs[-1] = (first, start, place.end)
                return
        self.runs.append((place, offset, place.end))

    def ranges(self) -> list[Range]:
        return [
            self.arenas._range(first, self.gradient, start, end - first.master_offset)
            for first, start, end in self.runs
        ]


def module_selection(layers: Mapping[str, Sequence[nn.Parameter]]) -> TrainedWeights:
    """Select parameters that are in no arenas; their current values are copied as masters.

    The parameters keep their storage and dtype, and perturbations are written to them.
    """
    parameters = [parameter for own in layers.values() for parameter in own]
    sizes = [parameter.numel() for parameter in parameters]
    example = parameters[0]
    flat = torch.zeros(sum(sizes) + 1, dtype=example.dtype, device=example.device)
    gradients = iter(torch.split(flat[:-1], sizes))
    groups = {
        name: [
            Range(
                compute=parameter.data,
                master=parameter.detach().clone(),
                gradient=next(gradients).view(parameter.shape),
            )
            for parameter in own
        ]
        for name, own in layers.items()
    }
    ranges = [part for parts in groups.values() for part in parts]
    return TrainedWeights(
        names=list(groups),
        parameters=parameters,
        gradient_views=[part.gradient for part in ranges],
        ranges=ranges,
        groups=groups,
        flat=flat,
    )


def _places(
    parameters: Mapping[str, nn.Parameter],
    layers: Mapping[str, Sequence[str]],
    layer_dtype: torch.dtype,
) -> dict[str, ParameterSlot]:
    """Slots of parameters: matrices of layers, their biases, all others, as they are defined."""
    of_layers = {
        name for names in layers.values() for name in names if _is_layers_own(name, layers)
    }
    matrices = [name for name in parameters if name in of_layers and parameters[name].ndim > 1]
    biases = [name for name in parameters if name in of_layers and parameters[name].ndim <= 1]
    others = [name for name in parameters if name not in of_layers]
    places: dict[str, ParameterSlot] = {}
    master_offset = 0
    offsets = {layer_dtype: 0, torch.float32: 0}
    for names, dtype, is_decayed in (
        (matrices, layer_dtype, True),
        (biases, layer_dtype, False),
        (others, torch.float32, False),
    ):
        for name in names:
            shape = parameters[name].shape
            places[name] = ParameterSlot(dtype, offsets[dtype], master_offset, shape, is_decayed)
            offsets[dtype] += _aligned(shape.numel())
            master_offset += _aligned(shape.numel())
    return places


def _is_layers_own(name: str, layers: Mapping[str, Sequence[str]]) -> bool:
    """Return true for a parameter of the layer's module itself, not of a norm grouped with it."""
    return name.rpartition(".")[0] in layers


def _sizes(places: Mapping[str, ParameterSlot]) -> dict[torch.dtype, int]:
    sizes: dict[torch.dtype, int] = {}
    for place in places.values():
        sizes[place.dtype] = sizes.get(place.dtype, 0) + _aligned(place.num_elements)
    return sizes


def _aligned(num_elements: int) -> int:
    return -(-num_elements // ALIGNMENT) * ALIGNMENT


@contextmanager
def requiring_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Make these parameters require gradients within the context."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
