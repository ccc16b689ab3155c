"""Safe loading of YAML from untrusted sources: no code, no deep nesting, no anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from safer_fast.config.messages import shortened

MOST_LEVELS = 20
MOST_YAML = 2**18
"""Bytes of a file of settings: many times what any needs, and read in seconds."""
ENDLESS_NUMBER = re.compile(r"\d{309}")
"""Longer than any float; Python converts no int of 4,300 digits or more."""


def load_yaml(text: str) -> Any:
    """Parse a YAML text to plain values.

    Raises ValueError for anything else, and for anchors (&name) and deep nesting, with which a
    small file can fill the memory or crash the process.
    """
    try:
        for scalar in _scalars(text):
            # jsonargparse parses texts as YAML again
            with suppress(yaml.YAMLError):
                list(_scalars(scalar))
        return yaml.safe_load(text)
    except Exception as error:
        # PyYAML raises any exception on crafted input.
        raise ValueError(_fault(error, text) or type(error).__name__) from None


def _fault(error: Exception, text: str) -> str:
    """The message of an error in one line, with the number of the line where there is one."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        if mark is not None and problem:
            return f"line {mark.line + 1}: {problem}"
    if isinstance(error, yaml.reader.ReaderError):
        number = text.count("\n", 0, error.position) + 1
        return f"line {number}: unacceptable character {chr(error.character)!a}"
    return " ".join(str(error).split())


def _scalars(text: str) -> Iterator[str]:
    """Yield the texts and numbers in a YAML text, as written; raises ValueError as `load_yaml`."""
    level = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.ScalarEvent) and ENDLESS_NUMBER.search(event.value):
            raise ValueError(f"numbers as long as {shortened(event.value)} are not allowed")
        if level > MOST_LEVELS:
            raise ValueError(f"more than {MOST_LEVELS} levels are not allowed")
        if isinstance(event, yaml.ScalarEvent):
            yield event.value
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.anchor:
            raise ValueError(f"anchors are not allowed, such as &{event.anchor}")


MOST_JSON = 2**26
"""Bytes of a config.json; the rows of a large validation split take nearly all of them."""


def read_text(path: Path, most_bytes: int) -> str:
    """The text in a file; raises ValueError where it has more bytes, which are not read."""
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        size = max(path.stat().st_size, len(content))
        raise ValueError(f"expected at most {most_bytes} bytes, got {size}")
    return content.decode()
