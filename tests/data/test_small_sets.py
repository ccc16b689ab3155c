"""Sets of few images and few classes: trained as far as that makes sense, through the command."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime.command import run
from safer_fast.train import main
from tests.support.small_runs import TINY


def write_npz(file: Path, num_images: int, num_classes: int = 2) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (num_images, 8, 8, 3), dtype=np.uint8)
    np.savez(file, images=images, labels=np.arange(num_images) % num_classes)
    return file


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that training ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *flags])
        with pytest.raises(SystemExit) as ending:
            run(main)
    out, err = capsys.readouterr()
    assert (ending.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_fewer_images_than_a_batch_are_trained_as_one_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_npz(tmp_path / "a.npz", 12)
    flags = [*TINY, f"--data.path={file}", f"--output={tmp_path / 'run'}", "--batch-size=64"]
    main([*flags, "--data.validation_fraction=0.25"])
    out = capsys.readouterr().out
    assert "note:       batch_size: all 9 training images are one batch, not 64\n" in out
    assert "1 batches of 9" in out
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (epoch,) = (event for event in events if event["event"] == "epoch")
    assert epoch["step"] == 1
    assert np.isfinite(epoch["train_loss"])
