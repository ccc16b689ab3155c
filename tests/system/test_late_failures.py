"""Nothing is found out after the last epoch that could be known before, or that costs a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safer_fast.config.command_line import parse_config
from safer_fast.runs.folder import create_run_folder
from safer_fast.runs.gallery import Gallery, write_gallery
from safer_fast.runs.layout import GALLERY
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.train import main
from safer_fast.training.trainer import Trainer
from tests.support.reports import with_reports

FLAGS = [
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 8, num_heads: 1}",
    "--model.patch_size=260",
    "--batch-size=4",
    "--epochs=1",
    "--attack.steps=1",
    "--selection.num_images=4",
    "--evaluation.attacks=clean",
    "--evaluation.steps=1",
    "--evaluation.max_images=2",
    "--evaluation.sentinel_images=0",
    "--data.augmentation=none",
    "--runtime.attention=math",
    "--runtime.num_threads=1",
]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\rb", "a\u2028b"])
def test_a_folder_whose_name_steers_a_terminal_is_refused_before_it_is_made(
    name: str, tmp_path: Path
) -> None:
    refusal = r"^--output: .*without (line breaks and )?control characters"
    for resume in ("never", "auto"):
        with pytest.raises(ValueError, match=refusal):
            main([f"--output={tmp_path / name}", f"--resume={resume}"])
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_the_data_does_not_steer_a_terminal_as_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = create_run_folder(parse_config([]), "a\nb\x1b")
    assert folder.name.endswith("-a?b?")
    assert folder.is_dir()


def test_images_too_large_for_a_gallery_cost_the_gallery_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.zeros((10, 1040, 1040, 1), np.uint8)
    images[::2] = 200
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(10) % 2)
    output = tmp_path / "run"
    with with_reports():
        main([*FLAGS, f"--data.path={tmp_path / 'set.npz'}", f"--output={output}"])
    said = capsys.readouterr().out
    assert "the gallery is left as it is: expected what a gallery can hold, got images" in said
    assert [event["event"] for event in read_metrics(output / "metrics.jsonl")][-1] == "end"
    assert (output / "report.html").is_file()
    assert not (output / GALLERY).exists()


def test_a_report_that_cannot_be_written_does_not_end_a_run_with_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(10) % 2)
    output, end_epoch = tmp_path / "run", Trainer.end_epoch

    def in_the_way(trainer: Trainer, *arguments: Any) -> None:
        end_epoch(trainer, *arguments)
        (output / "report.html").mkdir()

    flags = [*FLAGS, "--model.patch_size=4", f"--data.path={tmp_path / 'set.npz'}"]
    with pytest.MonkeyPatch.context() as patch, with_reports():
        patch.setattr(Trainer, "end_epoch", in_the_way)
        main([*flags, f"--output={output}"])
    assert "report: none (" in capsys.readouterr().out
    assert [event["event"] for event in read_metrics(output / "metrics.jsonl")][-1] == "end"


@pytest.mark.parametrize(
    ("classes", "confidence", "problem"),
    [(100_001, 0.5, "class_names"), (2, float("nan"), "confidence_before outside of 0 to 1")],
)
def test_what_a_reader_would_refuse_is_not_written(
    classes: int, confidence: float, problem: str, tmp_path: Path
) -> None:
    images, labels = torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64)
    shares = torch.tensor([confidence])
    gallery = Gallery(images, images, labels, labels, labels, shares, shares)
    facts = {"attack": "pgd-1", "epsilon": 0.1, "weights": "last", "split": "test"}
    with pytest.raises(ValueError, match=f"^expected what a gallery can hold, got {problem}"):
        write_gallery(gallery, tmp_path / GALLERY, class_names=["c"] * classes, **facts)
    assert list(tmp_path.iterdir()) == []
