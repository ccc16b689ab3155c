"""Parsing of command lines: recipes, YAML files and flags, with one clear line for a mistake."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from safer_fast.config.checks import check_config
from safer_fast.config.messages import shortened
from safer_fast.config.parser import new_parser, parse
from safer_fast.config.recipe_files import find_settings, read_settings, recipe_names, recipes
from safer_fast.config.recipe_scale import is_too_short, scaled
from safer_fast.config.schema import Config

DEFAULT_RECIPE = "digits"
OPEN_FLAGS = (
    "model.patch_size",
    "selection.warmup_epochs",
    "attack.clean_epochs",
    "attack.epsilon_warmup_epochs",
)
"""Settings that training chooses by data and weights if they are not given."""
FIRST_FLAGS = (
    "config",
    "data.path",
    "model.name",
    "model.checkpoint",
    "attack.epsilon",
    "epochs",
    "batch_size",
    "amp",
    "output",
    "dry_run",
)
"""Ten settings that `train --help` explains; the others follow by group."""


def parse_config(arguments: Sequence[str], described: Mapping[str, Any] | None = None) -> Config:
    """Parse and check the arguments of `python -m safer_fast.train`.

    `--config` takes a YAML file or the name of a recipe; flags override it. With neither `--config`
    nor `--data.path` the recipe `digits` is the base. See also `find_open_flags`.
    described: settings of `model` that the checkpoint was trained with. They have the precedence of
    `model.checkpoint`: flags override them, and they override the recipe if the checkpoint is
    given as a flag. Raises ValueError naming the flag.
    """
    parser = _train_parser()
    words = with_underscores(arguments)
    for switch in _switches():
        words = _with_value(switch, words)
    config = parse(parser, _config_first(words, described or {}), Config)
    given = {word.partition("=")[0] for word in words}
    is_typed = any(word.startswith("--model.arguments") for word in given)
    if is_typed and "patch_size" in config.model.arguments and "--model.patch_size" not in given:
        config.model.patch_size = None  # not that of a recipe
    check_config(config)
    return config


def find_open_flags(arguments: Sequence[str]) -> list[str]:
    """Flags of OPEN_FLAGS that training chooses: those not typed, if there is no recipe.

    The name of a model implies its patch size.
    """
    given = {word.partition("=")[0] for word in with_underscores(arguments)}
    if "--config" in given or "--data.path" not in given:
        return []
    if "--model.name" in given:
        given.add("--model.patch_size")
    groups = {flag: f"--{flag.partition('.')[0]}" for flag in OPEN_FLAGS}
    return [flag for flag in OPEN_FLAGS if not given & {f"--{flag}", groups[flag]}]


def scaled_by_epochs(arguments: Sequence[str]) -> list[str]:
    """Notes on settings of a recipe that are scaled to a typed `--epochs`."""
    words, name = _without(with_underscores(arguments), "--config")
    if name is None and "--data.path" in {word.partition("=")[0] for word in words}:
        return []
    recipe = _check_mapping(find_settings(name or DEFAULT_RECIPE, "--config"))
    source = f"the recipe {name or DEFAULT_RECIPE}" if name in (None, *recipes()) else name
    why = f"as large a share of the epochs as in {source}"
    return [f"--{flag} {value:g}: {why}" for flag, value in _scaled(name, recipe, words).items()]


def _scaled(
    name: str | None, recipe: Mapping[str, Any], words: Sequence[str]
) -> dict[str, int | float]:
    """Settings of a recipe that are scaled to `--epochs`.

    Those of the default recipe always are, those of one that is named (`name`) where its warm-up
    would leave no epoch for SAFER.
    """
    return scaled(recipe, words) if name is None or is_too_short(recipe, words) else {}


@cache
def _train_parser() -> ArgumentParser:
    """The parser of `train`, built once: that takes longer than to parse with it."""
    parser = new_parser("train", "Train a robust vision transformer.")
    parser.first = FIRST_FLAGS
    parser.add_argument(
        "--config",
        action="config",
        help=f"a YAML file or {recipe_names()}; without it and --data.path: {DEFAULT_RECIPE}",
    )
    parser.add_class_arguments(Config, None)
    return parser


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """Replace dashes within flags by underscores, `--batch-size=8` -> `--batch_size=8`."""
    return [_flag_with_underscores(word) if word.startswith("--") else word for word in arguments]


def _flag_with_underscores(word: str) -> str:
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _with_value(flag: str, words: Sequence[str]) -> list[str]:
    """Replace a `flag` without value by `flag=true`."""
    return [
        f"{word}=true" if word == flag and following.startswith("--") else word
        for word, following in pairwise([*words, "--"])
    ]


def _config_first(words: Sequence[str], described: Mapping[str, Any]) -> list[str]:
    """Move `--config FILE` to the front, so that flags in any place override it."""
    words, name = _without(words, "--config")
    given = {word.partition("=")[0] for word in words}
    network = _without(words, "--model.name")[1]
    if name is None and "--data.path" in given:
        return _as_words(described, network) + words
    file = find_settings(name or DEFAULT_RECIPE, "--config")
    content = _check_mapping(file)
    model = content.get("model", {})
    first = ["--config", str(file)]
    first += [f"--{flag}={value}" for flag, value in _scaled(name, content, words).items()]
    if "--model.name" in given:  # arguments of the recipe's model do not fit another one
        first += ["--model.arguments", "{}"]
    if "--model.checkpoint" in given:  # in place of the weights that a recipe fetches
        return [*first, "--model.pretrained=false", *_as_words(described, network), *words]
    return _as_words(described, network or model.get("name")) + first + words


def _as_words(described: Mapping[str, Any], network: Any) -> list[str]:
    """Flags for the settings of a checkpoint's model; none if another model is asked for."""
    if network is not None and str(network).partition(".")[0] != described.get("name"):
        return []  # arguments of a network do not fit another one
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in described.items()}
    return [f"--model.{key}={text}" for key, text in texts.items()]


def _check_mapping(file: Path) -> dict[str, Any]:
    """Read the settings in a file; their names and types are checked later.

    Raises ValueError for a file without settings, and for groups that hold none.
    """
    content = read_settings(file, "--config")
    for name in _group_names():
        if not isinstance(group := content.get(name, {}), dict):
            raise ValueError(
                f"--config: expected names with values for {name} in {file}, "
                f"got {shortened(repr(group))}"
            )
    return content


def _without(words: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """Remove `flag VALUE` or `flag=VALUE` from the words; returns them and the value."""
    rest, value = [], None
    remaining = iter(words)
    for word in remaining:
        if word == flag:
            value = next(remaining, None)
        elif word.startswith(flag + "="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, value


def _switches() -> list[str]:
    """Flags that may be given without a value, for true."""
    flags = []
    for name, value in Config().to_dict().items():
        values = value if name in _group_names() else {"": value}
        inner = ((f"{name}.{key}" if key else name, item) for key, item in values.items())
        flags += [f"--{flag}" for flag, item in inner if isinstance(item, bool)]
    return flags


def _group_names() -> list[str]:
    config = Config()
    return [item.name for item in fields(config) if is_dataclass(getattr(config, item.name))]
