"""Outputs of layers as a network runs, of those too that it does not call as modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Keep = Callable[[str, Tensor], None]
"""Is given the name of a layer and its output."""


@contextmanager
def watching_layers(
    network: nn.Module, names: Iterable[str], keep: Keep, uncalled: Collection[str] = ()
) -> Iterator[None]:
    """Call `keep` whenever one of these layers computes.

    uncalled: those among linear layers that the network does not call: it multiplies by their
    weights itself, as the attention of EVA-02 and BEiT does.
    """
    weights = {id(network.get_submodule(name).weight): name for name in uncalled}

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: keep(name, output)

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        with _Products(weights, keep) if uncalled else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def uncalled_layers(
    network: nn.Module, names: Iterable[str], run: Callable[[], object]
) -> list[str]:
    """Names of the layers that the network does not call as modules in `run`."""
    chosen, called = list(names), set[str]()
    with watching_layers(network, chosen, lambda name, _: called.add(name)):
        run()
    return [name for name in chosen if name not in called]


class _Products(TorchFunctionMode):
    """Calls `keep` for each linear map by one of these weights; names: of layers, by id(weight)."""

    def __init__(self, names: Mapping[int, str], keep: Keep) -> None:
        super().__init__()
        self.names, self.keep = names, keep

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            if name := self.names.get(id(weight)):
                self.keep(name, output)
        return output
