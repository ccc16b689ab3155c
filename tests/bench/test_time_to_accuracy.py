"""Seconds to the same accuracy: ours and peers trained in turn; perturbations moved with crops."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import time_to_accuracy
from bench.experiment.steps_table import interval
from bench.studies import warm_start
from bench.studies.warm_start import Crops
from bench.time_table import time_tables, warm_start_table
from tests.support.small_runs import TEST_IMAGES

FLAGS = ["--selection.num_images=32", "--runtime.num_threads=1", "--attack.max_steps=4"]
FLAGS += ["--data.max_images=54", "--batch-size=16", "--evaluation.sentinel_images=0"]
FLAGS += ["--attack.epsilon=0.1"]


@pytest.mark.slow
def test_all_train_from_the_same_start_and_are_judged_alike(
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "rows.jsonl"
    words = ["bench", "--start", str(small_run), "--train", "digits", "--test", str(TEST_IMAGES)]
    words += ["--epochs", "3", "--num-test", "16", "--attacks", "clean,pgd-2,apgd-ce"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(output), *FLAGS])
    time_to_accuracy.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["implementation"] for row in rows] == list(
        time_to_accuracy.IMPLEMENTATIONS.values()
    )
    assert len({row["iterations"] for row in rows[1:]}) == 1  # 10 in every step
    assert 0 < rows[0]["iterations"] < rows[1]["iterations"]
    for row in rows:
        assert row["seconds"] > 0
        assert row["accuracies"]["apgd-ce"] <= row["accuracies"]["clean"]
    # the default weights are nearly untrained, and few steps change few answers
    clean = [row["accuracies"]["clean"] for row in rows]
    assert max(clean) - min(clean) < 0.5
    assert rows[0]["speed_of_ours"] == 1
    assert "ours, PGD-10" in capsys.readouterr().out
    table = time_tables(rows)
    assert "| peers tuned, PGD-10 |" in table


def test_as_few_steps_as_are_not_timed_are_refused(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--start", str(small_run), "--train", "digits", "--test", str(TEST_IMAGES)]
    monkeypatch.setattr(sys, "argv", [*words, "--epochs", "2", *FLAGS])
    with pytest.raises(SystemExit) as caught:
        time_to_accuracy.main()
    assert caught.value.code == 2
    assert "expected more than 8 steps" in capsys.readouterr().err


def test_a_start_that_is_no_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--start", str(tmp_path), "--train", "digits", "--test", str(TEST_IMAGES)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        time_to_accuracy.main()
    assert caught.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("is_on", [True, False])
def test_perturbations_return_to_where_they_were(is_on: bool) -> None:
    images = torch.rand(32, 3, 12, 12)
    crops = Crops(32, is_on, torch.Generator().manual_seed(0))
    moved = crops.apply(images)
    back = crops.undo(moved)
    assert torch.equal(back, images) == (not is_on)
    stayed = back != 0
    assert torch.equal(back[stayed], images[stayed])
    assert torch.equal(crops.apply(back), moved)
    assert stayed.float().mean() > 0.4


@pytest.mark.slow
def test_every_way_to_start_has_a_strength_for_each_epoch_but_the_first(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.jsonl"
    words = ["bench", "--start", str(small_run), "--train", "digits", "--epochs", "3"]
    words += ["--epsilon", "0.1", "--output", str(output), *FLAGS[:-1]]
    monkeypatch.setattr(sys, "argv", words)
    warm_start.main()
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    for name, values in row["strengths"].items():
        assert len(values) == 2, name
        assert all(0.5 < value < 1.5 for value in values), name
    assert "| cold PGD-1, step 1.25 epsilon |" in warm_start_table([row])


def test_intervals_are_those_of_student() -> None:
    assert interval([]) == ""
    assert interval([0.5]) == "+0.5"
    assert interval([1.0, 2.0, 3.0]) == "+2.0 (-0.5 to +4.5)"
