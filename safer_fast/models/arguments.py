"""Names and arguments of timm networks: messages for those that there are not."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from inspect import signature

from safer_fast.config.messages import nearest
from safer_fast.config.schema import ModelConfig


def check_arguments(config: ModelConfig, module: str, message: str) -> None:
    """Raise ValueError for an argument that the network does not have, with the nearest one.

    module: where timm defines the network. message: of the error that building it raised.
    """
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    if found is None or found[2] not in {*config.arguments, "patch_size", "drop_path_rate"}:
        return
    name = found[2]
    known = signature(getattr(sys.modules[module], found[1], object)).parameters
    close = get_close_matches(name, known, n=1)
    is_own = name not in config.arguments
    flag = f"model.{name}" if is_own else "model.arguments"
    expected = f"none for {config.name}" if is_own else f"arguments of {config.name}"
    got = f"{getattr(config, name)}" if is_own else repr(name)
    raise ValueError(
        f"--{flag}: expected {expected}, got {got}"
        + (f", did you mean {close[0]!r}?" if close and not is_own else "")
    ) from None


def unknown_network(name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that timm does not have, with the nearest of those it has."""
    close = nearest_network(name, known)
    hint = f", did you mean {close}?" if close else ""
    return ValueError(f"model.name: expected a model of timm, got {name!r}{hint}")


def nearest_network(name: str, known: Iterable[str]) -> str | None:
    """The network that a name probably means, of which it may be the beginning; None: no idea."""
    typed = name.partition(".")[0].lower().replace("-", "_")
    beginnings: dict[str, str] = {}
    for network in known:
        beginnings.setdefault("_".join(network.split("_")[: typed.count("_") + 1]), network)
    close = typed if typed in beginnings else nearest(typed, beginnings)
    return beginnings[close] if close else None
