"""Scaling of a recipe's ramps to a run of another number of epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

WARMUP = "selection.warmup_epochs"
SCALED = (WARMUP, "attack.clean_epochs", "attack.epsilon_warmup_epochs", "optim.warmup_epochs")


def scaled(recipe: Mapping[str, Any], words: Sequence[str]) -> dict[str, int | float]:
    """Settings of the recipe, scaled to a typed `--epochs`, by flag.

    Empty if the warm-up is typed too. words: arguments, with underscores.
    """
    epochs = typed_epochs(words)
    typed = {word.partition("=")[0] for word in words}
    if (
        epochs is None
        or epochs == recipe["epochs"]
        or typed & {f"--{WARMUP}", f"--{WARMUP.partition('.')[0]}"}
    ):
        return {}
    share = epochs / recipe["epochs"]
    values: dict[str, int | float] = {}
    for flag in SCALED:
        group, name = flag.split(".")
        own = recipe.get(group, {}).get(name, 0)
        if isinstance(own, int | float) and own and not typed & {f"--{flag}", f"--{group}"}:
            values[flag] = own * share if flag.startswith("optim.") else int(own * share)
    return values


def is_too_short(recipe: Mapping[str, Any], words: Sequence[str]) -> bool:
    """True if the typed `--epochs` are no more than the recipe's warm-up, which needs them all."""
    epochs, own = typed_epochs(words), recipe.get("epochs")
    warmup = recipe.get("selection", {}).get(WARMUP.partition(".")[2])
    is_known = type(own) is int and type(warmup) is int and own > warmup
    return is_known and epochs is not None and 0 < epochs <= warmup


def typed_epochs(words: Sequence[str]) -> int | None:
    """The last number typed for `--epochs`; None if there is none."""
    found = None
    for word, following in pairwise([*words, ""]):
        if word == "--epochs" or word.startswith("--epochs="):
            found = word.partition("=")[2] or following
    return int(found) if found is not None and found.isascii() and found.isdecimal() else None
