"""Splits that hold the training images again are said; classes of other data go by name."""

import json
from pathlib import Path

import pytest
import torch

from safer_fast import Config, evaluate, train, train_model
from safer_fast.config.command_line import parse_config
from tests.support.pictures import encode, photo
from tests.support.sets import write_parquet
from tests.support.small_runs import FEW_IMAGES

PNGS = [encode(photo(8, 8, seed), "png") for seed in range(20)]
LINE = "the {} split holds the training images; accuracies on it say nothing about others"


def pictures(file: Path, names: list[str], rows: slice = slice(0, 12)) -> Path:
    """A file of pictures whose class is that of their row in a, b, c, numbered as in `names`."""
    labels = [names.index("abc"[row % 3]) for row in range(20)]
    return write_parquet(file, PNGS[rows], labels[rows], names)


@pytest.mark.slow
def test_the_same_images_for_training_and_validation_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pictures(tmp_path / "some.parquet", ["a", "b", "c"])
    copy = pictures(tmp_path / "copy.parquet", ["a", "b", "c"])
    other = pictures(tmp_path / "other.parquet", ["a", "b", "c"], slice(3, 15))
    flags = [*FEW_IMAGES, f"--data.path={file}", "--runtime.device=cpu"]
    for path, is_same in ((file, True), (copy, True), (other, False)):
        train.main([*flags, f"--data.validation_path={path}", "--dry-run"])
        said = capsys.readouterr().out
        assert (f"data.validation_path: {LINE.format('validation')}" in said) == is_same
    images, labels = torch.rand(12, 8, 8), torch.arange(12) % 3
    config = Config(**vars(parse_config([*FEW_IMAGES, f"--output={tmp_path / 'run'}"])))
    train_model(config, data={"train": (images, labels), "val": (images, labels)})
    assert f"data['validation']: {LINE.format('validation')}" in capsys.readouterr().out


def test_other_data_may_number_the_classes_in_another_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pictures(tmp_path / "some.parquet", ["a", "b", "c"])
    run = tmp_path / "run"
    train.main([*FEW_IMAGES, f"--data.path={file}", f"--output={run}", "--runtime.device=cpu"])
    rows = []
    for name, order in (("same", ["a", "b", "c"]), ("turned", ["c", "a", "b"])):
        path = pictures(tmp_path / f"{name}.parquet", order, slice(0, 20))
        evaluate.main([str(run), f"--path={path}", "--attacks=clean", "--fresh"])
        rows.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]))
    capsys.readouterr()
    assert rows[0]["split"] == "same"
    for name in ("accuracy", "loss", "per_class_accuracy"):
        assert rows[0][name] == pytest.approx(rows[1][name], nan_ok=True), name
