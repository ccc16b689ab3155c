"""Every format is read as documented."""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from safer_fast.config.schema import DataConfig
from safer_fast.data import Data, formats, load_data, load_evaluation_data
from safer_fast.data.formats import (
    FORMATS,
    Format,
    OpenRequest,
    Source,
    check_labels,
    empty_classes,
    open_splits,
)
from safer_fast.data.formats.synthetic import SIZE, SyntheticSource
from tests.support.sets import encode, write_parquet, write_tar

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (20, 8, 8), dtype=np.uint8)
LABELS = np.arange(20) % 4


def load(path: Path | None, batch_size: int = 2, **settings: Any) -> Data:
    config = DataConfig(path=None if path is None else str(path), **settings)
    return load_data(config, batch_size=batch_size, seed=0)


def write_folder(path: Path, images: Iterable[NDArray[Any]], names: Sequence[str]) -> Path:
    for number, image in enumerate(images):
        folder = path / names[number % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}.png").write_bytes(encode(image))
    return path


def write_npz(file: Path, **arrays: Any) -> Path:
    np.savez(file, **arrays)
    return file


def collect(data: Data) -> dict[bytes, int]:
    """Label by pixels, over the training and validation images together."""
    batches = [*data.train.epoch(1), *data.validation.epoch(1)]
    pairs = [
        pair for batch in batches for pair in zip(batch.images, batch.labels.tolist(), strict=True)
    ]
    return {image.numpy().tobytes(): label for image, label in pairs}


def count_images(data: Data) -> tuple[int, int, int | None]:
    test = None if data.test is None else data.test.num_images
    return data.train.num_images, data.validation.num_images, test


def expect_rows(data: Data, images: NDArray[np.uint8], labels: NDArray[Any]) -> None:
    found = collect(data)
    channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    expected = zip(channels_first, labels.tolist(), strict=True)
    assert found == {np.ascontiguousarray(image).tobytes(): label for image, label in expected}


def test_digits_are_the_default_with_their_own_test_split() -> None:
    data = load(None)
    assert (data.name, data.num_classes) == ("digits", 10)
    assert (data.num_channels, data.image_size) == (1, 8)
    assert count_images(data) == (
        900,
        100,
        797,
    )
    batch = next(iter(data.train.epoch(1)))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (2, 1, 8, 8)
    assert batch.labels.dtype == torch.int64
    assert data.class_names == [str(number) for number in range(10)]


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("plain", [False, True])
def test_parquet_gives_the_rows_that_were_written(tmp_path: Path, column: str, plain: bool) -> None:
    names = ["cat", "dog", "fox", "hen"]
    file = write_parquet(tmp_path / "pets.parquet", list(COLOUR), LABELS, names, column, plain)
    data = load(file)
    assert (data.name, data.class_names, data.test) == ("pets", names, None)
    expect_rows(data, COLOUR, LABELS)


def test_parquet_without_class_names_counts_them(tmp_path: Path) -> None:
    data = load(write_parquet(tmp_path / "a.parquet", list(GREY), LABELS))
    assert data.class_names == ["0", "1", "2", "3"]
    assert data.num_channels == 1
    expect_rows(data, GREY, LABELS)


def test_a_folder_of_parquet_files_is_split_by_their_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", list(COLOUR[:9]), LABELS[:9])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", list(COLOUR[9:16]), LABELS[9:16])
    write_parquet(tmp_path / "validation.parquet", list(COLOUR[16:18]), LABELS[16:18])
    write_parquet(tmp_path / "test.parquet", list(COLOUR[18:]), LABELS[18:])
    data = load(tmp_path)
    assert count_images(data) == (16, 2, 2)
    assert data.validation_rows is None
    expect_rows(data, COLOUR[:18], LABELS[:18])


def test_a_folder_of_parquet_files_without_split_names_is_all_training(tmp_path: Path) -> None:
    write_parquet(tmp_path / "latest.parquet", list(COLOUR[:9]), LABELS[:9])
    write_parquet(tmp_path / "interval.parquet", list(COLOUR[9:]), LABELS[9:])
    expect_rows(load(tmp_path), COLOUR, LABELS)


def test_rows_of_several_parquet_files_are_described_by_their_own_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", list(COLOUR[:9]), LABELS[:9])
    write_parquet(tmp_path / "b.parquet", list(COLOUR[9:]), LABELS[9:])
    source = open_splits(str(tmp_path), "data.path")["all"]
    assert source.describe(8) == f"row 8 of {tmp_path / 'a.parquet'}"
    assert source.describe(9) == f"row 0 of {tmp_path / 'b.parquet'}"


