# PYTHON_ARGCOMPLETE_OK
"""The six commands as one program: `safer-fast train`, or `python -m safer_fast train`."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from difflib import get_close_matches
from importlib import import_module

from safer_fast import __version__
from safer_fast.config.completion import is_completing
from safer_fast.config.messages import shortened
from safer_fast.runtime.command import fail, run

COMMANDS = {
    "train": "train a robust vision transformer; --dry-run: how long that would take",
    "evaluate": "measure clean and robust accuracy of a run",
    "select": "score the layers of a trained model by every criterion",
    "report": "write one HTML page about one run or comparing several",
    "export": "write a run's model for timm, the Hugging Face hub, RobustBench or ONNX",
    "doctor": "say which fast paths are live on this machine, and why not",
}
OUTLIVE_THEIR_READER = {"train", "evaluate"}


def main() -> None:
    """Run the command that the first word names, with the words behind it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if is_completing():
        name = _command_to_complete() or name
    if name in COMMANDS:
        sys.argv[1:2] = []
        module = import_module(f"safer_fast.{name}")
        run(module.main, outlives_reader=name in OUTLIVE_THEIR_READER)
    elif name in ("--help", "-h", "help"):
        print(_overview())
    elif name == "--version":
        print(f"safer_fast {__version__}")
    else:
        close = get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        fail(f"expected one of {', '.join(COMMANDS)}, got {shortened(name)}{hint}")


def _overview() -> str:
    lines = [f"  {name:10}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        [
            "usage: safer-fast COMMAND [--flag VALUE ...]",
            "",
            "Fast adversarial training of vision transformers with SAFER.",
            "",
            *lines,
            "",
            "`safer-fast COMMAND --help` explains a command's flags; --version prints the version.",
        ]
    )


def _command_to_complete() -> str | None:
    """The command whose flags a shell completes; None: its name is completed here."""
    words = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", 0))].split(" ")
    names = [word for word in words[1:-1] if word]
    if names and names[0] in COMMANDS:
        # argcomplete reads the line itself: this many words are the program
        os.environ["_ARGCOMPLETE"] = str(int(os.environ["_ARGCOMPLETE"]) + 1)
        return names[0]
    from argcomplete import autocomplete

    parser = ArgumentParser(prog="safer-fast")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("command", choices=COMMANDS)
    autocomplete(parser)
    return None


if __name__ == "__main__":
    main()
