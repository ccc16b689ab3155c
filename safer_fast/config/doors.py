"""Words of the two doors: flags for a command, arguments and fields of `Config` for Python.

Messages are written with flags. At the door of Python, every public function that takes settings,
flags become names of arguments; a command shows them as flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from safer_fast.config.hints import SETTINGS, check_arguments
from safer_fast.config.settings.types import device_as_text

P = ParamSpec("P")
T = TypeVar("T")
_IS_COMMAND: ContextVar[bool] = ContextVar("is command", default=False)
_ARGUMENTS = {"config", "device", "weights"}
"""Arguments of public functions that are named like flags, beside the settings."""
_FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*(?:\.\w+)?)")
_FIRST_NAME = re.compile(r"([a-z_]+\.[a-z_]+)(?=: )")


@contextmanager
def speaking_flags(renamed: Mapping[str, str] | None = None) -> Iterator[None]:
    """Leave flags in messages as they are within the block, or a decorated command.

    renamed: names of settings that the command has by others.
    """
    token = _IS_COMMAND.set(True)
    try:
        yield
    except ValueError as error:
        if renamed and error.args and isinstance(error.args[0], str):
            dashed = {name: other.replace("_", "-") for name, other in renamed.items()}
            error.args = (_renamed(in_flags(error.args[0]), dashed), *error.args[1:])
        raise
    finally:
        _IS_COMMAND.reset(token)


def door(renamed: Mapping[str, str] | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a public function name arguments and settings in its errors, in place of flags.

    An unknown argument is refused with the nearest one, and a `torch.device` becomes its name.
    renamed: names of settings that the function knows by others.
    """

    def opened(function: Callable[P, T]) -> Callable[P, T]:
        parameters = signature(function).parameters
        takes_more = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
        others = dict(renamed or {})
        if "device" in parameters:
            others["runtime.device"] = "device"

        @wraps(function)
        def called(*values: P.args, **settings: P.kwargs) -> T:
            if not takes_more:
                check_arguments(f"{function.__name__}()", settings, parameters)
            if "device" in settings:
                settings["device"] = device_as_text(settings["device"])
            try:
                return function(*values, **settings)
            except (ValueError, FloatingPointError) as error:
                if error.args and isinstance(error.args[0], str) and not _IS_COMMAND.get():
                    error.args = (in_python(error.args[0], others), *error.args[1:])
                raise

        return called

    return opened


def in_python(message: str, renamed: Mapping[str, str] | None = None) -> str:
    """The message with names of settings and arguments in place of flags."""

    def as_name(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return name if name in SETTINGS or name in _ARGUMENTS else found[0]

    message, *command = re.split(r"(?=python -m safer_fast)", message, maxsplit=1)
    text = _FLAG.sub(as_name, message)
    text = re.sub(r"^RUN(?=: )", "run", text)
    text = re.sub(r"(?<=, got )null$", "None", text)
    return "".join([_renamed(text, renamed or {}), *command])


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for name, other in names.items():
        text = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", other, text)
    return text


def in_flags(message: str) -> str:
    """The message with a flag in place of the name of the setting that it begins with."""
    from safer_fast.config.messages import typed

    found = _FIRST_NAME.match(message)
    if found is None or found[1] not in SETTINGS:
        return message
    return typed(found[1]) + message[found.end() :]
