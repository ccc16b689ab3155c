"""Parsers of settings: typed, with our help, and one clear line for a mistake."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type

from safer_fast import __version__
from safer_fast.config.completion import is_completing, prepare_completion
from safer_fast.config.help_text import GroupedParser, HelpFormatter
from safer_fast.config.messages import LONGEST_WORD, explained, no_group, of_kind, shortened, typed
from safer_fast.config.recipe_files import recipes
from safer_fast.config.settings.types import Names, Radius
from safer_fast.config.untrusted import ENDLESS_NUMBER

GROUP_FILES = (".yaml", ".yml", ".json")
CONTROL = re.compile("[\x00-\x1f\x7f]")
T = TypeVar("T")


def new_parser(command: str, description: str) -> GroupedParser:
    """Make a parser whose types and help follow the conventions of all commands."""
    register_type(
        Radius, serializer=float, deserializer=parse_radius, fail_already_registered=False
    )
    register_type(Names, serializer=list, deserializer=_parse_names, fail_already_registered=False)
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        # files must not make jsonargparse import or instantiate anything
        import_path_denylist=["*"],
        instantiate_subclass_spec_in_any=False,
    )
    parser = GroupedParser(
        prog=_program(command),
        description=description,
        exit_on_error=False,
        # a part of a flag would mean another one as soon as a second begins alike
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"safer_fast {__version__}",
        help="Print the version.",
    )
    return parser


def _program(command: str) -> str:
    """A command as its user calls it."""
    is_script = Path(sys.argv[0]).stem == "safer-fast"
    return f"safer-fast {command}" if is_script else f"python -m safer_fast.{command}"


def parse(parser: ArgumentParser, arguments: Sequence[str], kind: Callable[..., T]) -> T:
    """Parse arguments to `kind`, a dataclass; raises ValueError with one clear line."""
    if is_completing():
        prepare_completion(parser, recipes())
    for before, word in pairwise(["", *arguments]):
        if ENDLESS_NUMBER.search(word):
            awaits_value = before.startswith("--") and "=" not in before
            named = word if word.startswith("--") else before if awaits_value else ""
            flag = typed(named.partition("=")[0][2:]) if named else "RUN"
            raise ValueError(f"{flag}: expected numbers of fewer digits, got {shortened(word)}")
    _check_groups(arguments, _settings_of(parser))
    return parsed(parser, kind, lambda: parser.parse_args(list(arguments)), arguments)


def _without_flag(word: str, known: Sequence[str]) -> str:
    """The message for a word that follows no flag: a path or a recipe whose flag is missing."""
    path = next((name for name in ("data.path", "path") if name in known), None)
    hint = ""
    if "config" in known and word in recipes():
        hint = f", did you mean --config {word}?"
    elif path is not None and Path(word).exists():
        hint = f", did you mean --{path} {shortened(word)}?"
    return f"expected flags with their values, got {shortened(word)}{hint}"


def _check_groups(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for a word in place of a group's settings, which jsonargparse would read as
    a file, of any size, or import."""
    groups = {name.partition(".")[0] for name in known if "." in name}
    for word, following in pairwise([*arguments, ""]):
        flag, is_joined, value = word.partition("=")
        value = value if is_joined else following
        is_group = flag.startswith("--") and flag[2:] in groups
        if is_group and not (value.lstrip().startswith("{") or value.endswith(GROUP_FILES)):
            raise ValueError(no_group(flag[2:], shortened(repr(value)), known))


def parsed(
    parser: ArgumentParser,
    kind: Callable[..., T],
    read: Callable[[], Any],
    arguments: Sequence[str] = (),
) -> T:
    """Convert the values that `read` returns to `kind`; raises ValueError with one line.

    arguments: those that are read, if they are a command line.
    """
    try:
        values = parser.instantiate(read())
    except ArgumentError as error:
        if found := re.match(r"unrecognized arguments: ([^-\s]\S*)", str(error)):
            after = _flag_of_names(parser, arguments, found[1])
            hint = f"; names after {after} are separated by commas" if after else ""
            raise ValueError(_without_flag(found[1], _settings_of(parser)) + hint) from None
        raise ValueError(explained(str(error), _settings_of(parser))) from None
    except OverflowError:
        raise ValueError("expected numbers below 1e308, got a larger one") from None
    names = {item.name for item in fields(kind)} if is_dataclass(kind) else set()
    parsed = kind(**{name: value for name, value in vars(values).items() if name in names})
    _check_values(parsed)
    return parsed


def _check_values(config: Any, group: str = "") -> None:
    """Raise ValueError for null in a setting that takes none, and for texts that can be no name.

    jsonargparse accepts both.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        flag = "RUN" if name in ("run", "runs") else typed(group + name)
        if is_dataclass(value):
            _check_values(value, f"{name}.")
        elif value is None and type(None) not in get_args(kind):
            raise ValueError(f"{flag}: expected {of_kind(kind)}, got null")
        for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
            if CONTROL.search(text) or any(len(part) > LONGEST_WORD for part in text.split("/")):
                raise ValueError(
                    f"{flag}: expected a name or path without control characters, at most "
                    f"{LONGEST_WORD} letters between slashes, got {shortened(repr(text))}"
                )


def _flag_of_names(parser: ArgumentParser, arguments: Sequence[str], word: str) -> str | None:
    """The flag of a list of names that a word follows, after a space in place of a comma."""
    before = list(arguments)[: list(arguments).index(word)] if word in arguments else []
    flag = next((each for each in reversed(before) if each.startswith("--")), "")
    flag = flag.partition("=")[0]
    action = parser._option_string_actions.get(flag)
    kind = getattr(action, "_typehint", None)
    return typed(flag[2:]) if kind is not None and Names in (kind, *get_args(kind)) else None


def _settings_of(parser: ArgumentParser) -> list[str]:
    flags = [flag for action in parser._actions for flag in action.option_strings]
    return [flag[2:] for flag in flags if flag.startswith("--")]


def parse_radius(value: Any) -> Radius:
    """A number, or the value of a fraction; raise ValueError for another text."""
    try:
        numerator, slash, denominator = str(value).partition("/")
        return Radius(float(numerator) / float(denominator) if slash else float(numerator))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"Expected a number or a fraction such as 8/255. Got value: {value}"
        ) from None


def _parse_names(value: Any) -> Names:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple | set):
        raise ValueError(f"Expected {of_kind(Names)}. Got value: {value}")
    return Names(str(item).strip() for item in items if str(item).strip())
