"""Layers that may be selected: those whose names match, and their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from safer_fast.config.messages import meant
from safer_fast.models.families import STEM
from safer_fast.models.robust_model import RobustModel, find_layers


def match_layers(
    patterns: Sequence[str], names: Iterable[str], setting: str = "selection.layers"
) -> list[str]:
    """Layers that a name or shell-style pattern fits; raise ValueError where one fits none."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{setting}: expected names or patterns such as {names[-1]!r} or "
                f"'blocks.1?.attn.*', got {pattern!r}, which fits no layer{meant(pattern, names)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def candidates(
    model: RobustModel, from_block: int, patterns: Sequence[str] | None = None
) -> list[str]:
    """Layers of block `from_block` and above, and of the head, that a pattern fits, if given.

    Raise ValueError for a block beyond the last, a pattern that fits no layer, and where nothing
    is left.
    """
    if from_block and from_block >= max(model.num_blocks, 1):
        raise ValueError(
            f"selection.from_block: expected less than the {model.num_blocks} blocks of the model, "
            f"got {from_block}"
        )
    lowest = from_block if from_block else STEM
    fitting = match_layers(patterns or ["*"], model.layers, "selection.candidates")
    names = [name for name in fitting if model.block_of(name) >= lowest]
    if not names:
        raise ValueError(
            f"selection.candidates: expected layers of block {from_block} and above, got "
            f"{', '.join(fitting)}"
        )
    return names


def layers_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The layers of any module by name, with their parameters."""
    network = model.network if isinstance(model, RobustModel) else model
    names = model.layers if isinstance(model, RobustModel) else find_layers(model)
    return {layer: [network.get_parameter(name) for name in own] for layer, own in names.items()}
