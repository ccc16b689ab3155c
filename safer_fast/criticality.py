"""Criticality of layers: how much more each changes under attack than the layer below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from safer_fast.distributed import Ranks
from safer_fast.network import RobustModel, find_layers

Keep = Callable[[str, Tensor], None]


@torch.no_grad()
def criticality(
    model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], ranks: Ranks
) -> dict[str, float]:
    """W(F_l) / W(F_l-1) of each layer, W(F) the mean over images of ||F(x + d) - F(x)|| / dim.

    The measure of CLAT (Gopal et al., 2024). The layer below is the one that runs before; the first
    layer is compared with the image. pairs: clean and attacked images [B, C, H, W]; B may be 0.
    """
    changes = _feature_changes(model, [_pair_of(*pair) for pair in pairs])
    order = list(changes)
    sums = ranks.sum_(torch.stack(list(changes.values())))
    scores = dict(zip(order[1:], (sums[1:] / sums[:-1]).tolist(), strict=True))
    return {name: scores[name] for name in names}


def _pair_of(clean: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of batches, or of one black image where they are empty: nothing in it changes."""
    if len(clean):
        return clean, attacked
    black = clean.new_zeros(1, *clean.shape[1:])
    return black, black


def _feature_changes(model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """||F(x + d) - F(x)|| / dim summed over images, of the image and of all layers as they run."""
    changes: dict[str, Tensor] = {}
    zero = torch.zeros((), dtype=torch.float64, device=pairs[0][0].device)
    for clean, attacked in pairs:
        before: dict[str, Tensor] = {"": clean}
        with _every_layer(model, before.__setitem__):
            model(clean)

        def compare(name: str, output: Tensor, before: dict[str, Tensor] = before) -> None:
            exact = torch.promote_types(output.dtype, torch.float32)
            change = (output.to(exact) - before.pop(name).to(exact)).flatten(1)
            norms = torch.linalg.vector_norm(change, dim=1, dtype=torch.float64)
            changes[name] = changes.get(name, zero) + norms.sum() / change.shape[1]

        compare("", attacked)
        with _every_layer(model, compare):
            model(attacked)
    return changes


@contextmanager
def _every_layer(model: nn.Module, keep: Keep) -> Iterator[None]:
    """`keep` is given every layer's name and output as the model runs."""
    network = model.network if isinstance(model, RobustModel) else model

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: keep(name, output)

    handles = [
        network.get_submodule(name).register_forward_hook(hook(name))
        for name in find_layers(network)
    ]
    try:
        if isinstance(model, RobustModel):
            with model.plainly():
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()
