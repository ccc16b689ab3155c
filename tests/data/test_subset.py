"""A limited number of images stands for the whole split: every class in its proportion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safer_fast import evaluate_run, train_model
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import EvaluateConfig
from safer_fast.config.schema import DataConfig, Names
from safer_fast.data import load_data
from safer_fast.data.subset import draw, fixed_order, stratified
from safer_fast.runs.gallery import read_gallery
from safer_fast.runs.loggers.metrics_file import read_metrics

NUM_CLASSES, EACH = 5, 12
NUM_IMAGES = NUM_CLASSES * EACH


@pytest.mark.parametrize("counts", [[50] * 10, [900, 90, 9, 1], [1] * 7, [5]])
def test_every_beginning_holds_the_classes_in_their_proportions(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    order = fixed_order(labels)
    assert sorted(order) == list(range(len(labels)))
    for size in range(1, len(labels) + 1):
        found = np.bincount(labels[order[:size]], minlength=len(counts))
        shares = size * np.array(counts) / len(labels)
        # one of each takes at most as many from the others as there are classes
        assert (np.abs(found - shares) <= len(counts)).all()
        assert np.count_nonzero(found) == min(size, len(counts))
        if len(set(counts)) == 1:
            assert found.max() - found.min() <= 1


def test_images_of_a_class_come_in_the_given_order_and_not_all_from_its_beginning() -> None:
    labels = np.repeat([0, 1], 500)
    order = np.random.default_rng(0).permutation(1000)
    rearranged = stratified(order, labels)
    for label in (0, 1):
        own, expected = (part[labels[part] == label] for part in (rearranged, order))
        assert own.tolist() == expected.tolist()
    assert fixed_order(labels)[:20].std() > 150
    assert fixed_order(labels).tolist() == fixed_order(labels.copy()).tolist()


def test_a_draw_that_holds_every_class_is_left_as_it_is() -> None:
    labels = np.repeat(np.arange(4), 100)
    order = np.random.default_rng(0).permutation(400)
    assert draw(order, labels, 100).tolist() == order[:100].tolist()
    order = np.arange(400)
    assert sorted(labels[draw(order, labels, 4)]) == [0, 1, 2, 3]
    assert len(set(labels[draw(order, labels, 2)])) == 2
    assert np.bincount(labels[draw(order, labels, 40)]).tolist() == [10, 10, 10, 10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images sorted by class, as folders have them."""
    root = tmp_path_factory.mktemp("sorted")
    for split in ("train", "val"):
        for label in range(NUM_CLASSES):
            (root / split / f"c{label}").mkdir(parents=True)
            for number in range(EACH):
                pixels = np.full((8, 8, 3), 40 * label + number, np.uint8)
                Image.fromarray(pixels).save(root / split / f"c{label}" / f"{number:02}.png")
    return root


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_training_images_hold_every_class(folder: Path, seed: int) -> None:
    settings: dict[str, Any] = {"num_workers": 0, "augmentation": "none"}
    config = DataConfig(path=str(folder), max_images=NUM_CLASSES, **settings)
    data = load_data(config, batch_size=5, seed=seed)
    (batch,) = data.train.epoch(1)
    assert sorted(batch.labels.tolist()) == list(range(NUM_CLASSES))
    whole = load_data(DataConfig(path=str(folder), **settings), batch_size=50, seed=seed).train
    for number in range(20):
        (probe,) = whole.probe(NUM_CLASSES, number)
        assert sorted(probe.labels.tolist()) == list(range(NUM_CLASSES))


FLAGS = [
    "--model.name=vit_tiny_patch16_224",
    "--model.patch_size=4",
    "--model.arguments={depth: 1, embed_dim: 16, num_heads: 2}",
    "--batch-size=20",
    "--epochs=1",
    "--attack.steps=1",
    "--selection.num_images=5",
    "--evaluation.max_images=10",
    "--evaluation.steps=1",
    "--evaluation.attacks=clean",
    "--evaluation.sentinel_images=5",
    "--data.num_workers=0",
    "--runtime.attention=math",
]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("limited") / "run"
    return train_model(parse_config([*FLAGS, f"--data.path={folder}", f"--output={output}"]))


def test_training_says_what_part_of_the_validation_split_it_looks_at(run: Path) -> None:
    events = {event["event"]: event for event in read_metrics(run / "metrics.jsonl")}
    assert events["run"]["validation"] == "10 of 60 images, stratified by class"
    assert events["epoch"]["validation_images"] == 10
    assert events["epoch"]["of_validation_images"] == NUM_IMAGES
    assert (events["evaluation"]["num_images"], events["evaluation"]["of_images"]) == (60, 60)


def test_the_gallery_shows_every_class(run: Path) -> None:
    gallery, _ = read_gallery(run / "gallery.safetensors")
    assert set(gallery.labels.tolist()) == set(range(NUM_CLASSES))


def test_an_evaluation_of_some_images_sees_every_class_and_goes_on_to_more(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(num_images: int | None) -> dict[str, Any]:
        attacks = Names(["clean", "pgd-1"])
        evaluate_run(
            EvaluateConfig(run=str(run), attacks=attacks, batch_size=10, num_images=num_images)
        )
        *_, row = read_metrics(run / "metrics.jsonl")
        return row

    row = measured(10)
    assert "validation: 10 of 60 images, stratified by class" in capsys.readouterr().out
    assert all(share is not None for share in row["per_class_accuracy"])
    assert (row["num_images"], row["of_images"]) == (10, 60)
    assert measured(30)["num_images"] == 30
    stored = [
        len(json.loads(line).get("right", ""))
        for file in (run / "evaluation").iterdir()
        for line in file.read_text().splitlines()
    ]
    assert sum(stored) == 2 * 30  # those measured first are not measured again
    row = measured(None)
    assert (row["num_images"], row["of_images"]) == (60, 60)
    assert "stratified" not in capsys.readouterr().out.rpartition("30 of 60")[2]
