"""Paired comparison of two runs, from the outcomes that evaluations have stored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.studies.paired import Difference, main, outcomes
from safer_fast import evaluate_run
from tests.support import small_runs


def test_the_difference_is_that_of_the_accuracies(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    other = small_runs.run(tmp_path / "other", "--seed=1")
    shares = [
        evaluate_run(str(folder), attacks="pgd-2", num_images=60)[0].accuracy
        for folder in (run, other)
    ]
    assert sum(outcomes(run, "pgd-2").values()) == round(60 * shares[0])
    capsys.readouterr()
    main([str(run), str(other), "--attacks", "pgd-2"])
    line = capsys.readouterr().out
    assert line.startswith(f"pgd-2: {100 * (shares[0] - shares[1]):+.2f} ± ")
    with pytest.raises(SystemExit, match="expected one evaluation under cw-2, got none"):
        main([str(run), str(other), "--attacks", "cw-2"])
    evaluate_run(str(run), attacks="pgd-2", num_images=60, epsilon=0.2)
    with pytest.raises(SystemExit, match="got 2 of other balls or restarts"):
        main([str(run), str(other), "--attacks", "pgd-2"])


def test_the_interval_is_that_of_the_images_which_differ() -> None:
    mean, half = Difference(1000, 12, 20).points()
    assert mean == pytest.approx(-0.8)
    assert half == pytest.approx(1.96 * 100 * ((0.032 - 0.008**2) / 1000) ** 0.5, rel=1e-4)
    assert Difference(10, 0, 0).points() == (0, 0)