def test_a_pattern_of_parquet_files_is_one_source(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-09.parquet", list(COLOUR[:9]), LABELS[:9])
    write_parquet(tmp_path / "train-10.parquet", list(COLOUR[9:]), LABELS[9:])
    write_parquet(tmp_path / "train-11.parquet", list(GREY), LABELS)
    expect_rows(load(tmp_path / "train-{09..10}.parquet"), COLOUR, LABELS)


def test_digits_is_a_name_for_the_default() -> None:
    splits, default = (open_splits(path, "data.test_path") for path in ("digits", None))
    assert set(splits) == set(default) == {"train", "test"}
    assert np.array_equal(splits["train"].labels, default["train"].labels)
    assert splits["test"].flag == "data.test_path"


def test_synthetic_is_noise_that_depends_on_the_row_alone() -> None:
    splits = open_splits("synthetic", "data.path")
    assert {name: len(source) for name, source in splits.items()} == {
        "train": 1_281_167,
        "validation": 50_000,
    }
    source = splits["validation"]
    assert isinstance(source, SyntheticSource)
    check_labels(source, 1000)
    assert (empty_classes(source.labels, 1000), source.class_names) == ([], None)
    image = source.read(7)
    assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
    assert image.tobytes() == splits["train"].read(7).tobytes() != source.read(8).tobytes()
    assert source.describe(7) == "row 7 of synthetic (validation)"


def test_files_named_like_a_built_in_are_reached_by_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("digits", "synthetic"):
        write_folder(tmp_path / name, COLOUR[:4], ["a", "b"])
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "synthetic"):
        assert open_splits(f"./{name}", "data.path")["all"].class_names == ["a", "b"]


def test_classes_without_rows_are_listed(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "a.npz", images=GREY, labels=np.where(LABELS == 1, 5, LABELS))
    source = open_splits(str(file), "data.path")["all"]
    assert empty_classes(source.labels, 6) == [1, 4]
    assert empty_classes(source.labels, 8) == [1, 4, 6, 7]


def test_a_folder_of_classes_is_all_training(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path / "pets-1.0", COLOUR, ["dog", "cat"]))
    assert (data.name, data.class_names) == ("pets-1.0", ["cat", "dog"])
    expect_rows(data, COLOUR, (np.arange(20) + 1) % 2)


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_a_folder_of_splits_is_read_as_such(tmp_path: Path, validation: str) -> None:
    write_folder(tmp_path / "train", COLOUR[:12], ["a", "b"])
    write_folder(tmp_path / validation, COLOUR[12:16], ["a", "b"])
    write_folder(tmp_path / "test", COLOUR[16:], ["a", "b"])
    data = load(tmp_path)
    assert count_images(data) == (12, 4, 4)


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("x_train", "y_train")])
@pytest.mark.parametrize("layout", ["grey", "grey with channel", "last", "first"])
def test_npz_gives_the_rows_that_were_written(
    tmp_path: Path, keys: tuple[str, str], layout: str
) -> None:
    images = GREY if layout.startswith("grey") else COLOUR
    stored = {
        "grey": GREY,
        "grey with channel": GREY[..., None],
        "last": COLOUR,
        "first": COLOUR.transpose(0, 3, 1, 2),
    }[layout]
    # Some sets store labels as a column.
    arrays = {keys[0]: stored, keys[1]: LABELS[:, None]}
    expect_rows(load(write_npz(tmp_path / "a.npz", **arrays)), images, LABELS)


def test_npz_test_arrays_become_the_test_split(tmp_path: Path) -> None:
    arrays = {"x_train": GREY, "y_train": LABELS, "x_test": GREY[:3], "y_test": LABELS[:3]}
    data = load(write_npz(tmp_path / "a.npz", **arrays))
    assert count_images(data) == (18, 2, 3)


def test_float_pixels_are_rounded_to_bytes(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "a.npz", images=(GREY / 255).astype(np.float32), labels=LABELS)
    expect_rows(load(file), GREY, LABELS)


def test_explicit_paths_give_the_other_splits_in_any_format(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "a.parquet", list(COLOUR), LABELS)
    validation = write_npz(tmp_path / "b.npz", images=COLOUR[:5], labels=LABELS[:5])
    test = write_folder(tmp_path / "c", COLOUR[:8], ["0", "1", "2", "3"])
    data = load(train, validation_path=str(validation), test_path=str(test))
    assert count_images(data) == (20, 5, 8)


def test_other_data_is_brought_to_what_a_model_takes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", COLOUR[:12], ["a", "b"])
    write_folder(tmp_path / "val", COLOUR[12:], ["a", "b"])
    loader = load_evaluation_data(
        str(tmp_path),
        DataConfig(num_workers=0),
        batch_size=5,
        num_classes=2,
        num_channels=3,
        image_size=16,
        class_names=["a", "b"],
    )
    assert [batch.images.shape[0] for batch in loader.epoch(1)] == [4, 4]
    assert next(loader.epoch(1)).images.shape == (4, 3, 16, 16)


def test_grey_among_colour_becomes_rgb(tmp_path: Path) -> None:
    images = [*GREY[:10], *COLOUR[10:]]
    data = load(write_parquet(tmp_path / "a.parquet", images, LABELS))
    assert data.num_channels == 3
    expected = np.concatenate([np.repeat(GREY[:10, ..., None], 3, axis=3), COLOUR[10:]])
    expect_rows(data, expected, LABELS)


