"""Parquet files: which columns are read, and images beyond the memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from safer_fast import evaluate, train_model
from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import DataConfig
from safer_fast.data import Data, load_data, load_evaluation_data
from safer_fast.data.formats import Source, open_splits, parquet, parquet_copies
from safer_fast.data.formats import source as formats_source
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime.machine_errors import memory_limit, physical_memory
from tests.support.pictures import assert_same, encode, photo
from tests.support.small_runs import FEW_IMAGES

NUM_ROWS = 20
PNGS = [encode(photo(8, 8, seed), "png") for seed in range(NUM_ROWS)]
COARSE = [number % 2 for number in range(NUM_ROWS)]
FINE = ["fox", "ant", "cow", "bee"] * 5
PLACES = [3, 0, 2, 1] * 5


def write(file: Path, features: dict[str, Any] | None = None, **columns: Any) -> Path:
    """A file of these columns; `features`: in its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    if features is not None:
        metadata = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, file, row_group_size=7)
    return file


def cifar(file: Path, rows: slice = slice(None)) -> Path:
    """The columns of CIFAR-100, whose fine labels are texts here."""
    columns = {"img": PNGS, "fine_label": FINE, "coarse_label": COARSE}
    return write(file, **{name: values[rows] for name, values in columns.items()})


def load(path: Path, **settings: Any) -> Data:
    defaults: dict[str, Any] = {"num_workers": 0, "augmentation": "none"}
    config = DataConfig(path=str(path), **(defaults | settings))
    return load_data(config, batch_size=2, seed=0)


def fail(path: Path, **settings: Any) -> str:
    with pytest.raises(ValueError, match=r"^[a-z_.]+: expected [^\n]+, got [^\n]+$") as caught:
        load(path, **settings)
    return str(caught.value)


def test_a_run_takes_the_columns_it_is_told_and_evaluates_those_of_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, words = cifar(tmp_path / "train.parquet"), []
    words = [f"--data.path={train}", "--data.label_column=fine_label", *FEW_IMAGES]
    run = train_model(parse_config([*words, f"--output={tmp_path / 'run'}"]))
    config = json.loads((run / "config.json").read_text())
    assert config["label_names"] == ["ant", "bee", "cow", "fox"]
    part = cifar(tmp_path / "part.parquet", slice(0, 3))
    other = write(tmp_path / "other.parquet", photos=PNGS[:3], kinds=["fox", "fox", "bee"])
    flags = ["--attacks=clean", "--data.path"]
    evaluate.main([str(run), *flags, str(part)])
    columns = ["--data.image_column=photos", "--data.label_column", "kinds"]
    evaluate.main([str(run), *flags, str(other), *columns])
    events = read_metrics(run / "metrics.jsonl")[-2:]
    assert [event["num_images"] for event in events] == [3, 3]
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"expected one column of .*\(photos, kinds\), got fine"):
        evaluate.main([str(run), *flags, str(other)])
    with pytest.raises(ValueError, match=r"--label-column: expected --path beside it"):
        evaluate.main([str(run), "--data.label_column=kinds"])


def test_text_labels_are_classes_in_sorted_order_whatever_the_split_has(tmp_path: Path) -> None:
    cifar(tmp_path / "set/train.parquet")
    cifar(tmp_path / "set/test.parquet", slice(0, 2))
    data = load(tmp_path / "set", label_column="fine_label")
    assert (data.class_names, data.num_classes) == (["ant", "bee", "cow", "fox"], 4)
    assert data.test is not None
    assert torch.cat([batch.labels for batch in data.test.epoch(1)]).tolist() == [3, 0]
    columns = formats_source.Columns(None, "fine_label")
    source = open_splits(str(tmp_path / "set"), "data.path", columns=columns)["train"]
    assert source.labels.tolist() == PLACES
    write(tmp_path / "set/test.parquet", img=PNGS[:1], fine_label=["gnu"], coarse_label=[0])
    assert "the class names of the training data, got gnu in place of ant" in fail(
        tmp_path / "set", label_column="fine_label"
    )
    coarse = load(cifar(tmp_path / "a.parquet"), label_column="coarse_label")
    fine = load(tmp_path / "a.parquet", label_column="fine_label")
    assert coarse.fingerprint != fine.fingerprint
    dictionary = pa.array(FINE).dictionary_encode()
    file = write(tmp_path / "b.parquet", image=PNGS, label=dictionary)
    assert open_splits(str(file), "data.path")["all"].labels.tolist() == PLACES


