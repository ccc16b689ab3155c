"""Images without labels: every format gives them where no labels are needed, else one line."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import TensorDataset

from safer_fast.config.schema import DataConfig
from safer_fast.data import load_data
from safer_fast.data.formats import Source, open_splits
from safer_fast.data.formats.given import giving
from tests.support.given import hugging_face
from tests.support.plain_sets import COLOUR, png, write_npz, write_tar

PNGS = [png(image) for image in COLOUR]


def flat(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, content in enumerate(PNGS):
        (folder / f"{number:02}.png").write_bytes(content)
    return folder


def write_table(file: Path, **columns: Any) -> Path:
    pq.write_table(pa.table({"image": pa.array(PNGS, pa.binary()), **columns}), file)
    return file


def without_labels(file: Path) -> Path:
    """A shard of images alone, but for one label."""
    whole = write_tar(file.with_name("whole"), PNGS)
    with tarfile.open(whole) as source, tarfile.open(file, "w") as archive:
        for member in source:
            if member.name.endswith(".png") or member.name == "003.cls":
                archive.addfile(member, source.extractfile(member))
    return file


def saved(folder: Path) -> Path:
    rows = datasets.Dataset.from_dict({"image": [{"bytes": content} for content in PNGS]})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(folder))
    return folder


def images_alone(file: Path) -> Path:
    np.savez(file, images=COLOUR)
    return file


def hidden(file: Path) -> Path:
    return write_npz(file, labels=np.full(20, -1))


SETS: dict[str, Callable[[Path], Path]] = {
    "flat folder": lambda place: flat(place / "flat"),
    "parquet": lambda place: write_table(place / "a.parquet"),
    "parquet with gaps": lambda place: write_table(
        place / "a.parquet", label=pa.array([None, *range(19)])
    ),
    "parquet of two labels": lambda place: write_table(
        place / "a.parquet", fine_label=pa.array([0] * 20), coarse_label=pa.array([1] * 20)
    ),
    "npz": lambda place: images_alone(place / "a.npz"),
    "hidden": lambda place: hidden(place / "a.npz"),
    "tar": lambda place: without_labels(place / "a.tar"),
    "saved": lambda place: saved(place / "saved"),
}


def assert_unlabelled(source: Source) -> None:
    assert not source.has_labels
    assert source.class_names is None
    assert source.labels.tolist() == [0] * 20
    for row in (0, 3, 19):
        assert np.array_equal(np.asarray(source.read(row)), COLOUR[row])


@pytest.mark.parametrize("kind", SETS)
def test_images_alone_are_read_where_no_labels_are_needed(kind: str, tmp_path: Path) -> None:
    path = SETS[kind](tmp_path)
    assert_unlabelled(open_splits(str(path), "data.path", needs_labels=False)["all"])
    with pytest.raises(ValueError, match=r"^[^\n]+: expected [^\n]+, got [^\n]+$"):
        open_splits(str(path), "data.path")
    data = load_data(DataConfig(path=str(path)), batch_size=4, seed=0, needs_labels=False)
    assert (data.has_labels, data.num_classes, data.classes) == (False, 1, "no labels")
    batch = next(iter(data.train.epoch(1)))
    assert batch.labels.tolist() == [0] * 4


@pytest.mark.parametrize(
    "given",
    [
        COLOUR,
        torch.from_numpy(COLOUR),
        list(COLOUR),
        [{"image": image} for image in COLOUR],
        [(image, "a caption") for image in COLOUR],
        TensorDataset(torch.from_numpy(COLOUR).movedim(3, 1)),
    ],
    ids=["array", "tensor", "images", "named", "captions", "tensors"],
)
def test_images_given_in_python_need_no_labels_either(given: Any) -> None:
    if isinstance(given, list) and isinstance(given[0], np.ndarray):
        given = Rows(given)
    with giving(given, None) as path:
        assert_unlabelled(open_splits(path, "data.path", needs_labels=False)["all"])
    with pytest.raises(ValueError, match=r"^data: expected [^\n]+, got [^\n]+$"):  # noqa: SIM117
        with giving(given, None) as path:
            open_splits(path, "data.path")


class Rows:
    """Items that are images."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def test_splits_of_flat_folders_are_found(tmp_path: Path) -> None:
    for split in ("train", "val"):
        flat(tmp_path / "set" / split)
    found = open_splits(str(tmp_path / "set"), "data.path", needs_labels=False)
    assert set(found) == {"train", "validation"}
    assert_unlabelled(found["train"])


def test_one_class_is_enough_where_no_labels_are_needed(tmp_path: Path) -> None:
    flat(tmp_path / "set" / "cats")
    config = DataConfig(path=str(tmp_path / "set"))
    data = load_data(config, batch_size=4, seed=0, needs_labels=False)
    assert (data.class_names, data.has_labels) == (["cats"], True)
    with pytest.raises(ValueError, match="training images of at least two classes"):
        load_data(config, batch_size=4, seed=0)


def test_labels_are_left_out_where_another_split_has_none(tmp_path: Path) -> None:
    flat(tmp_path / "test")
    config = DataConfig(path=str(write_npz(tmp_path / "a.npz")), test_path=str(tmp_path / "test"))
    data = load_data(config, batch_size=4, seed=0, needs_labels=False)
    assert (data.has_labels, data.class_names) == (False, ["0"])


def test_labels_that_are_there_are_kept(tmp_path: Path) -> None:
    config = DataConfig(path=str(write_npz(tmp_path / "a.npz")))
    first, second = (
        load_data(config, batch_size=4, seed=0, needs_labels=needed) for needed in (True, False)
    )
    assert first.fingerprint == second.fingerprint
    hugging_face().save_to_disk(str(tmp_path / "named"))
    (source,) = open_splits(str(tmp_path / "named"), "data.path", needs_labels=False).values()
    assert source.has_labels
