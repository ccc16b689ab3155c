"""Folders as people have them: splits by any name, hidden files, images by any name, links."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safer_fast import evaluate, train
from safer_fast.config.schema import DataConfig
from safer_fast.data import Data, load_data, load_evaluation_data
from safer_fast.data.formats.splits import split_of
from safer_fast.runtime.command import run
from tests.support.pictures import encode, photo
from tests.support.plain_sets import fail
from tests.support.sets import write_tar
from tests.support.small_runs import TINY

CLASSES = ("cat", "dog")


def write_splits(
    path: Path, *splits: str, num_images: int = 3, classes: tuple[str, ...] = CLASSES
) -> Path:
    """Folders of classes with PNGs of 8 x 8 pixels in each of these folders."""
    for place, split in enumerate(splits):
        for name in classes:
            folder = path / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                image = photo(8, 8, 10 * place + number)
                (folder / f"{number}.png").write_bytes(encode(image, "png"))
    return path


def load(path: Path, **settings: object) -> Data:
    config = DataConfig(path=str(path), num_workers=0, backend="torch", **settings)  # type: ignore[arg-type]
    return load_data(config, batch_size=2, seed=0)


def sizes(data: Data) -> tuple[int, int, int]:
    return (
        data.train.num_images,
        0 if data.validation_rows is not None else data.validation.num_images,
        0 if data.test is None else data.test.num_images,
    )


# names of splits

NAMES = [
    (("train", "valid", "test"), (6, 6, 6)),
    (("Train", "Test"), (5, 0, 6)),
    (("Training", "Testing"), (5, 0, 6)),
    (("TRAIN", "VAL"), (6, 6, 0)),
    (("train", "dev"), (6, 6, 0)),
    (("seg_train", "seg_test"), (5, 0, 6)),
    (("TrainingSet", "ValidationSet", "TestSet"), (6, 6, 6)),
    (("train2017", "val2017"), (6, 6, 0)),
]


@pytest.mark.parametrize(("names", "expected"), NAMES, ids=lambda value: "-".join(map(str, value)))
def test_folders_are_splits_by_the_words_that_tell_those_of_files(
    tmp_path: Path, names: tuple[str, ...], expected: tuple[int, ...]
) -> None:
    data = load(write_splits(tmp_path, *names))
    assert (data.class_names, sizes(data)) == (list(CLASSES), expected)
    assert {split_of(f"cifar-{name}-000") for name in names} == {split_of(name) for name in names}


def test_shards_may_lie_in_folders_of_splits(tmp_path: Path) -> None:
    for seed, split in enumerate(("Train", "valid")):
        image = encode(photo(8, 8, seed), "png")
        members = [
            member
            for n in range(4)
            for member in ((f"{n}.png", image), (f"{n}.cls", b"%d" % (n % 2)))
        ]
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "000.TAR", members)
    (tmp_path / "Train" / "._000.tar").write_bytes(b"AppleDouble")
    data = load(tmp_path)
    assert sizes(data) == (4, 4, 0)
    assert data.notes == [f"data: passed over 1 file, such as {tmp_path}/Train/._000.tar"]


def test_folders_of_classes_go_before_the_archives_that_they_came_from(tmp_path: Path) -> None:
    write_splits(tmp_path, "train", "val")
    archive = write_tar(tmp_path / "train" / "cat.tar", [("cat/0.png", b"")])
    data = load(tmp_path)
    assert sizes(data) == (6, 6, 0)
    assert data.notes == [f"data: passed over 1 file, such as {archive}"]


def test_npz_arrays_are_splits_by_the_same_words(tmp_path: Path) -> None:
    images = np.zeros((6, 8, 8, 3), np.uint8)
    arrays = {"train_images": images, "train_labels": np.arange(6) % 2}
    arrays |= {"X_valid": images[:4], "y_valid": np.arange(4) % 2, "names": np.arange(3)}
    np.savez(tmp_path / "a.npz", **arrays)
    (tmp_path / "a.npz").rename(tmp_path / "a.NPZ")
    data = load(tmp_path / "a.NPZ")
    assert sizes(data) == (6, 4, 0)
    assert data.notes == [f"data: passed over 1 file, such as {tmp_path}/a.NPZ/names"]


REFUSED = {
    "two of one split": (
        ["train", "val", "valid"],
        "expected one folder of validation data, got val and valid in",
    ),
    "two by case": (
        ["train", "Train"],
        "expected one folder of train data, got Train and train in",
    ),
    "unclear": (["train", "eval"], "got {}/eval; name it train, val or test, or give each split"),
    "unclear alone": (["holdout"], "got {}/holdout; name it train"),
    "no training": (["test", "validation"], "expected training data, got only test, validation in"),
}


@pytest.mark.parametrize(("names", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_looks_like_a_split_and_is_not_used_is_an_error(
    tmp_path: Path, names: list[str], expected: str
) -> None:
    write_splits(tmp_path, *names)
    assert expected.format(tmp_path) in fail(tmp_path)


def test_a_split_beside_classes_is_no_class(tmp_path: Path) -> None:
    write_splits(tmp_path, "", classes=("bicycle", "train"))
    assert f"got both: {tmp_path}/train without classes, beside bicycle" in fail(tmp_path)


def test_classes_within_a_split_may_be_named_as_splits(tmp_path: Path) -> None:
    """CIFAR-100, for example, has trains."""
    write_splits(tmp_path, "train", "test", classes=("bicycle", "train"))
    whole = load(tmp_path)
    alone = load(tmp_path / "train", test_path=str(tmp_path / "test"))
    assert whole.class_names == alone.class_names == ["bicycle", "train"]
    assert sizes(whole) == sizes(alone) == (5, 0, 6)


def test_words_for_splits_within_names_of_classes_are_no_splits(tmp_path: Path) -> None:
    write_splits(tmp_path, "", classes=("bullet train", "test_tube", "latest"))
    assert load(tmp_path).class_names == ["bullet train", "latest", "test_tube"]
    write_splits(tmp_path / "nested", "train", classes=("train", "val"))
    assert load(tmp_path / "nested").class_names == ["train", "val"]


def test_folders_beside_the_splits_are_counted(tmp_path: Path) -> None:
    write_splits(tmp_path, "train", "notes")
    (tmp_path / "README.md").touch()
    data = load(tmp_path)
    assert data.class_names == list(CLASSES)
    assert data.notes == [f"data: passed over 1 file and 1 folder, such as {tmp_path}/README.md"]


# what is an image

PNG = encode(photo(8, 8), "png")
TAKEN = {
    "a.jpeg2000": encode(photo(8, 8), "jpeg2000"),
    "b": PNG,
    "c.JPEG": encode(photo(8, 8), "jpeg"),
    "d.Png": PNG,
    "e.dat": encode(photo(8, 8), "gif"),
    "f.avif.bak": PNG,
    "g.jp2": encode(photo(8, 8), "jpeg2000"),
}
HIDDEN = ("._0.png", ".DS_Store", "Thumbs.db", ".hidden/1.png", "__MACOSX/2.png")
NO_IMAGES = ("note.txt", "0.json", "empty", "model.py")


def add_clutter(path: Path) -> None:
    """In a folder of a class: images with odd names, and seven files and two folders of others."""
    for name, content in TAKEN.items():
        (path / name).write_bytes(content)
    for name in (*HIDDEN, *NO_IMAGES):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"" if name == "empty" else b"no image at all")


def test_files_are_images_by_their_content_and_the_rest_is_counted(tmp_path: Path) -> None:
    write_splits(tmp_path, "train")
    add_clutter(tmp_path / "train" / "dog")
    for name in (".ipynb_checkpoints", "__MACOSX", ".Trash"):
        (tmp_path / "train" / name).mkdir()
    (tmp_path / "train" / "stray.png").write_bytes(PNG)
    data = load(tmp_path, validation_fraction=0.1, image_size=8)
    assert data.class_names == list(CLASSES)
    assert data.train.num_images + data.validation.num_images == 6 + len(TAKEN)
    assert data.notes == [
        f"data: passed over 8 files and 5 folders, such as {tmp_path}/train/stray.png"
    ]
    assert sum(batch.num_images for batch in data.train.epoch(1)) == data.train.num_images


def test_files_with_known_endings_are_not_opened_to_find_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safer_fast.data.formats import open_splits

    write_splits(tmp_path, "train")
    (tmp_path / "train/cat/0.json").touch()
    monkeypatch.setattr(Image, "open", None)
    assert len(open_splits(str(tmp_path), "data.path")["train"]) == 6


def test_members_of_shards_are_hidden_by_the_same_names(tmp_path: Path) -> None:
    hidden = [(name, PNG) for name in ("._0.png", "__MACOSX/0.png", "README", "./.a/1.png")]
    labels = [("./0.cls", b"0"), ("./1.cls", b"1"), ("./2.cls", b"1")]
    images = [("./0.jp2", TAKEN["g.jp2"]), ("./1.PGM", encode(photo(8, 8).convert("L"), "ppm"))]
    pairs = zip([*images, ("./2.png", PNG)], labels, strict=True)
    file = write_tar(tmp_path / "a.tar", [*hidden, *(member for pair in pairs for member in pair)])
    data = load(file, validation_path=str(file))
    assert data.train.num_images == data.validation.num_images == 3
    passed, same = data.notes
    assert passed == f"data: passed over 8 files, such as {file}/__MACOSX/0.png"
    assert same.startswith("data.validation_path: the validation split holds the training images")


def test_a_class_of_nothing_but_other_files_is_an_error(tmp_path: Path) -> None:
    write_splits(tmp_path, "train")
    (tmp_path / "train/owl").mkdir()
    for name in ("._0.png", "empty", "note.txt"):
        (tmp_path / "train/owl" / name).touch()
    assert f"expected images in every class folder, got none in {tmp_path}/train/owl" in fail(
        tmp_path
    )


# deeper folders and links


def test_images_in_deeper_folders_are_of_the_class_and_said(tmp_path: Path) -> None:
    write_splits(tmp_path, "train/cat", classes=("a", "b"))
    write_splits(tmp_path, "train", classes=("dog",))
    data = load(tmp_path)
    assert (data.class_names, sizes(data)) == (["cat", "dog"], (8, 0, 0))
    assert data.notes == [
        f"data: classes have images in 2 folders below their own, such as {tmp_path}/train/cat/a"
    ]


def test_links_are_followed_once_and_dead_ones_are_named(tmp_path: Path) -> None:
    write_splits(tmp_path / "real", "", classes=("dog",))
    write_splits(tmp_path / "data", "train", classes=("cat",))
    (tmp_path / "data/train/dog").symlink_to(tmp_path / "real/dog")
    (tmp_path / "real/dog/again").symlink_to(tmp_path / "real/dog")
    data = load(tmp_path / "data")
    assert (data.class_names, sizes(data)) == (["cat", "dog"], (5, 0, 0))
    again = tmp_path / "data/train/dog/again"
    assert data.notes == [f"data: passed over 1 folder, such as {again}"]
    dead = tmp_path / "data/train/owl"
    dead.symlink_to(tmp_path / "gone")
    assert f"expected class folders, got a link to nowhere: {dead}" in fail(tmp_path / "data")
    dead.rename(dead := tmp_path / "data/val")
    assert f"expected a folder, got a link to nowhere: {dead}" in fail(tmp_path / "data")
    dead.rename(dead := tmp_path / "data/train/cat/9.png")
    assert f"got an unreadable one: {dead}" in fail(tmp_path / "data", validation_fraction=0.2)


# through the commands


def test_a_cluttered_folder_is_trained_and_one_class_of_it_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = write_splits(tmp_path / "data", "Training", "Valid", "TESTING"), tmp_path / "run"
    add_clutter(path / "Training" / "dog")
    (path / ".ipynb_checkpoints").mkdir()
    train.main([*TINY, f"--data.path={path}", f"--output={output}", "--data.image_size=8"])
    said = capsys.readouterr().out
    assert "2 classes, 13 training, 6 validation, 6 test images of 3x8x8" in said
    assert "note:       data: passed over 7 files and 3 folders, such as " in said
    assert json.loads((output / "config.json").read_text())["label_names"] == list(CLASSES)

    dogs = write_splits(tmp_path / "dogs", "", classes=("dog",))
    (dogs / "dog/.DS_Store").touch()
    evaluate.main([str(output), f"--path={dogs}", "--attacks=clean", "--device=cpu"])
    printed = capsys.readouterr().out
    assert f"note:       data: passed over 1 file, such as {dogs}/dog/.DS_Store" in printed
    model: dict[str, Any] = {"num_classes": 2, "num_channels": 3, "image_size": 8}
    loader = load_evaluation_data(
        str(dogs), DataConfig(num_workers=0), batch_size=3, class_names=list(CLASSES), **model
    )
    assert next(loader.epoch(1)).labels.tolist() == [1, 1, 1]
    monkeypatch.setattr(sys, "argv", ["evaluate", str(output), f"--path={dogs}", "--device=cpu"])
    (dogs / "dog").rename(dogs / "wolf")
    with pytest.raises(SystemExit) as ending:
        run(evaluate.main)
    assert ending.value.code == 2
    assert "--path: expected the class names of the training data, got wolf in place of cat" in (
        capsys.readouterr().err
    )
