"""Which fast paths are live on this machine, and what to do about the others.

`python -m safer_fast.doctor [--json] [--data.path PATH] [--output DIR]` prints the machine and the
checks, ready to be pasted into an issue.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safer_fast import command_line, ranges
from safer_fast.config import DataConfig
from safer_fast.doctor_checks import Check, diagnose
from safer_fast.doctor_data import check_data, check_disk
from safer_fast.doctor_machine import Facts, describe_machine
from safer_fast.validation import check_ranges


@dataclass
class DoctorConfig:
    """What is looked at beside the machine."""

    output: str | None = None
    """Folder that a run would write to, for its disk; default: the current folder."""
    batch_size: int = 64
    """Images per batch that the data, if there is any, is tried with."""
    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False


def main(arguments: Sequence[str]) -> None:
    """Prints machine and checks as a block for an issue, or as JSON."""
    parser = command_line.new_parser("doctor", "Say which fast paths are live here, and why not.")
    parser.add_class_arguments(DoctorConfig, None, skip={"json"})
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    words = command_line.with_underscores(arguments)
    config = command_line.parse(parser, words, DoctorConfig)
    check_ranges(config, ranges.DOCTOR)
    checks = [*diagnose(), check_disk(config.output)]
    if config.data.path is not None:
        checks += check_data(config.data, config.batch_size)
    report = as_json if config.json else as_block
    print(without_home(report(describe_machine(), checks)))


def as_block(machine: Facts, checks: Sequence[Check]) -> str:
    """The facts and the table of checks between fences, for an issue."""
    return "\n".join(["```text", *_lines(machine), "", table(checks), "```"])


def as_json(machine: Facts, checks: Sequence[Check]) -> str:
    """The same as one JSON object."""
    content = {"machine": machine, "checks": [asdict(check) for check in checks]}
    return json.dumps(content, indent=2)


def table(checks: Sequence[Check]) -> str:
    """The checks as lines of aligned columns, remedies below what they are for."""
    width = max(len(check.name) for check in checks) + 2
    lines = []
    for check in checks:
        state = "live" if check.is_live else "off"
        lines.append(f"{check.name:{width}}{state:6}{command_line.printable(check.detail)}")
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
    """The text with ~ for the user's own folder, whose name is nobody's business."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _lines(machine: Facts) -> list[str]:
    width = max(map(len, machine)) + 2
    return [f"{name:{width}}{line}" for name, value in machine.items() for line in _texts(value)]


def _texts(value: Any) -> list[str]:
    """A fact in one line, or in one for each of several."""
    if isinstance(value, dict):
        return [", ".join(f"{name} {item}" for name, item in value.items())]
    return (value or ["none"]) if isinstance(value, list) else [str(value)]


if __name__ == "__main__":
    command_line.run(main)
