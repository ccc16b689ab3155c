"""Defaults that depend on the data and on the weights that training starts from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from safer_fast.config.schema import Config
from safer_fast.runs.layout import RunFolder
from safer_fast.runs.resume import settings_it_began_with

LARGEST_PATCH, LEAST_PATCHES = 16, 7
"""Pixels along an edge of a patch, and patches along an edge of an image."""
WARMUP_SHARE = 0.75
CLEAN_SHARE, RAMP_SHARE = 1 / 6, 1 / 3
"""Shares of the warm-up's epochs, as in the recipe `digits`."""


def choose_defaults(config: Config, open_flags: Collection[str]) -> tuple[Config, list[str]]:
    """Choose open settings; return the configuration and a line for each that this changed.

    open_flags: see `command_line.find_open_flags`. A resumed run keeps its settings. Raises
    ValueError as `load_data` does.
    """
    if not open_flags:
        return config, []
    began = _began_with(config)
    if began is not None:
        values = {flag: _get(began, flag) for flag in open_flags}
        reasons: Mapping[str, str] = dict.fromkeys(values, "as the run began")
    else:
        values, reasons = _choose(config, open_flags)
    chosen = deepcopy(config)
    changed = [flag for flag in open_flags if flag in values and values[flag] != _get(config, flag)]
    for flag in changed:
        group, name = flag.split(".")
        setattr(getattr(chosen, group), name, values[flag])
    return chosen, [f"--{flag} {values[flag]}: {reasons[flag]}" for flag in changed]


def patch_size_for(image_size: int) -> int:
    """Largest patch of 2 to 16 pixels that divides the image into 7 or more along its edge.

    If none does, the largest with 7 or more whole patches, or 2.
    """
    most = max(2, min(LARGEST_PATCH, image_size // LEAST_PATCHES))
    return next((size for size in range(most, 1, -1) if image_size % size == 0), most)


def _began_with(config: Config) -> Config | None:
    """Settings of the run that is resumed, None if there is none yet."""
    if config.resume == "never" or config.output is None:
        return None
    folder = Path(config.output)
    return settings_it_began_with(folder) if RunFolder(folder).config.is_file() else None


def _choose(
    config: Config, open_flags: Collection[str]
) -> tuple[dict[str, int], Mapping[str, str]]:
    """Choose settings that suit new weights and the data; return them, and reasons, by flag."""
    model = config.model
    values: dict[str, int] = {}
    reasons: dict[str, str] = {}
    if model.checkpoint is not None or model.pretrained:
        return values, reasons
    if "model.patch_size" in open_flags and "patch_size" not in model.arguments:
        from safer_fast.data.load import find_image_size
        from safer_fast.training.objectives import needs_labels

        image_size = find_image_size(config.data, needs_labels(config.objective))
        # the default model has the largest patch
        if (size := patch_size_for(image_size)) != LARGEST_PATCH:
            values["model.patch_size"] = size
            reasons["model.patch_size"] = f"images have {image_size} pixels an edge"
    epochs = _warm_up(config, "selection.warmup_epochs" in open_flags)
    reason = f"of {config.epochs} epochs; the weights are new, nothing is robust yet"
    return values | epochs, reasons | dict.fromkeys(epochs, reason)


def _warm_up(config: Config, is_open: bool) -> dict[str, int]:
    """Numbers of epochs of the warm-up, and within it of the clean phase and epsilon's ramp."""
    values, num_epochs = {}, int(WARMUP_SHARE * config.epochs)
    if is_open and not config.selection.takes_all:
        values["selection.warmup_epochs"] = num_epochs
    if not is_open:
        num_epochs = config.selection.warmup_epochs or num_epochs
    if config.attack.steps and config.attack.epsilon:
        values["attack.clean_epochs"] = int(CLEAN_SHARE * num_epochs)
        values["attack.epsilon_warmup_epochs"] = int(RAMP_SHARE * num_epochs)
    return values


def _get(config: Config, flag: str) -> Any:
    group, name = flag.split(".")
    return getattr(getattr(config, group), name)
