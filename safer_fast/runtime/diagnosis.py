"""Diagnosis of a machine as text: the facts and the table of checks, for an issue or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safer_fast.config.messages import printable
from safer_fast.runtime.fast_paths import Check
from safer_fast.runtime.machine import Facts


def as_block(machine: Facts, checks: Sequence[Check]) -> str:
    """The facts and the table of checks between fences, for an issue."""
    return "\n".join(["```text", *_lines(machine), "", table(checks), "```"])


def as_json(machine: Facts, checks: Sequence[Check]) -> str:
    """The facts and the checks as one JSON object."""
    content = {"machine": machine, "checks": [asdict(check) for check in checks]}
    return json.dumps(content, indent=2)


def table(checks: Sequence[Check]) -> str:
    """The checks as lines of aligned columns, each remedy below its check."""
    width = max(len(check.name) for check in checks) + 2
    lines = []
    for check in checks:
        state = "live" if check.is_live else "off"
        lines.append(f"{check.name:{width}}{state:6}{printable(check.detail)}")
        if check.remedy:
            indent = " " * (width + 6)
            lines += textwrap.wrap(
                f"remedy: {check.remedy}",
                100,
                initial_indent=indent,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def without_home(text: str) -> str:
    """The text with ~ in place of the home folder, which names the user."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _lines(machine: Facts) -> list[str]:
    width = max(map(len, machine)) + 2
    return [f"{name:{width}}{line}" for name, value in machine.items() for line in _texts(value)]


def _texts(value: Any) -> list[str]:
    """A fact as lines, one for each item of a list."""
    if isinstance(value, dict):
        return [", ".join(f"{name} {item}" for name, item in value.items())]
    return (value or ["none"]) if isinstance(value, list) else [str(value)]
