"""An image whose logits are not finite is never right, wherever answers are counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nan, nn

from safer_fast import train_model
from safer_fast.attacks.correctness import has_finite, is_right
from safer_fast.attacks.pgd import pgd
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.command_line import parse_config
from safer_fast.evaluate import main
from safer_fast.evaluation.overfitting import count_right
from safer_fast.export import main as export
from safer_fast.runs.gallery import NO_CLASS, make_gallery, read_gallery, write_gallery
from safer_fast.runs.layout import GALLERY
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runs.report.page import write_report
from safer_fast.training.objectives import Targets
from tests.support.networks import build, images_and_labels
from tests.support.reports import with_reports

FLAGS = [
    "--data.path=digits",
    "--data.max_images=64",
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 16, num_heads: 2}",
    "--model.patch_size=4",
    "--epochs=1",
    "--selection.warmup_epochs=0",
    "--attack.steps=1",
    "--evaluation.steps=1",
    "--evaluation.attacks=clean",
    "--evaluation.max_images=16",
    "--runtime.device=cpu",
    "--runtime.num_threads=1",
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model gives a NaN for class 3 whatever it sees."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("broken") / "run"
    train_model(parse_config([*FLAGS, "--output", str(folder)]))
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"][3] = nan
    save_file(weights, folder / "model.safetensors")
    return folder


def test_rows_that_are_not_finite_are_never_right() -> None:
    logits = torch.tensor([[nan, 0], [0, nan], [1, 0], [torch.inf, 0], [0, -torch.inf], [0, 1]])
    labels = torch.tensor([0, 1, 0, 0, 0, 1])
    assert is_right(logits, labels).tolist() == [False, False, True, False, False, True]
    assert has_finite(logits).tolist() == [False, False, True, False, False, True]
    soft = nn.functional.one_hot(labels, 2).float()
    assert torch.equal(is_right(logits, soft), is_right(logits, labels))
    assert int(Targets.alike(labels).num_right(logits)) == 2


def test_an_evaluation_counts_and_says_what_is_not_finite(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(broken, tmp_path / "run")
    names = ["clean", "fgsm", "pgd-2", "cw-2", "apgd-ce"]
    main([str(folder), "--attacks", ",".join(names), "--num-images=60", "--device=cpu"])
    said = capsys.readouterr().out
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "per_class_accuracy" in row]
    assert [row["attack"] for row in rows] == names
    for row in rows:
        assert (row["accuracy"], row["num_images"], row["num_not_finite"]) == (0, 60, 60)
        line = f"last, test, {row['attack']}: the logits of 60 of 60 images are not finite"
        assert line in said
    page = write_report([folder]).read_text()
    assert page.count("logits not finite on 60 images") >= len(names)
    export([str(folder), "--format=hub"])
    assert "the logits of 60 images are not finite" in (folder / "export-hub/README.md").read_text()


def test_a_training_on_nan_says_so_and_has_its_report(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, start = tmp_path / "run", broken / "model.safetensors"
    flags = [f"--output={folder}", f"--model.checkpoint={start}", "--selection.criterion=random"]
    with with_reports():
        train_model(parse_config([*FLAGS, *flags]))
    said = capsys.readouterr().out
    assert "LOGITS NOT FINITE on 16 validation images" in said
    assert "last, test, clean: the logits of 797 of 797 images are not finite" in said
    events = read_metrics(folder / "metrics.jsonl")
    (epoch,) = (event for event in events if event["event"] == "epoch")
    assert (epoch["num_not_finite"], epoch["robust_accuracy"]) == (16, 0)
    final = [event for event in events if event["event"] == "evaluation"][-1]
    assert (final["num_not_finite"], final["accuracy"]) == (final["num_images"], 0)
    config = json.loads((folder / "config.json").read_text())
    assert config["safer_fast"]["accuracies"][-1]["num_not_finite"] == final["num_images"]
    assert "no class (logits not finite)" in (folder / "report.html").read_text()


def test_a_gallery_shows_no_class_where_there_is_none(tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        model.network.head.bias[0] = nan  # type: ignore[union-attr, index]
    images, labels = images_and_labels(4)
    gallery = make_gallery(model, images, labels, images)
    assert gallery.predicted_before.tolist() == [NO_CLASS] * 4
    facts = {"attack": "pgd-1", "epsilon": 0.1, "weights": "last", "split": "test"}
    write_gallery(gallery, tmp_path / GALLERY, class_names=list("abcdefghij"), **facts)
    assert torch.equal(read_gallery(tmp_path / GALLERY)[0].predicted_after, gallery.predicted_after)


def test_the_sentinel_and_the_attack_of_training_count_nothing_right() -> None:
    model = build()
    with torch.no_grad():
        model.network.head.bias[0] = nan  # type: ignore[union-attr, index]
    images, _ = images_and_labels(4)
    labels = torch.zeros(4, dtype=torch.int64)
    ball = {"epsilon": 0.03, "step_size": 0.03}
    assert count_right(model, images, labels, steps=1, start=images, **ball).tolist() == [0, 0]
    attack = ReplayedAttack(model, steps=1)
    attack(images, labels, torch.tensor(0.03), torch.tensor(0.03))
    assert attack.hits.tolist() == [0, 4]
    attacked = pgd(model, images, labels, steps=1, **ball)
    assert attacked.isnan().all()  # a training step shows it and is skipped
