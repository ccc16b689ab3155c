"""Steps, audits and evaluations on a GPU that is not there are captured, and wait for nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safer_fast.training.step import RECORDED
from tests.support.captured_runs import (
    AUDIT_EVERY,
    EVALUATION_STEPS,
    MOST_STEPS,
    STEPS_PER_EPOCH,
)
from tests.support.captured_runs import CASES as RUNS
from tests.support.captured_steps import MEMORY, SETTINGS
from tests.support.fake_gpu import build, run, why_not
from tests.support.networks import FAMILIES
from tests.support.rehearsal import rehearse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first to ask takes the steps of all
    pytest.mark.skipif(why_not() is not None, reason=f"no fake GPU: {why_not()}"),
]
CASES = (*FAMILIES, *SETTINGS)
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(once: Callable[..., Path]) -> Results:
    """What happened in each case; one process takes the steps of them all, once for the session."""
    library = once("fake-gpu", build)

    def take_steps(folder: Path) -> None:
        folder.mkdir()
        images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / "train.npz", images=images, labels=np.arange(16) % 2)
        # those that fill the memory come first: nothing of others is in it
        words = (str(folder / "train.npz"), *MEMORY, *CASES)
        lines = run(library, "tests.support.captured_steps", *words)
        (folder / "lines.json").write_text(json.dumps(lines))

    lines = json.loads((once("captured-steps", take_steps) / "lines.json").read_text())
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_all_phases_are_captured_and_a_replayed_step_neither_waits_nor_allocates(
    case: str, results: Results
) -> None:
    result = results[case]
    teacher = ["teacher"] if case.startswith("fare") else []
    assert result["recorded"] == sorted({"attack", *RECORDED, *teacher})
    assert result["refused"] == []
    assert result["violations"] == 0, result["last_violation"]
    last, before = result["steps"]
    assert last == before
    for name in ("waits", "copies_in", "copies_out", "allocations"):
        assert last[name] == 0, name
    # three iterations of the attack, for both halves in micro-batches; two passes, ascent, update;
    # Auto-PGD begins with a gradient of the start
    own = 10 if case == "micro-batches" else 7 + case.startswith("apgd")
    assert last["graph_launches"] == own + len(teacher)
    assert last["launches"] < 100


def test_for_each_size_of_images_phases_are_captured_once_and_those_of_the_last_size_freed(
    results: Results,
) -> None:
    assert results["growing images"]["num_recorded"] == [1 + len(RECORDED)] * 2


@pytest.mark.parametrize(("case", "num_images"), list(zip(MEMORY, (256, 512, 1024), strict=True)))
def test_parts_of_a_batch_are_as_large_as_memory_allows_also_beside_captured_graphs(
    case: str, num_images: int, results: Results
) -> None:
    result = results[case]
    assert (result["attacked"], result["trained"]) == (num_images, num_images)
    assert result["recorded"] == sorted({"attack", *RECORDED})
    assert 0.8 * MEMORY[case] < result["peak_gib"] <= MEMORY[case]


def test_on_a_gpu_the_attack_is_in_bf16_unless_the_run_is_not(results: Results) -> None:
    for case in CASES:
        expected = "amp" if case == "fp32" else "fp8" if "fp8" in case else "bf16"
        assert results[case]["precision"] == expected, case


@pytest.fixture(scope="module")
def runs(once: Callable[..., Path]) -> Results:
    """What happened in whole runs, one after the other in one process, once for the session."""
    library = once("fake-gpu", build)

    def train(folder: Path) -> None:
        folder.mkdir()
        lines = run(library, "tests.support.captured_runs", str(folder), *RUNS)
        (folder / "lines.json").write_text(json.dumps(lines))

    lines = json.loads((once("captured-runs", train) / "lines.json").read_text())
    assert all(line["violations"] == 0 for line in lines), lines[-1]["last_violation"]
    return {line["case"]: line for line in lines}


def test_with_attack_steps_auto_the_same_recordings_are_replayed_for_any_number(
    runs: Results,
) -> None:
    recorded = runs["run"]["recorded"]
    assert recorded.count("attack") == 1
    assert recorded.count("audit") == 4  # of both precisions, for audits of each and of K
    selections = 2  # everything in the warm-up, then layers
    assert recorded.count("first pass") == recorded.count("update") == selections
    replayed = runs["run"]["steps"][14:]
    chosen = [step["attack_steps"] for step in replayed]
    assert len(set(chosen)) > 3
    assert max(chosen) < MOST_STEPS
    assert [bool(step["audits"]) for step in replayed] == [
        number % AUDIT_EVERY == 0 for number in range(14, 14 + len(replayed))
    ]
    for number, step in enumerate(replayed, 14):
        if step["audits"]:
            assert step["waits"] > 0
            assert step["graph_launches"] > 20 + step["attack_steps"]
        else:
            for name in ("waits", "copies_in", "copies_out"):
                assert step[name] == 0, name
            # what is cached is given back after an epoch, to be counted
            assert step["allocations"] == 0 or number % STEPS_PER_EPOCH < 2
            assert step["graph_launches"] == step["attack_steps"] + 4
            assert step["launches"] < 100


def test_an_iteration_of_an_evaluation_in_training_is_one_launch_and_waits_for_nothing(
    runs: Results,
) -> None:
    replays = runs["run"]["replays"]
    assert replays
    for counts in replays:
        assert counts.pop("graph_launches") == 1
        assert not any(counts.values()), counts
    named: dict[str, list[dict[str, Any]]] = {}
    for evaluation in runs["run"]["evaluations"]:
        named.setdefault(evaluation["name"], []).append(evaluation)
    for evaluation in named["on_validation"]:
        clean, first, *_, last = evaluation["batches"]
        assert (clean["waits"], first["recordings"], last["recordings"]) == (0, 1, 0)
        assert last["graph_launches"] == EVALUATION_STEPS
        assert last["waits"] == last["copies_out"] == last["allocations"] == 0
    for evaluation in named["final_accuracies"]:
        for batch in evaluation["batches"]:  # how many images are right is read from the device
            assert batch["copies_out"] == (batch["attack"] != "clean")
            assert batch["waits"] == batch["copies_out"] + batch["recordings"]
    for evaluation in named["attack_gap"]:  # two batches; three iterations as written, one recorded
        assert evaluation["num_replays"] == 2 * (evaluation["attack_steps"] + 20) - 4


@pytest.mark.parametrize("case", RUNS)
def test_evaluations_leave_the_recordings_and_the_memory_of_training_alone(
    case: str, runs: Results
) -> None:
    evaluations = runs[case]["evaluations"]
    assert len(evaluations) >= 4
    for evaluation in evaluations:
        assert {"attack", "first pass", "update"} <= set(evaluation["recorded_before"])
        assert evaluation["keeps_recordings"]
        assert evaluation["memory_kept"] <= 0
    lines = runs[case]["lines"]
    assert any("do not fit in memory" in line for line in lines) == (case == "memory"), lines


def test_the_script_for_a_machine_with_a_gpu_rehearses_all_its_parts(
    once: Callable[..., Path], tmp_path: Path
) -> None:
    result = rehearse(once("fake-gpu", build), tmp_path)
    assert result.returncode == 0, result.stderr
    parts = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    failed = [part for part in parts if " exit 0, " not in part and " skipped: no " not in part]
    assert not failed, result.stdout
    names = [part.split()[0] for part in parts]
    assert len(names) > 20
    assert not any(name.endswith("-again") for name in names), names
    lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    measured = {str(row["what"]) for row in rows}
    assert {"attack", "step", "peers", "float8", "attention"} < measured
    assert all(row["captured"] for row in rows if row["what"] in ("step", "peers"))
