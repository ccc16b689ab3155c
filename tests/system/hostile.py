"""Every flag of every command with every hostile value; the flags are those of `--help all`.

`python -m tests.system.hostile [--share 1] [--seed 0]` tries them in this process, each until all
checks of the command are passed; tests/system/test_hostile.py tries a sample.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from safer_fast import train_model
from safer_fast.config.command_line import parse_config
from safer_fast.runtime.command import run
from safer_fast.training.trainer import Trainer

MOST_SECONDS = 30
VALUES = (
    "",
    " ",
    "0",
    "-1",
    "1e-320",
    "1e308",
    "-1e308",
    "inf",
    "-inf",
    "nan",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "9" * 400,
    "9" * 5000,
    "9000000000000000000.5",
    "8/0",
    "1/3/5",
    "null",
    "~",
    "true",
    "[]",
    "{}",
    "[1, 2, 3]",
    "{a: 1}",
    "{depth:4}",
    "{a: {b: {c: [1, {d: 2}]}}}",
    "[" * 500,
    "!!python/object/apply:os.system ['false']",
    "&a [*a]",
    "{a: b",
    "- a",
    "x" * 5000,
    "x y " * 1250,
    "/nowhere/at/all",
    "../../../../etc/passwd",
    "/dev/null",
    ".",
    "a\nb",
    "a\x1b[2J\x07",
    "a\x00b",
    "\u202egnp.exe",
    "\U0001f600",
    "\udc80",
    "--help",
    "%s%n",
)
FAST = [
    "--epochs=1",
    "--selection.warmup_epochs=0",
    "--selection.num_images=8",
    "--attack.clean_epochs=0",
    "--attack.epsilon_warmup_epochs=0",
    "--attack.steps=1",
    "--data.max_images=32",
    "--data.num_workers=0",
    "--batch-size=16",
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 12, num_heads: 1}",
    "--model.patch_size=4",
    "--evaluation.steps=1",
    "--evaluation.max_images=8",
    "--evaluation.sentinel_images=0",
    "--evaluation.attacks=clean",
    "--runtime.num_threads=1",
]
LITTLE = {
    "train": FAST,
    "evaluate": ["RUN", "--attacks=clean", "--num-images=4", "--batch-size=4"],
    "select": ["RUN", "--num-images=2", "--steps=1", "--criteria=gradient-norm"],
    "report": ["RUN"],
    "export": ["RUN"],
    "doctor": [],
}
COMMANDS = tuple(LITTLE)


@dataclass(frozen=True)
class Case:
    """One command with one flag at one value."""

    command: str
    flag: str
    value: str

    @property
    def words(self) -> list[str]:
        return [f"{self.flag}={self.value}"] if self.flag else [self.value]

    def __str__(self) -> str:
        return f"{self.command} {self.flag}={self.value[:40]!r}"


@dataclass(frozen=True)
class Outcome:
    """The end of a case: its exit status, its standard error, and any traceback."""

    status: int | None
    errors: str
    trace: str
    seconds: float

    def fault(self, case: Case) -> str | None:
        """The fault of this end in a line or a traceback; None if there is none."""
        if self.trace:
            return self.trace
        if self.seconds > MOST_SECONDS:
            return f"took {self.seconds:.0f} s"
        if self.status not in (0, 2):
            return f"status {self.status}"
        if self.status == 0:
            return None
        if self.errors.count("\n") != 1 or not self.errors.startswith("error: "):
            return f"not one line: {self.errors[:300]!r}"
        if len(self.errors) > 1300 or not self.errors[:-1].isprintable():
            return f"unreadable: {self.errors[:300]!r}"
        if self.errors == f"error: unknown flag {case.value.partition('=')[0]}\n":
            return None  # what stands for RUN begins with a dash
        name = case.flag.lstrip("-").replace("-", "_") or "run"
        if name.rpartition(".")[2] not in self.errors.replace("-", "_").lower():
            return f"the flag is not named: {self.errors[:300]!r}"
        return None


def flags_of(command: str) -> list[str]:
    """The flags that the help of a command lists; "" stands for what has no flag (RUN)."""
    main = import_module(f"safer_fast.{command}").main
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        main(["--help", "all"])
    flags = re.findall(r"^ +(?:-h, )?(--[\w.-]+)", shown.getvalue(), re.MULTILINE)
    return [flag for flag in dict.fromkeys(flags) if flag != "--help"] + [""] * (
        "RUN" in LITTLE[command]
    )


def all_cases() -> list[Case]:
    """Every flag of every command with every value."""
    return [
        Case(command, flag, value)
        for command in COMMANDS
        for flag in flags_of(command)
        for value in VALUES
    ]


def make_run(folder: Path) -> Path:
    """A finished run of one small epoch."""
    return train_model(parse_config([*FAST, f"--output={folder}"]))


class Place:
    """Folders in which cases are tried in this process, one after the other."""

    def __init__(self, run_folder: Path, place: Path) -> None:
        self.run_folder, self.place, self.number = run_folder, place, 0

    def arguments(self, case: Case) -> list[str]:
        """The words of the case behind those that make its command quick."""
        self.number += 1
        words = [str(self.run_folder) if w == "RUN" else w for w in LITTLE[case.command]]
        if case.command in ("train", "export", "select", "report"):
            words.append(f"--output={self.place / str(self.number)}")
        if not case.flag:
            words = words[1:]
        return [*words, *case.words]

    def attempt(self, case: Case) -> Outcome:
        """Run the case; training ends where its first epoch would begin."""
        main: Callable[[Sequence[str]], None] = import_module(f"safer_fast.{case.command}").main
        arguments = self.arguments(case)
        errors, start, status, trace = io.StringIO(), time.monotonic(), 0, ""
        state = torch.get_num_threads()
        try:
            with contextlib.chdir(self.place), _streams(arguments, errors), _untrained(), _alarm():
                run(main)
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            trace = "".join(traceback.format_exception(error)[-6:])
        finally:
            torch.set_num_threads(state)
            torch.use_deterministic_algorithms(False)
        return Outcome(status, errors.getvalue(), trace, time.monotonic() - start)


@contextlib.contextmanager
def _streams(arguments: Sequence[str], errors: io.StringIO) -> Iterator[None]:
    with (
        patch.object(sys, "argv", ["command", *arguments]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _untrained() -> Iterator[None]:
    """Set a run up with all its parts, and leave it before its first epoch."""
    with (
        patch.object(Trainer, "epochs", lambda trainer: iter(())),
        patch.object(Trainer, "finish", lambda trainer: trainer.folder),
        patch("safer_fast.training.dry_run.NUM_STEPS", 1),
        patch("safer_fast.training.dry_run.NUM_WARM_UP", 0),
    ):
        yield


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Raise TimeoutError, which no command expects, when the time is over."""

    def ring(*_: Any) -> None:
        raise AssertionError(f"still at work after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_all(cases: Sequence[Case], folder: Path) -> dict[Case, str]:
    """Run the cases; return the faults by case."""
    torch.set_num_threads(1)
    place = folder / "place"
    place.mkdir()
    trials = Place(make_run(folder / "run"), place)
    faults = {}
    for case in tqdm(cases, unit="case", disable=None, file=sys.stdout):
        fault = trials.attempt(case).fault(case)
        if fault is not None:
            faults[case] = fault
            print(f"{case}: {fault}", flush=True)
    return faults


def main() -> None:
    """Print the faults; exit with status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of all cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=COMMANDS)
    asked = parser.parse_args()
    cases = [case for case in all_cases() if asked.command in (None, case.command)]
    cases = random.Random(asked.seed).sample(cases, int(asked.share * len(cases)))
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        faults = try_all(cases, Path(folder))
    counts = Counter(case.command for case in cases)
    print(f"{len(cases)} cases ({dict(counts)}), {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