def test_one_colour_image_among_many_grey_ones_is_found(tmp_path: Path) -> None:
    images = np.zeros((300, 8, 8), dtype=np.uint8)
    images_and_one = [*images[:150], COLOUR[0], *images[151:]]
    data = load(write_parquet(tmp_path / "a.parquet", images_and_one, np.arange(300) % 2))
    assert data.num_channels == 3


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P", "transparent P"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    original = Image.fromarray(np.full((8, 8, 3), (200, 100, 50), dtype=np.uint8))
    image = original.convert(mode.split()[-1])
    if mode == "transparent P":
        image.info["transparency"] = bytes(range(256))
    buffer = io.BytesIO()
    image.save(buffer, "tiff" if mode == "CMYK" else "png")
    file = write_parquet(tmp_path / "a.parquet", [buffer.getvalue()] * 20, LABELS)
    batch = next(iter(load(file).train.epoch(1)))
    assert batch.images.shape == (2, 3, 8, 8)
    colour = batch.images[0, :, 4, 4].int()
    assert (colour - torch.tensor([200, 100, 50])).abs().max() <= 30


def test_small_images_are_resized_once_to_image_size(tmp_path: Path) -> None:
    write_folder(tmp_path, [*np.full((10, 24, 32, 3), 77, np.uint8), *COLOUR[:10]], ["a", "b"])
    data = load(tmp_path, image_size=16, augmentation="none")
    batch = next(iter(data.train.epoch(1)))
    assert (data.image_size, batch.images.shape) == (16, (2, 3, 16, 16))


def test_sources_survive_pickling(tmp_path: Path) -> None:
    paths = [
        write_parquet(tmp_path / "a.parquet", list(COLOUR), LABELS),
        write_folder(tmp_path / "folder", COLOUR, ["a"]),
        write_npz(tmp_path / "a.npz", images=COLOUR, labels=LABELS),
    ]
    for path in paths:
        source = open_splits(str(path), "data.path")["all"]
        copy = pickle.loads(pickle.dumps(source))
        assert np.array_equal(np.asarray(copy.read(7)), np.asarray(source.read(7)))
        assert copy.describe(7) == source.describe(7)
        assert np.array_equal(copy.labels, source.labels)


class Shuffled:
    """The entries of os.scandir in a random order."""

    draw = np.random.default_rng(0)
    scandir = staticmethod(os.scandir)

    def __init__(self, path: Any = ".") -> None:
        with self.scandir(path) as entries:
            found = list(entries)
        self.entries = iter([found[place] for place in self.draw.permutation(len(found))])

    def __iter__(self) -> Iterator[Any]:
        return self.entries

    def __next__(self) -> Any:
        return next(self.entries)

    def __enter__(self) -> Shuffled:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar"])
def test_rows_come_in_the_order_of_names_in_whatever_order_a_disk_lists_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in reversed(range(12)):
        image, name = encode(COLOUR[number]), tmp_path / f"{number:02}"
        if kind == "folder":
            name = tmp_path / f"{number // 4}" / f"{number % 2}" / f"{number:02}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(image)
        elif kind == "parquet":
            write_parquet(name.with_suffix(".parquet"), [image], [number])
        else:
            write_tar(name.with_suffix(".tar"), [("a.png", image), ("a.cls", b"%d" % number)])
    monkeypatch.setattr(os, "scandir", Shuffled)
    listed = []
    for _ in range(5):
        (source,) = open_splits(str(tmp_path), "data.path").values()
        pixels = [np.asarray(source.read(row)).tobytes() for row in range(len(source))]
        listed.append((pixels, source.labels.tolist(), source.class_names))
    assert len(listed[0][0]) == 12
    assert all(each == listed[0] for each in listed)


def test_a_format_is_one_module_and_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lines(Source):
        def __init__(self, files: list[Path], flag: str) -> None:
            self.lines = [line for file in files for line in file.read_text().split()]
            self.labels = np.array([int(line) for line in self.lines])
            self.flag, self.class_names = flag, None

        def read(self, index: int) -> Image.Image:
            return Image.new("RGB", (8, 8), (index, 0, 0))

        def describe(self, index: int) -> str:
            return f"line {index}"

    def open_lines(splits: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
        return {split: Lines(files, request.flag) for split, files in splits.items()}

    module = ModuleType("lines")
    vars(module)["open_lines"] = open_lines
    monkeypatch.setitem(sys.modules, "safer_fast.data.formats.lines", module)
    row = Format("files", ".lines", "lines.open_lines")
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, row))
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    for name in ("train/a-0.lines", "train/a-1.LINES", "val/b.lines"):
        (tmp_path / name).write_text("0\n1\n")
    nums_rows = {split: len(source) for split, source in open_splits(str(tmp_path), "flag").items()}
    assert nums_rows == {"train": 4, "validation": 2}
    assert len(open_splits(str(tmp_path / "train" / "a-0.lines"), "flag")["all"]) == 2
    with pytest.raises(
        ValueError, match=r"expected a \.parquet or \.tar or \.lines file, a folder"
    ):
        open_splits(str(tmp_path / "none"), "flag")


@pytest.mark.parametrize("item", FORMATS, ids=lambda item: item.name)
def test_the_function_of_every_format_is_there(item: Format) -> None:
    module, function = item.opener.split(".")
    assert callable(getattr(import_module(f"safer_fast.data.formats.{module}"), function))
