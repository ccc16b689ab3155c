"""Criticality of layers: how much more each changes under attack than the layer below it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from safer_fast.models.layer_outputs import uncalled_layers, watching_layers
from safer_fast.models.robust_model import RobustModel, find_layers
from safer_fast.runtime.ranks import Ranks
from safer_fast.selection.inputs import ScoredBy, ScoringInputs


def criticality_scores(
    inputs: ScoringInputs, measures: Sequence[ScoredBy]
) -> dict[ScoredBy, dict[str, float]]:
    """The same scores for all measures: they have no radius."""
    scores = criticality(inputs.model, inputs.pairs, inputs.names, inputs.ranks)
    return dict.fromkeys(measures, scores)


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
    if unseen := [name for name in names if name not in changes]:
        raise ValueError(
            f"selection.criterion: expected layers whose output can be seen for criticality, got "
            f"{unseen[0]}, which this network computes another way"
        )
    sums = ranks.sum_(torch.stack(list(changes.values())))
    scores = dict(zip(order[1:], (sums[1:] / sums[:-1]).tolist(), strict=True))
    return {name: scores[name] for name in names}


def _pair_of(clean: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of batches; one black image twice where they are empty: nothing in it changes."""
    if len(clean):
        return clean, attacked
    black = clean.new_zeros(1, *clean.shape[1:])
    return black, black


def _feature_changes(model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """||F(x + d) - F(x)|| / dim summed over images, of the image and of all layers as they run."""
    changes: dict[str, Tensor] = {}
    zero = torch.zeros((), dtype=torch.float64, device=pairs[0][0].device)
    network = model.network if isinstance(model, RobustModel) else model
    names = list(find_layers(network))
    with model.without_savings() if isinstance(model, RobustModel) else nullcontext():
        uncalled = uncalled_layers(network, names, lambda: model(pairs[0][0][:1]))
        for clean, attacked in pairs:
            before: dict[str, Tensor] = {"": clean}
            with watching_layers(network, names, before.__setitem__, uncalled):
                model(clean)

            def compare(name: str, output: Tensor, before: dict[str, Tensor] = before) -> None:
                exact = torch.promote_types(output.dtype, torch.float32)
                change = (output.to(exact) - before.pop(name).to(exact)).flatten(1)
                norms = torch.linalg.vector_norm(change, dim=1, dtype=torch.float64)
                changes[name] = changes.get(name, zero) + norms.sum() / change.shape[1]

            compare("", attacked)
            with watching_layers(network, names, compare, uncalled):
                model(attacked)
    return changes
