"""No value of any flag ends a command in anything but success or one line that names the flag."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.system.hostile import COMMANDS, FAST, Case, Outcome, Place, all_cases, flags_of, make_run

SEED = 0
FOUND = [
    ("select", "--epsilon", "1e308"),
    ("select", "--steps", "9223372036854775808"),
    ("evaluate", "--epsilon", "1e308"),
    ("evaluate", "--num-images", "9223372036854775807"),
    ("train", "--model.patch_size", "null"),
    ("train", "--model.patch_size", "~"),
    ("train", "--attack.step_size", "inf"),
    ("train", "--optim.learning_rate", "9000000000000000000.5"),
    ("train", "--optim.weight_decay", "9000000000000000000.5"),
    ("train", "--data.mixup", "9000000000000000000.5"),
    ("train", "--objective.beta", "9000000000000000000.5"),
    ("train", "--selection.num_images", "9223372036854775807"),
    ("train", "--seed", "9" * 5000),
    ("train", "--optim.learning_rate", "9" * 400),
    ("train", "--model.arguments", "{depth:4}"),
    ("train", "--output", "x" * 5000),
    ("train", "--epochs", "null"),
    ("doctor", "--data.random_erasing", "9" * 400),
]
PROCESSES = [
    ("train", "--optim.lr", "1"),
    ("train", "--data.path", "\udc80"),
    ("evaluate", "--epsilon", "\u202e8/255"),
    ("select", "--steps", "9" * 400),
    ("report", "", "x" * 5000),
    ("export", "--format", "{a: b"),
    ("doctor", "--batch-size", "inf"),
]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Place:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("place")
    return Place(make_run(tmp_path_factory.mktemp("runs") / "run"), place)


def sample() -> list[Case]:
    """One case for each flag of each command."""
    draw = random.Random(SEED)
    cases = all_cases()
    flags = dict.fromkeys((case.command, case.flag) for case in cases)
    return [draw.choice([c for c in cases if (c.command, c.flag) == flag]) for flag in flags]


def test_every_flag_stands_a_hostile_value(trials: Place) -> None:
    faults = {str(case): trials.attempt(case).fault(case) for case in sample()}
    assert {case: fault for case, fault in faults.items() if fault is not None} == {}


@pytest.mark.parametrize("found", FOUND, ids=lambda found: " ".join(found)[:60])
def test_values_that_once_passed_or_ended_in_tracebacks_are_refused(
    found: tuple[str, str, str], trials: Place
) -> None:
    case = Case(*found)
    outcome = trials.attempt(case)
    assert outcome.fault(case) is None
    assert outcome.status == 2


@pytest.mark.parametrize("words", PROCESSES, ids=lambda words: " ".join(words)[:40].strip())
def test_a_process_of_its_own_ends_with_one_line(
    words: tuple[str, str, str], trials: Place, tmp_path: Path
) -> None:
    case = Case(*words)
    process = subprocess.run(
        [sys.executable, "-m", f"safer_fast.{case.command}", *trials.arguments(case)],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=200,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert process.returncode == 2
    assert Outcome(2, process.stderr, "", 0.0).fault(case) is None
    assert list(tmp_path.iterdir()) == []


def test_flags_are_those_of_the_parsers_and_what_makes_trials_quick_is_taken(trials: Place) -> None:
    assert len(flags_of("train")) > 90
    assert {"--attack.step_size", "--batch-size", "--model.arguments"} <= set(flags_of("train"))
    assert "--epsilon" in flags_of("evaluate")
    for command in COMMANDS:
        case = Case(command, "--json" if command == "doctor" else "--output", f"made-{command}")
        if command in ("evaluate", "doctor"):
            case = Case(command, "--batch-size", "4")
        outcome = trials.attempt(case)
        assert (outcome.status, outcome.trace) == (0, ""), (command, outcome.errors)


def test_what_is_wrong_with_an_end_is_noticed() -> None:
    case = Case("train", "--epochs", "x")
    good = "error: --epochs: expected a whole number, got x\n"
    assert Outcome(2, good, "", 1.0).fault(case) is None
    assert Outcome(0, "", "", 1.0).fault(case) is None
    for outcome in (
        Outcome(1, good, "", 1.0),
        Outcome(2, good * 2, "", 1.0),
        Outcome(2, good, "Traceback", 1.0),
        Outcome(2, good, "", 100.0),
        Outcome(2, "error: something\n", "", 1.0),
        Outcome(2, good.replace("x", "x" * 2000), "", 1.0),
    ):
        assert outcome.fault(case) is not None
    assert FAST[0] == "--epochs=1"
