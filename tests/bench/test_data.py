"""The benchmark of data loaders: everybody reads the same file, and every second is counted."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench import data
from bench.cpu_time import cpu_seconds
from bench.data_peers import Pipeline, Setting, ours, timm, torchvision, with_rows

CPU = torch.device("cpu")
NUM_PHOTOS, NUM_SMALL, BATCH_SIZE = 6, 20, 4


def write_images(file: Path, num_images: int, width: int, height: int) -> Path:
    """A parquet file of JPEGs, smooth noise, with as many classes as images."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(num_images):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    labels = pa.array(range(num_images), pa.int64())
    images = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": images, "label": labels}), file)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "photos.parquet", NUM_PHOTOS, 300, 260)


@pytest.fixture(scope="module")
def rows(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every row of a run of all parts on a few images."""
    folder = tmp_path_factory.mktemp("rows")
    small = write_images(folder / "small.parquet", NUM_SMALL, 32, 32)
    words = [
        *("--photos", str(photos), "--small", str(small), "--batch-size", str(BATCH_SIZE)),
        *("--workers", "1", "--repeats", "2", "--images", "8", "--small-images", "16"),
        *("--training-model", "vit_tiny_patch16_224", "--training-images", "4"),
        *("--training-batch-size", "2", "--training-steps", "1"),
        *("--output", str(folder / "rows.jsonl")),
    ]
    # a fixture of a whole file comes before the one that sets this for every test
    with pytest.MonkeyPatch.context() as patch, data.one_thread():
        patch.setattr(sys, "argv", ["bench.data", *words])
        data.main()
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_loader_is_measured(rows: list[dict[str, Any]], photos: Path) -> None:
    found = {(row["case"].split(" at ")[0], row["implementation"]) for row in rows}
    training = "photos, training (random resized crop, flip)"
    evaluation, small = "photos, evaluation (centre crop)", "small, training (crop, flip)"
    backends = [f"safer_fast {backend}" for backend in usable(photos)]
    assert found == {
        *((case, name) for case in (training, evaluation, small) for name in backends),
        *((case, "torchvision") for case in (training, evaluation, small)),
        (training, "timm create_loader"),
        *([] if torch.cuda.is_available() else [(training, "timm create_loader, uint8")]),
        (small, "safer_fast device"),
        *(("vit_tiny_patch16_224 trained", name) for name in backends),
    }
    for row in rows:
        assert row["what"] == "data"
        assert row["images_per_second"] > 0
        assert row["num_workers"] == (row["implementation"] != "safer_fast device")


def test_rows_are_of_whole_epochs(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "data_wait_fraction" in row:
            assert len(row["data_wait_fraction"]) == 2
            assert all(0 <= share <= 1 for share in row["data_wait_fraction"])
            continue
        # 16 small images are streamed, 20 lie on the device, 2 of them for validation
        small = 16 if row["num_workers"] else 18
        assert row["num_images"] == (8 if "photos" in row["case"] else small)
        assert row["torch_threads"] == 1
        if row["implementation"] == "safer_fast torch":
            assert row["ratio_torch"] == 1
        assert (row["ratio_timm"] is None) == ("random" not in row["case"])


def test_loaders_are_compared_with_the_same_number_of_workers() -> None:
    speeds = {"safer_fast torch": [(1, 10.0), (2, 20.0)], "safer_fast device": [(0, 400.0)]}
    speeds["safer_fast dali"] = [(1, 30.0), (2, 50.0)]
    rows = [
        {
            "implementation": name,
            "num_workers": number,
            "images_per_second": speed,
            "images_per_core_second": None if name == "safer_fast dali" else speed,
        }
        for name, pairs in speeds.items()
        for number, speed in pairs
    ]
    found = [data.ratios(row, rows) for row in rows]
    assert [ratio["ratio_torch"] for ratio in found] == [1, 1, 20, 3, 2.5]
    assert [ratio["ratio_torch_per_core"] for ratio in found] == [1, 1, 20, None, None]
    assert {ratio["ratio_timm"] for ratio in found} == {None}


def test_everybody_evaluates_the_same_pixels(photos: Path) -> None:
    setting = Setting(photos, BATCH_SIZE, CPU)
    expected = pixels(torchvision(setting, 1, is_training=False))
    for backend in usable(photos):
        found = pixels(ours(setting, backend, 1, is_training=False))
        assert found.shape == expected.shape == (NUM_PHOTOS, 3, 224, 224)
        assert (found - expected).abs().mean() < 1, backend


def usable(photos: Path) -> list[Literal["dali", "torch"]]:
    """The backends that stream and work here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ["torch"] if data.why_no_dali(photos, device) else ["torch", "dali"]


def pixels(pipeline: Pipeline) -> Tensor:
    return torch.cat(list(pipeline.epoch(1))).float()


def test_timm_is_measured_as_shipped_and_without_normalising(photos: Path) -> None:
    setting = Setting(photos, BATCH_SIZE, CPU)
    for is_normalised, dtype in ((True, torch.float32), (False, torch.uint8)):
        (images,) = timm(setting, 1, is_normalised=is_normalised).epoch(1)
        assert images.dtype == dtype
        assert images.shape == (BATCH_SIZE, 3, 224, 224)


def test_a_longer_epoch_repeats_the_rows_of_a_file(photos: Path, tmp_path: Path) -> None:
    table = pq.read_table(with_rows(photos, NUM_PHOTOS + 2, tmp_path / "longer.parquet"))
    assert table["label"].to_pylist() == [*range(NUM_PHOTOS), 0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no table of processes")
def test_cpu_seconds_are_those_of_workers_that_live_and_that_have_ended() -> None:
    program = (
        "import time\nwhile time.process_time() < 0.35: pass\nprint('done', flush=True)\ninput()\n"
    )
    before = seconds()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        living = seconds()
        assert living - before > 0.3
        worker.communicate("\n")
    assert seconds() >= living


def seconds() -> float:
    found = cpu_seconds()
    assert found is not None
    return found


@pytest.mark.parametrize(("part", "flag"), [("photos", "--photos"), ("small", "--small")])
def test_a_file_that_is_missing_is_named_in_one_line(
    part: str,
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SAFER_FAST_TEST_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench.data", "--parts", part])
    with pytest.raises(SystemExit, match="2"):
        data.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{flag}: expected a parquet file, got none: {tmp_path}" in last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "2,0"], "expected numbers above 0, got 2,0"),
        (["--parts", "photo"], "expected some of photos, small, training, got photo"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.data", *words])
    with pytest.raises(SystemExit, match="2"):
        data.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