def test_columns_that_leave_no_choice_are_found(tmp_path: Path) -> None:
    features = {"pic": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["x", "y"]}}
    files = [
        write(tmp_path / "1.parquet", features, mask=PNGS, pic=PNGS, kind=COARSE, id=COARSE),
        write(tmp_path / "2.parquet", img=PNGS, fine_label=COARSE),
        write(tmp_path / "3.parquet", photo=PNGS, Target=COARSE, id=COARSE),
        write(tmp_path / "4.parquet", image=PNGS, label=COARSE, fine_label=PLACES, other=PNGS),
    ]
    for file in files:
        assert open_splits(str(file), "data.path")["all"].labels.tolist() == COARSE
    assert load(files[0]).class_names == ["x", "y"]


def test_columns_that_leave_a_choice_or_are_not_there_are_listed(tmp_path: Path) -> None:
    file = cifar(tmp_path / "a.parquet")
    assert fail(file) == (
        "data.path: expected one column label, or --data.label_column, "
        f"got fine_label, coarse_label in {file}"
    )
    assert fail(file, label_column="label") == (
        f"data.label_column: expected one column of {file} (img, fine_label, coarse_label), "
        "got label, did you mean fine_label?"
    )
    assert "got img, fine_label, coarse_label" not in fail(file, image_column="x")
    assert fail(file, image_column="fine_label", label_column="coarse_label").startswith(
        "data.image_column: expected encoded images as bytes or struct{bytes, path}, got string"
    )
    assert "expected integers or text as labels, got binary" in fail(file, label_column="img")
    two = write(tmp_path / "b.parquet", left=PNGS, right=PNGS, label=COARSE)
    assert "one column image (or img), or --data.image_column, got left, right" in fail(two)
    plain = write(tmp_path / "c.parquet", image=PNGS, caption=FINE)
    assert "--data.label_column, got image, caption in" in fail(plain)
    (tmp_path / "d/a").mkdir(parents=True)
    (tmp_path / "d/a/0.png").write_bytes(PNGS[0])
    message = fail(tmp_path / "d", label_column="x")
    assert message.startswith("data.label_column: expected parquet files, which have columns, got")
    cifar(tmp_path / "e/train-0.parquet")
    write(tmp_path / "e/train-1.parquet", img=PNGS, fine_label=COARSE)
    assert "text as labels in all files, got numbers in" in fail(
        tmp_path / "e", label_column="fine_label"
    )


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is held in memory; the folder that copies go to."""
    monkeypatch.setattr(parquet, "LARGEST_IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/safer_fast/parquet"


def open_all(path: Path) -> Source:
    return open_splits(str(path), "data.path")["all"]


def read_all(source: Source) -> list[bytes]:
    return [source.encoded(row).tobytes() for row in range(len(source))]  # type: ignore[attr-defined]


def test_batches_of_copied_images_are_those_of_held_ones(
    tmp_path: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(3):
        write(tmp_path / f"set/{number}.parquet", image=PNGS[number::3], label=COARSE[number::3])
    data = load(tmp_path / "set", backend="torch", num_workers=2)
    said = f"copying the images of 3 parquet files (0.0 GiB) to {copied}, once"
    assert capsys.readouterr().err.count(said) == 1
    epochs = [list(data.train.epoch(number)) for number in (1, 2)]
    assert_same(data.train.epoch(2, 4), epochs[1][4:])
    again = load(tmp_path / "set", backend="torch")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(parquet, "LARGEST_IN_MEMORY", 2**30)
    held = load(tmp_path / "set", backend="torch")
    for other in (again, held):
        for number, epoch in enumerate(epochs, 1):
            assert_same(other.train.epoch(number), epoch)
    assert held.fingerprint == data.fingerprint


def test_copies_are_made_anew_where_file_or_copy_has_changed(
    tmp_path: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.parquet", image=PNGS[:5], label=COARSE[:5])
    lines: list[str] = []
    monkeypatch.setattr(parquet_copies, "_say", lines.append)
    assert read_all(open_all(file)) == PNGS[:5]
    assert read_all(pickle.loads(pickle.dumps(open_all(file)))) == PNGS[:5]
    names = {path.name for path in copied.iterdir()}
    write(file, image=PNGS[5:11], label=COARSE[5:11])
    assert read_all(open_all(file)) == PNGS[5:11]
    assert len(names) == len(list(copied.iterdir())) == 3
    (copy,) = copied.glob("*.images")
    os.truncate(copy, 100)
    assert read_all(open_all(file)) == PNGS[5:11]
    (index,) = copied.glob("*.npy")
    index.write_bytes(b"\x93NUMPY")
    assert read_all(open_all(file)) == PNGS[5:11]
    assert len(lines) == 4
    assert not list(copied.glob("*.tmp"))


def test_no_room_for_copies_is_one_line(
    tmp_path: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.parquet", image=PNGS, label=COARSE)
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: full)
        message = fail(file)
    assert message.startswith("data.path: expected 0.0 GiB free in ")
    assert "XDG_CACHE_HOME names another folder" in message
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert "expected a cache folder that can be written to, got Not a directory" in fail(file)


def open_in_process(path: Path, cache: Path, results: Any) -> None:
    os.environ["XDG_CACHE_HOME"] = str(cache)
    parquet.LARGEST_IN_MEMORY = 0
    lines: list[str] = []
    parquet_copies._say = lines.append  # type: ignore[assignment]
    images = read_all(open_all(path))
    results.put((images, sum(line.startswith("copying") for line in lines)))


def test_processes_that_open_a_set_at_once_copy_it_once(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"set/{number}.parquet", image=PNGS[number::4], label=COARSE[number::4])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (tmp_path / "set", tmp_path / "cache", results)
    processes = [context.Process(target=open_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(images == got[0][0] for images, _ in got)
    assert sum(count for _, count in got) == 1


@pytest.mark.parametrize("is_held", [True, False])
def test_paths_of_rows_are_read_beside_the_file_and_nowhere_else(
    tmp_path: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    if is_held:
        monkeypatch.setattr(parquet, "LARGEST_IN_MEMORY", 2**30)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(PNGS[0])
    os.mkfifo(tmp_path / "images/pipe.png")
    rows: list[dict[str, Any]] = [
        {"bytes": None, "path": "images/0.png"},
        {"bytes": PNGS[1], "path": "/etc/hostname"},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "images/none.png"},
        {"bytes": None, "path": "images/pipe.png"},
    ]
    file = write(tmp_path / "a.parquet", image=rows, label=[0, 1, 0, 1, 0])
    source = open_all(file)
    assert [source.encoded(row).tobytes() for row in (0, 1, 2)] == [PNGS[0], PNGS[1], b""]  # type: ignore[attr-defined]
    lines: list[str] = []
    config = DataConfig(path=str(file), bad_images="skip", num_workers=0, backend="torch")
    config.validation_fraction = 0.3
    data = load_data(config, batch_size=2, seed=0, report=lines.append)
    list(data.train.epoch(1))
    list(data.validation.epoch(1))
    assert sum(line.startswith("left out") for line in lines) == 3
    for path in ("/etc/hostname", "../secret.png", "images/../../x", "", "a\0b"):
        rows[3]["path"] = path
        message = fail(write(file, image=rows, label=[0, 1, 0, 1, 0]), bad_images="skip")
        assert "got " + path.replace("\0", "?") + f": row 3 of {file}" in message
        assert "expected images as bytes, or paths below the folder of the file" in message


def test_the_memory_of_this_machine_is_known() -> None:
    assert 2**28 < physical_memory() < 2**50
    assert 2**26 < memory_limit() <= physical_memory()


MEASURED = """
import sys
import numpy, pyarrow, timm, torch, torch._dynamo, torch.utils.tensorboard
from safer_fast.data.formats import parquet
from safer_fast.train import main
def peak():  # of this program, not of the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
before, parquet.LARGEST_IN_MEMORY = peak(), 2**25
main(sys.argv[1:])
print("MiB:", (peak() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_set_larger_than_the_memory_it_may_take_trains(tmp_path: Path) -> None:
    padded = [image + bytes(2**20) for image in PNGS]
    table = pa.table({"image": pa.array(padded * 24, pa.binary()), "label": COARSE * 24})
    settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(table, tmp_path / "a.parquet", write_batch_size=8, **settings)
    del table, padded
    words = [
        f"--data.path={tmp_path / 'a.parquet'}",
        f"--output={tmp_path / 'run'}",
        *FEW_IMAGES,
    ]
    words += ["--data.backend=torch", "--data.num_workers=0", "--batch-size=32"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    epochs = [e for e in read_metrics(tmp_path / "run/metrics.jsonl") if e["event"] == "epoch"]
    assert [epoch["skipped_images"] for epoch in epochs] == [0, 0]
    (copy,) = (tmp_path / "cache/safer_fast/parquet").glob("*.images")
    assert copy.stat().st_size > 480 * 2**20
    # what training itself takes is among them
    assert float(done.stdout.split("MiB:")[1]) < 200


def test_evaluation_data_may_have_text_labels_of_a_part_of_the_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", image=PNGS[:2], label=["fox", "bee"])
    model: dict[str, Any] = {"num_classes": 4, "num_channels": 3, "image_size": 8}
    names = ["ant", "bee", "cow", "fox"]
    loader = load_evaluation_data(
        str(file), DataConfig(num_workers=0), batch_size=2, class_names=names, **model
    )
    assert next(loader.epoch(1)).labels.tolist() == [3, 1]
