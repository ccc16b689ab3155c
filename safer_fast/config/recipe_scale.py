"""Ramps of the default recipe in a run of another length: they keep their share of the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

WARMUP = "selection.warmup_epochs"
SCALED = (WARMUP, "attack.clean_epochs", "attack.epsilon_warmup_epochs", "optim.warmup_epochs")


def scaled(recipe: Mapping[str, Any], words: Sequence[str]) -> dict[str, int | float]:
    """The settings of the recipe that a typed `--epochs` changes, by flag.

    None where the warm-up is typed too. words: typed, with underscores.
    """
    epochs = _epochs(words)
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
        if own and not typed & {f"--{flag}", f"--{group}"}:
            values[flag] = own * share if flag.startswith("optim.") else int(own * share)
    return values


def _epochs(words: Sequence[str]) -> int | None:
    """The number that is typed for `--epochs`, the last one; None for none."""
    found = None
    for word, following in pairwise([*words, ""]):
        if word == "--epochs" or word.startswith("--epochs="):
            found = word.partition("=")[2] or following
    return int(found) if found is not None and found.isascii() and found.isdecimal() else None
