"""Completion of flags and their values in a shell, by argcomplete: flags as the help shows them."""

from __future__ import annotations

import os
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from safer_fast.config.help_text import GROUP_FILE, dashed


def is_completing() -> bool:
    """True if a shell started the command to complete a word."""
    return "_ARGCOMPLETE" in os.environ


def prepare_completion(parser: ArgumentParser, recipes: Sequence[str]) -> None:
    """Let argcomplete offer the flags that the help shows, words for choices, and files."""
    for action in parser._actions:
        if action.help == GROUP_FILE:
            action.help = SUPPRESS
        action.option_strings = [
            flag if "." in flag or not flag.startswith("--") else dashed(flag)
            for flag in action.option_strings
        ]
        parser._option_string_actions.update(dict.fromkeys(action.option_strings, action))
        if action.dest == "config":
            action.completer = _completer(recipes, has_files=True)  # type: ignore[attr-defined]
        elif (kind := getattr(action, "_typehint", action.type)) is not None:
            has_files = "str" in str(kind)
            action.completer = _completer(_words(kind), has_files)  # type: ignore[attr-defined]


def _completer(words: Sequence[str], has_files: bool) -> Callable[..., list[str]]:
    def complete(prefix: str, **context: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        found = [word for word in words if word.startswith(prefix)]
        return found + (sorted(FilesCompleter()(prefix)) if has_files else [])

    return complete


def _words(kind: Any) -> list[str]:
    """The words that a type takes, also as a part of it."""
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for part in get_args(kind) for word in _words(part)]
