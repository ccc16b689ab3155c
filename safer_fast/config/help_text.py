"""Format of `--help`: one line of usage, types in words, only flags that users type."""

from __future__ import annotations

import re
from argparse import Action
from typing import Any

from jsonargparse import DefaultHelpFormatter

_WORDS = {
    "int": "whole number",
    "float": "number",
    "str": "text",
    "null": "null",
    "Radius": "number or fraction such as 8/255",
    "Names": "names, separated by commas",
    "Any": "anything",
}
_GROUP = re.compile(r"^ +--\w+ CONFIG\s+Path to a configuration file\.\n", re.MULTILINE)
_TOP_LEVEL = re.compile(r"(?<![\w.])--[a-z_]+(?![\w.])")


class HelpFormatter(DefaultHelpFormatter):
    """A help formatter that shows the type of each flag in words."""

    def _format_usage(self, usage: Any, actions: Any, *rest: Any, **settings: Any) -> str:
        places = " ".join(str(a.metavar or a.dest) for a in actions if not a.option_strings)
        return f"usage: {' '.join([self._prog, *places.split()])} [--flag VALUE ...]\n\n"

    def _get_type_str(self, action: Action) -> str | None:
        text: str | None = super()._get_type_str(action)
        # choices are listed beside the flag
        is_listed = text is None or re.fullmatch(r"bool|Literal\[[^]]*\]", text) is not None
        return None if is_listed else in_words(str(text))


def in_words(kind: str) -> str:
    """Put a type, as Python prints it, in words; choices are listed."""
    kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    if kind.startswith(("tuple", "list")):
        return "numbers such as [0.9, 0.95]"
    if kind.startswith("dict"):
        return "names with values such as {depth: 4}"
    is_optional = kind.startswith("Optional[")
    literals = [
        name for choices in re.findall(r"Literal\[(.*?)\]", kind) for name in _names(choices)
    ]
    rest = re.findall(r"\w+", re.sub(r"Literal\[.*?\]|Optional|Union", "", kind))
    words = [*(_WORDS.get(word, word) for word in rest), *literals] + ["null"] * is_optional
    return " or ".join(dict.fromkeys(words))


def tidy(text: str) -> str:
    """Remove options for files of groups from the help, and dash flags of the top level."""
    text = _GROUP.sub("", text)
    return _TOP_LEVEL.sub(lambda flag: dashed(flag[0]), text)


def dashed(flag: str) -> str:
    """The flag with dashes: --batch_size -> --batch-size."""
    return "--" + flag.removeprefix("--").replace("_", "-")


def _names(choices: str) -> list[str]:
    return re.findall(r"'([^']*)'", choices)
