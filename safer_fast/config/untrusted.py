"""YAML that others wrote, read without running anything and without endless nesting."""

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
"""No float has as many digits, and from 4,300 on Python makes no int of them."""


def load_yaml(text: str) -> Any:
    """The plain values that a YAML text stands for.

    Raises ValueError for what is none, and for anchors (&name) and deep nesting, by which a small
    file fills any memory or ends the process.
    """
    try:
        for scalar in _scalars(text):
            # jsonargparse takes texts for YAML once more
            with suppress(yaml.YAMLError):
                list(_scalars(scalar))
        return yaml.safe_load(text)
    except Exception as error:
        # PyYAML raises whatever it stumbles over.
        raise ValueError(str(error) or type(error).__name__) from None


def _scalars(text: str) -> Iterator[str]:
    """The texts and numbers in a YAML text, as they are written."""
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
