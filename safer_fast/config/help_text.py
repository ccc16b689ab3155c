"""Format of `--help`: the flags that one needs first, then the others by group; types in words."""

from __future__ import annotations

import re
import textwrap
from argparse import SUPPRESS, Action, _HelpAction
from collections.abc import Sequence
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from safer_fast.config.settings.types import Radius

_WORDS = {
    "int": "whole number",
    "float": "number",
    "str": "text",
    "null": "null",
    "Radius": "number or fraction such as 8/255",
    "Names": "names, separated by commas",
    "Any": "anything",
}
GROUP_FILE = "Path to a configuration file."
"""Help of the flags by which jsonargparse reads a group from a file; they are not shown."""
_GROUP = re.compile(rf"^ +--\w+ CONFIG\s+{re.escape(GROUP_FILE)}\n", re.MULTILINE)
_TOP_LEVEL = re.compile(r"(?<![\w.])--[a-z_]+(?![\w.])")


_WIDTH = 78
_OF_THE_RUN = "run"
"""Name of the group of flags that are in no group."""


class GroupedParser(ArgumentParser):
    """A parser whose `--help` is short, and takes the name of a group of flags, or all.

    It shows flags as they are typed: --batch-size, but --group.its_name.
    """

    first: Sequence[str] = ()
    """Settings that `--help` explains; none: all, of a command with few."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, add_help=False, **settings)
        self.add_argument(
            "-h",
            "--help",
            action=_Help,
            help="Show this help; GROUP: that of a group; all: of all.",
        )

    def format_help(self, *arguments: Any, **settings: Any) -> str:
        return tidy(super().format_help(*arguments, **settings))

    def help_on(self, group: str | None) -> str:
        """The help of a group, of all flags for "all", or of those that one needs first."""
        if group == "all" or (group is None and not self.first):
            return self.format_help()
        groups = self._flags_by_group()
        if group is None:
            flags = {action.dest: action for action in self._actions}
            sections = [("flags that one needs first", [flags[name] for name in self.first])]
        elif group in groups:
            sections = [groups[group]]
        else:
            close = get_close_matches(group, groups, n=1) if self.first else []
            hint = f", did you mean {close[0]}?" if close else ""
            names = f"one of {', '.join(groups)}, all" if self.first else "nothing behind it or all"
            self.error(f"--help: expected {names}, got {group[:80]}{hint}")
        shown = [SimpleNamespace(title=t, description=None, _group_actions=a) for t, a in sections]
        kept, self._action_groups = self._action_groups, shown  # type: ignore[assignment]
        try:
            text = self.format_help()
        finally:
            self._action_groups = kept
        return text if group else text + self._index(groups)

    def _flags_by_group(self) -> dict[str, tuple[str, list[Action]]]:
        """Title and flags of each group, by its name."""
        found: dict[str, tuple[str, list[Action]]] = {}
        for group in self._action_groups:
            for action in group._group_actions:
                if action.help in (GROUP_FILE, SUPPRESS) or isinstance(action, _Help):
                    continue
                name, dot, _ = action.dest.partition(".")
                title = str(group.title).partition(";")[0] if dot else "Flags without a group"
                found.setdefault(name if dot else _OF_THE_RUN, (title, []))[1].append(action)
        return found

    def _index(self, groups: dict[str, tuple[str, list[Action]]]) -> str:
        """The names of all other flags, by group."""
        lines = ["", f"more flags; `{self.prog} --help GROUP` explains a group, `--help all` all:"]
        indent = " " * 14
        for name, (title, actions) in groups.items():
            rest = [a for a in actions if a.dest not in (*self.first, "version")]
            names = [a.dest.rpartition(".")[2] for a in rest]
            if name == _OF_THE_RUN:
                names = [dashed(a.option_strings[-1]) for a in rest]
            if names:
                lines.append(f"  {name:12}{title}:")
                lines += textwrap.wrap(
                    ", ".join(names),
                    _WIDTH,
                    initial_indent=indent,
                    subsequent_indent=indent,
                    break_on_hyphens=False,
                )
        return "\n".join(lines) + "\n"


class _Help(_HelpAction):
    """`--help [GROUP]`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, help=settings["help"])
        self.nargs, self.metavar = "?", "GROUP"

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        print(parser.help_on(values), end="")
        parser.exit()


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

    def _get_help_string(self, action: Action) -> str:
        """The help with a default as users type it; none where the text says what it is."""
        text: str = super()._get_help_string(action)
        if action.default is None and "default:" in (action.help or ""):
            text = re.sub(r", default: %\(default\)s| \(default: %\(default\)s\)", "", text)
        return text.replace("%(default)s", _as_typed(action.default))


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


def _as_typed(value: Any) -> str:
    """A default as users type it: 8/255, clean,fgsm, true."""
    if isinstance(value, Radius):
        steps = value * 255
        return (
            f"{steps:.0f}/255" if steps >= 1 and abs(steps - round(steps)) < 1e-6 else f"{value:g}"
        )
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def tidy(text: str) -> str:
    """Remove options for files of groups from the help, and dash flags of the top level."""
    text = _GROUP.sub("", text)
    return _TOP_LEVEL.sub(lambda flag: dashed(flag[0]), text)


def dashed(flag: str) -> str:
    """The flag with dashes: --batch_size -> --batch-size."""
    return "--" + flag.removeprefix("--").replace("_", "-")


def _names(choices: str) -> list[str]:
    return re.findall(r"'([^']*)'", choices)
