"""Report: runs as one self-contained HTML page, `python -m safer_fast.report RUN [RUN ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safer_fast.config.checks import check_file
from safer_fast.config.command_line import with_underscores
from safer_fast.config.doors import speaking_flags
from safer_fast.config.parser import new_parser, parse
from safer_fast.runs.report.page import write_report
from safer_fast.runtime.command import run
from safer_fast.runtime.files import check_writable


@dataclass
class _Arguments:
    runs: list[str]
    output: str | None = None
    picture: str | None = None


@speaking_flags()
def main(arguments: Sequence[str]) -> None:
    """Write the report that the command line asks for, and print where it is."""
    parser = new_parser("report", "Write one HTML page about one run or comparing several.")
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--output",
        type=str | None,
        help="the page to write; default: report.html in RUN, for several comparison.html here",
    )
    parser.add_argument(
        "--picture",
        type=str | None,
        help="a .png file to write in place of the page: layer map and attacked images of one run",
    )
    asked = parse(parser, with_underscores(arguments), _Arguments)
    check_file(asked.output, "--output")
    check_picture(asked.picture, asked.runs)
    if asked.picture is not None:
        from safer_fast.runs.report.picture import write_picture

        print(f"wrote {write_picture(Path(asked.runs[0]), Path(asked.picture))}")
        return
    if asked.output is None:
        place = Path(asked.runs[0]) if len(asked.runs) == 1 else Path()
        check_writable(place, "--output", "give a file elsewhere")
    output = None if asked.output is None else Path(asked.output)
    print(f"wrote {write_report([Path(folder) for folder in asked.runs], output)}")


def check_picture(file: str | None, runs: Sequence[str]) -> None:
    """Raise ValueError unless the picture is a .png file of one run."""
    check_file(file, "--picture")
    if file is not None and not file.lower().endswith(".png"):
        raise ValueError(f"--picture: expected a .png file, got {file}")
    if file is not None and len(runs) > 1:
        raise ValueError(f"--picture: expected one run, got {len(runs)}")


if __name__ == "__main__":
    run(main)
