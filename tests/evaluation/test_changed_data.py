"""Data that changed since a run was trained are refused, where they decide what is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safer_fast import evaluate, select, train_model
from safer_fast.config.command_line import parse_config
from safer_fast.models.weights_file import MODEL_CONFIG
from tests.support.small_runs import TINY

LITTLE = [
    *TINY,
    "--batch-size=8",
    "--evaluation.attacks=clean",
    "--evaluation.sentinel_images=0",
    "--data.num_workers=0",
]
CHANGED = r"^--(data\.)?path: expected the data that the run was trained on, got "


def pictures(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, one folder of pictures for each class, and the `run` on it."""
    place = tmp_path_factory.mktemp("changed")
    for seed, name in enumerate(("ant", "bee", "cat")):
        pictures(place / "data" / name, 8, seed)
    words = [f"--data.path={place / 'data'}", f"--output={place / 'run'}", *LITTLE]
    train_model(parse_config(words))
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy whose run looks for its data in the copy."""
    shutil.copytree(trained, tmp_path / "copy")
    settings = tmp_path / "copy" / "run" / "run.yaml"
    settings.write_text(settings.read_text().replace(str(trained), str(tmp_path / "copy")))
    return tmp_path / "copy"


def commands(place: Path) -> list[Callable[[], None]]:
    run = str(place / "run")
    images = ["--num-images=4", "--steps=1", f"--output={place / 'selection'}"]
    return [
        lambda: evaluate.main([run, "--attacks=clean", "--device=cpu"]),
        lambda: select.main([run, "--device=cpu", *images]),
    ]


def rename(data: Path) -> None:
    (data / "bee").rename(data / "dog")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a new image": (lambda data: pictures(data / "ant", 9), "data of which other images are cut"),
    "a lost image": (lambda data: (data / "cat" / "3.png").unlink(), "data of which other images"),
    "a new class": (lambda data: pictures(data / "dog", 8), "other classes: 'dog' is new$"),
    "a lost class": (lambda data: shutil.rmtree(data / "ant"), "other classes: 'ant' is gone$"),
    "a renamed class": (rename, "other classes: 'bee' is gone$"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_are_refused(change: str, place: Path) -> None:
    make, message = CHANGES[change]
    make(place / "data")
    for command in commands(place):
        with pytest.raises(ValueError, match=CHANGED + message):
            command()


def test_what_is_the_same_is_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(place):
        command()
    (place / "data").rename(place / "moved")
    settings = place / "run" / "run.yaml"
    settings.write_text(settings.read_text().replace(str(place / "data"), str(place / "moved")))
    for command in commands(place):
        command()
    assert "clean" in capsys.readouterr().out


def test_a_run_that_did_not_write_its_rows_is_evaluated(place: Path) -> None:
    file = place / "run" / MODEL_CONFIG
    content = json.loads(file.read_text())
    del content["safer_fast"]["validation_rows"]
    file.write_text(json.dumps(content))
    pictures(place / "data" / "ant", 9)
    commands(place)[0]()


def test_training_images_do_not_matter_to_a_split_of_its_own(tmp_path: Path) -> None:
    for seed, name in enumerate(("train/ant", "train/bee", "test/ant", "test/bee")):
        pictures(tmp_path / "data" / name, 8, seed)
    words = [f"--data.path={tmp_path / 'data'}", f"--output={tmp_path / 'run'}", *LITTLE]
    train_model(parse_config(words))
    pictures(tmp_path / "data" / "train" / "ant", 9)
    evaluating, selecting = commands(tmp_path)
    evaluating()
    with pytest.raises(ValueError, match=CHANGED + "data of which other images"):
        selecting()
    pictures(tmp_path / "data" / "train" / "cow", 8)
    with pytest.raises(ValueError, match="in place of cow"):
        evaluating()
