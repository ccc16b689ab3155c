"""Report: runs as one self-contained HTML page, `python -m safer_fast.report RUN [RUN ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safer_fast.config.checks import check_file
from safer_fast.config.command_line import with_underscores
from safer_fast.config.parser import new_parser, parse
from safer_fast.runs.report.page import write_report
from safer_fast.runtime.command import run


@dataclass
class _Arguments:
    runs: list[str]
    output: str | None = None


def main(arguments: Sequence[str]) -> None:
    """Write the report that the command line asks for, and print where it is."""
    parser = new_parser("report", "Write one HTML page about one run or comparing several.")
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--output",
        type=str | None,
        help="the page to write; default: report.html in RUN, for several comparison.html here",
    )
    asked = parse(parser, with_underscores(arguments), _Arguments)
    check_file(asked.output, "--output")
    output = None if asked.output is None else Path(asked.output)
    print(f"wrote {write_report([Path(folder) for folder in asked.runs], output)}")


if __name__ == "__main__":
    run(main)
