"""A folder that an earlier version wrote: its run is resumed, and every command reads it.

`old_run/` was written by safer_fast 0.1.0 on two threads and stopped after 110 of 140 steps;
`expected.safetensors` are the weights that the same version ended with where nobody stopped it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from safer_fast.runs.loggers.metrics_file import read_metrics
from tests.support.kills import Server

OLD_RUN = Path(__file__).parent / "old_run"
EXPECTED = "expected.safetensors"
STOPPED_AT, LAST_STEP = 110, 140
# as many as wrote it; on a busy machine they would wait for each other without end if they span
TWO_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def resumed(once: Any) -> Path:
    """The old run, trained to its end by `python -m safer_fast.train`."""

    def resume(folder: Path) -> None:
        shutil.copytree(OLD_RUN, folder, ignore=shutil.ignore_patterns(EXPECTED))
        flags = ["--config", str(folder / "run.yaml"), "--output", str(folder), "--resume=must"]
        ended = subprocess.run(
            [sys.executable, "-m", "safer_fast.train", *flags],
            env=os.environ | TWO_THREADS,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout

    return Path(once("old-run", resume))


@pytest.fixture
def run(resumed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(resumed, tmp_path / "run")


def test_an_old_run_is_resumed_to_the_weights_it_would_have_had(resumed: Path) -> None:
    lines = read_metrics(resumed / "metrics.jsonl")
    old = read_metrics(OLD_RUN / "metrics.jsonl")
    assert lines[: len(old)] == old
    new = lines[len(old) :]
    steps = [line["step"] for line in new if line["event"] == "step"]
    assert min(steps) > STOPPED_AT
    assert max(steps) == LAST_STEP
    weights, expected = load_file(resumed / "model.safetensors"), load_file(OLD_RUN / EXPECTED)
    assert list(weights) == list(expected)
    # nothing differs where they were written; another processor sums in another order
    before = load_file(OLD_RUN / "best.safetensors")
    changed = distance(expected, before)
    assert changed > 0
    assert distance(weights, expected) < 0.05 * changed


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights."""
    squares = [(first[name] - second[name]).double().square().sum() for name in first]
    return float(torch.stack(squares).sum().sqrt())


def test_an_old_run_is_evaluated(run: Path, server: Server) -> None:
    flags = ["--attacks=clean,pgd-2", "--device=cpu"]
    ending = server.command("evaluate", run, *flags)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    lines = read_metrics(run / "metrics.jsonl")
    figures = [line for line in lines if line["event"] == "evaluation"]
    trained, measured = figures[:-2], figures[-2:]
    assert [line["attack"] for line in measured] == ["clean", "pgd-2"]
    last = [line for line in trained if (line["weights"], line["attack"]) == ("last", "clean")]
    assert measured[0]["accuracy"] == last[-1]["accuracy"]


def test_layers_of_an_old_run_are_selected(run: Path, server: Server) -> None:
    ending = server.command("select", run, "--num-images=40", "--device=cpu")
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert (run / "selection.json").is_file()


def test_an_old_run_is_exported_to_timm(run: Path, server: Server) -> None:
    ending = server.command("export", run, "--format=timm")
    assert (ending.status, ending.errors) == (0, ""), ending.output
    exported = run / "export-timm"
    assert exported.is_dir()
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    trained = load_file(run / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], trained[name]) for name in trained)


def test_an_old_run_is_reported(run: Path, server: Server) -> None:
    ending = server.command("report", run)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert "<svg" in (run / "report.html").read_text()
