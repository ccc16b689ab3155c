"""Datasets of Hugging Face by path: of the hub, and saved to disk; through the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

from safer_fast import evaluate, export, train
from safer_fast.data.formats import SkippedFiles, open_splits
from tests.support.commands import refused
from tests.support.given import LABELS, NAMES, PIXELS, hugging_face
from tests.support.small_runs import TINY


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three splits, one of them without labels, and one whose name says nothing."""
    rows = hugging_face()
    parts = {"train": rows.select(range(120)), "valid": rows.select(range(120, 160))}
    blind = rows.select(range(4)).map(lambda row: {"label": -1})
    folder = tmp_path_factory.mktemp("hf") / "saved"
    splits = parts | {"test": blind, "unsupervised": blind}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def test_saved_splits_are_those_with_names_and_labels(saved: Path) -> None:
    skipped = SkippedFiles()
    splits = open_splits(str(saved), "data.path", skipped=skipped)
    assert {name: len(source) for name, source in splits.items()} == {
        "train": 120,
        "validation": 40,
    }
    assert splits["train"].class_names == NAMES
    assert np.array_equal(splits["train"].labels, LABELS[:120])
    assert np.array_equal(np.asarray(splits["validation"].read(3).convert("L")), PIXELS[123])
    assert skipped.lines() == [f"data: passed over 2 files, such as {saved}/test"]


def test_one_saved_dataset_is_all_data(tmp_path: Path) -> None:
    hugging_face().save_to_disk(str(tmp_path / "one"))
    (split,) = open_splits(str(tmp_path / "one"), "data.path")
    assert split == "all"


@pytest.mark.slow
def test_a_run_on_a_saved_dataset_resumes_and_is_evaluated(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*TINY, "--data.path", str(saved), "--epochs=2"]
    train.main([*words, f"--output={run}"])
    moved = tmp_path / "moved"
    shutil.copytree(saved, moved)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "120 training, 40 validation, 0 test images" in events[0]["data"]
    # as a run that was killed before it could write its end, on a copy of the data
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    train.main([*TINY, "--data.path", str(moved), "--epochs=2", f"--output={run}", "--resume=auto"])
    assert (run / "model.safetensors").read_bytes() == weights
    evaluate.main([str(run), "--attacks=clean", "--fresh"])
    assert "clean" in capsys.readouterr().out


def test_datasets_of_the_hub_are_loaded_by_name_or_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def load(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        if name != "owner/digits":
            raise ConnectionError("no network\nand a second line")
        return datasets.DatasetDict({"train": hugging_face(), "test": hugging_face()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert set(open_splits("hf:owner/digits", "data.path")) == {"train", "test"}
    assert set(open_splits("hf:owner/digits:small", "data.path")) == {"train", "test"}
    assert asked == [("owner/digits", None), ("owner/digits", "small")]
    capsys.readouterr()  # bars of the library
    line = refused(train.main, ["--data.path=hf:nobody/none", f"--output={tmp_path / 'r'}"], capsys)
    assert "data.path" in line
    assert "got hf:nobody/none: no network" in line


@pytest.mark.slow
def test_a_card_names_the_dataset_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = datasets.DatasetDict({"train": hugging_face(), "test": hugging_face()})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: both)
    run, hub = tmp_path / "run", tmp_path / "hub"
    train.main([*TINY, "--data.path=hf:owner/digits:small", f"--output={run}"])
    export.main([str(run), "--format=hub", f"--output={hub}"])
    front = yaml.safe_load((hub / "README.md").read_text().split("---")[1])
    assert front["datasets"] == ["owner/digits"]


def test_a_damaged_folder_is_one_line(saved: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    (next((broken / "train").glob("*.arrow"))).write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match="expected a folder that save_to_disk of Hugging"
    ) as caught:
        open_splits(str(broken), "data.path")
    assert "\n" not in str(caught.value)
