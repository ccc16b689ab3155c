"""Classes of settings in Python: unknown names are refused with the nearest one, at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)
SETTINGS: set[str] = set()
"""Settings of all classes that `hinting` has seen; `group.name` for those in groups."""


def hinting(kind: Kind) -> Kind:
    """Make a dataclass of settings, and the groups in it, refuse unknown names with a hint.

    They raise the errors of Python: TypeError for an argument, AttributeError for an attribute. A
    dictionary becomes the group that it is given for; one with unknown names stays as it is until
    it is used. As text they show what differs from the defaults.
    """
    known = []
    for item in fields(kind):
        group: Any = item.default_factory
        known.append(item.name)
        if is_dataclass(group):
            inner = [f"{item.name}.{setting.name}" for setting in fields(group)]
            known += inner
            _prepare(group, inner, f"{item.name}.")
    _prepare(kind, known)
    SETTINGS.update(known)
    return kind


def check_arguments(where: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError for the first name of an argument that a function does not have."""
    for name in given:
        if name not in known:
            raise TypeError(f"{where}: unknown argument {name!r}{hint(name, list(known))}")


def hint(name: str, known: Sequence[str], group: str = "") -> str:
    """The words `, did you mean ...?` for an unknown name; empty if none is similar.

    group: beginning of the known names that is not shown.
    """
    from safer_fast.config.messages import suggested

    close = suggested(group + name, known)
    return f", did you mean {close.removeprefix(group)!r}?" if close else ""


def _changes(settings: Any) -> str:
    """The settings that differ from the defaults, as a call that makes them again."""
    shown = (f"{name}={value!r}" for name, value in _changed(settings).items())
    return f"{type(settings).__qualname__}({', '.join(shown)})"


def _changed(settings: Any) -> dict[str, Any]:
    """Settings that differ from the defaults by name; those of a group as a dictionary."""
    found = {}
    for item in fields(settings):
        value, make = getattr(settings, item.name), item.default_factory
        if is_dataclass(value):
            if inner := _changed(value):
                found[item.name] = inner
        elif value != (make() if callable(make) else item.default):
            found[item.name] = value
    return found


def _prepare(kind: Any, known: Sequence[str], group: str = "") -> None:
    initialise: Callable[..., None] = kind.__init__
    if hasattr(initialise, "__wrapped__"):  # a group of several classes
        return
    own = {item.name for item in fields(kind)}
    groups: dict[str, Any] = {
        item.name: item.default_factory
        for item in fields(kind)
        if is_dataclass(item.default_factory)
    }
    assign: Callable[[Any, str, Any], None] = kind.__setattr__

    @wraps(initialise)
    def checked(self: Any, *values: Any, **settings: Any) -> None:
        for name, value in settings.items():
            if name not in own:
                name = _with_first(name, value)
                found = hint(name, known, group)
                raise TypeError(f"{kind.__name__}: unknown setting {name!r}{found}")
        initialise(self, *values, **settings)

    def set_checked(self: Any, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__ and not name.startswith("__"):
            found = hint(name, known, group)
            raise AttributeError(f"{type(self).__name__}: unknown setting {name!r}{found}")
        if name in groups and isinstance(value, Mapping):
            with suppress(TypeError):
                value = groups[name](**value)
        assign(self, name, value)

    kind.__init__, kind.__setattr__, kind.__repr__ = checked, set_checked, _changes


def _with_first(name: str, value: Any) -> str:
    """The name, that of an unknown group with its first setting."""
    is_group = isinstance(value, Mapping) and value
    return f"{name}.{next(iter(value))}" if is_group else name
