"""Settings made in Python: converted like those of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from safer_fast.config.hints import hint
from safer_fast.config.messages import shortened, usual
from safer_fast.config.parser import new_parser, parsed
from safer_fast.config.settings.types import device_as_text

T = TypeVar("T")


def converted(config: T) -> T:
    """Convert a dataclass of settings to the types of the command line; returns a copy.

    Fractions and numbers may be texts, groups may be dictionaries. Raises ValueError with one clear
    line for a value that the command line would refuse.
    """
    if not is_dataclass(config):
        raise ValueError(f"config: expected settings, got {shortened(repr(config))}")
    return converted_to(type(config), _as_given(config))


def converted_to(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass of settings from nested values; raises ValueError as `converted` does."""
    parser = _parser_of(kind)  # type: ignore[arg-type]
    plain = {name: _plain(value) for name, value in values.items()}
    for item in fields(kind):  # type: ignore[arg-type]
        is_group, value = is_dataclass(item.default_factory), plain.get(item.name, {})
        if is_group and not isinstance(value, Mapping):
            raise ValueError(_no_group(item.name, item.default_factory, value))
    try:
        return parsed(parser, kind, lambda: parser.parse_object(plain))
    except ValueError as error:
        raise ValueError(str(error).removeprefix("--config: ")) from None


@cache
def _parser_of(kind: type) -> ArgumentParser:
    """Make the parser of a class of settings, once: that takes longer than to parse with it."""
    parser = new_parser("train", "")
    parser.add_class_arguments(kind, None)
    return parser


def _as_given(config: Any) -> dict[str, Any]:
    """The settings as plain values, as in a YAML file."""
    given = {}
    known = [item.name for item in fields(config)]
    if unknown := [name for name in vars(config) if name not in known]:
        close = hint(unknown[0], known)
        raise ValueError(
            f"{type(config).__name__}: unknown setting {shortened(unknown[0])!r}{close}"
        )
    for item in fields(config):
        value = getattr(config, item.name)
        group: type = item.default_factory  # type: ignore[assignment]
        if is_dataclass(group) and not isinstance(value, Mapping):
            if type(value) is not group:
                raise ValueError(_no_group(item.name, group, value))
            value = _as_given(value)
        given[item.name] = _plain(value)
    return given


def _no_group(name: str, group: Any, value: Any) -> str:
    """The message for a value in place of a group of settings."""
    close = usual(name, [f"{name}.{item.name}" for item in fields(group)])
    hinted = f", did you mean {close}?" if close else ""
    return (
        f"{name}: expected {group.__name__} or a dictionary of settings, got "
        f"{shortened(repr(value))}{hinted}"
    )


def _plain(value: Any) -> Any:
    """Convert paths, devices, groups, and numbers of numpy and torch to what a YAML file holds."""
    value = device_as_text(value)
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value
