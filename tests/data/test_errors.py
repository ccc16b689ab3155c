"""Every kind of bad data gets one line that names the setting, the file, and what was expected."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safer_fast.config.schema import DataConfig
from safer_fast.data import load_evaluation_data
from safer_fast.data.bad_images import MOST_REPORTED, BadImages
from tests.support.plain_sets import (
    COLOUR,
    GREY,
    LABELS,
    RNG,
    fail,
    png,
    write_npz,
    write_parquet,
    write_tar,
)

SMALLER = COLOUR[:, :6, :6]
ONE_SIZE = "data.image_size: expected one size for all images or --data.image_size, got 8x8 ("
UNREADABLE = "data.path: expected an image, got an unreadable one: "


def write_folder(path: Path, *names: str, image: bytes = png(COLOUR[0])) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(image)
    return path


def write_text(file: Path) -> Path:
    file.write_text("PAR1 or whatever")
    return file


def write_half(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def write_array(file: Path) -> Path:
    with file.open("wb") as opened:
        np.save(opened, GREY)
    return file


PNGS = [png(image) for image in COLOUR]
SIX = [f"{'ab'[number % 2]}/{number}.png" for number in range(6)]
# The first image and another one of each class.
BOTH = ["a/0.png", "b/1.png"]
MANY = [PNGS[0]] * 300
OBJECTS = np.array(["a"] * 20, dtype=object)

# What makes the data below a folder and returns its path, and what the error must contain.
DATA: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "missing": (lambda p: p / "no", ["data.path: expected a .parquet", "no (No such file"]),
    "unknown format": (lambda p: write_text(p / "a.txt"), ["data.path: expected a .parquet"]),
    "empty folder": (lambda p: p, ["data.path: expected a folder for each class, got none"]),
    "no class folders": (
        lambda p: write_folder(p, "a.png"),
        ["data.path: expected a folder for each class, got none"],
    ),
    "empty class": (
        lambda p: write_folder(p, "a/0.png", "b/note.txt"),
        ["data.path: expected images in every class folder", "/b"],
    ),
    "no training split": (
        lambda p: write_folder(p, "test/a/0.png"),
        ["data.path: expected training data, got only test in"],
    ),
    "other classes": (
        lambda p: write_folder(p, "train/a/0.png", "train/b/0.png", "val/a/0.png", "val/c/0.png"),
        ["data.path: expected the class names of the training data, got c in place of b"],
    ),
    "fewer classes": (
        lambda p: write_folder(p, "train/a/0.png", "train/b/0.png", "test/a/0.png"),
        ["data.path: expected the class names of the training data, got nothing in place of b"],
    ),
    "empty file": (
        lambda p: write_folder(write_folder(p, *SIX), "a/1.jpg", image=b""),
        [UNREADABLE, "a/1.jpg"],
    ),
    "not an image": (
        lambda p: write_folder(write_folder(p, *SIX), "b/1.png", image=b"hello"),
        [UNREADABLE, "b/1.png"],
    ),
    "truncated file": (
        lambda p: write_half(write_folder(p, *SIX) / SIX[4]).parents[1],
        [UNREADABLE, SIX[4]],
    ),
    "sixteen bits": (
        lambda p: write_folder(p, *BOTH, image=png(GREY[0].astype(np.uint16) * 257)),
        ["data.path: expected an image of 8 bits per channel, got mode I;16", "a/0.png"],
    ),
    "one class in a folder": (
        lambda p: write_folder(p, "train/a/0.png", "train/a/1.png", "val/a/2.png"),
        ["data.path: expected training images of at least two classes, got one class, a:", "train"],
    ),
    "one class in a parquet file": (
        lambda p: write_parquet(p / "a.parquet", PNGS, LABELS * 0 + 1, ["cat", "dog"]),
        ["of at least two classes, got one class, dog: row 0 of", "a.parquet"],
    ),
    "one class in a tar": (
        lambda p: write_tar(p / "a.tar", PNGS, b"3"),
        ["of at least two classes, got one class, 3: sample 000 of", "a.tar"],
    ),
    "one class in an npz": (
        lambda p: write_npz(p / "a.npz", labels=LABELS * 0),
        ["of at least two classes, got one class, 0: row 0 of", "a.npz"],
    ),
    "two sizes": (
        lambda p: write_folder(write_folder(p, "a/0.png"), "b/1.png", image=png(SMALLER[0])),
        [ONE_SIZE, "a/0.png) and 6x6 (", "b/1.png)"],
    ),
    "no rows": (
        lambda p: write_parquet(p / "a.parquet", [], np.zeros(0, int)),
        ["data.path: expected at least one image, got none in", "a.parquet"],
    ),
    "fractions as labels": (
        lambda p: write_parquet(p / "a.parquet", PNGS[:1], [0.5]),
        ["data.path: expected integers or text as labels, got double in column label of"],
    ),
    "no label": (
        lambda p: write_parquet(p / "a.parquet", PNGS[:3], [0, None, 1]),
        ["data.path: expected a label in every row of column label, got none: row 1 of"],
    ),
    "label without name": (
        lambda p: write_parquet(p / "a.parquet", PNGS, LABELS, ["a", "b", "c"]),
        ["data.path: expected labels in 0..2, got 3: row 3 of", "a.parquet"],
    ),
    "damaged parquet": (
        lambda p: write_text(p / "a.parquet"),
        ["data.path: expected a readable parquet file, got", "a.parquet"],
    ),
    "truncated parquet": (
        lambda p: write_half(write_parquet(p / "a.parquet", PNGS, LABELS)),
        ["data.path: expected a readable parquet file, got", "a.parquet"],
    ),
    "half of the files split": (
        lambda p: (
            write_parquet(
                write_parquet(p / "train.parquet", PNGS, LABELS).with_name("extra.parquet"),
                PNGS,
                LABELS,
            ).parent
        ),
        ["in the name of every file or of none, got", "extra.parquet"],
    ),
    "two lists of names": (
        lambda p: (
            write_parquet(
                write_parquet(p / "a.parquet", PNGS, LABELS, list("abcd")).with_name("b.parquet"),
                PNGS,
                LABELS,
                list("abdc"),
            ).parent
        ),
        ["data.path: expected the class names of", "got other ones in", "b.parquet"],
    ),
    "empty image in a row": (
        lambda p: write_parquet(p / "a.parquet", [*PNGS[:5], b"", *PNGS[6:]], LABELS),
        [UNREADABLE, "row 5 of", "a.parquet"],
    ),
    "no image in a row": (
        lambda p: write_parquet(p / "a.parquet", [*PNGS[:5], None, *PNGS[6:]], LABELS),
        [UNREADABLE, "row 5 of", "a.parquet"],
    ),
    "truncated image that no first look sees": (
        lambda p: write_parquet(
            p / "a.parquet", [*MANY[:172], PNGS[1][:-60], *MANY[173:]], np.arange(300) % 2
        ),
        [UNREADABLE, "row 172 of", "a.parquet"],
    ),
    "size that no first look sees": (
        lambda p: write_parquet(
            p / "a.parquet", [*MANY[:172], png(COLOUR[0, :6]), *MANY[173:]], np.arange(300) % 2
        ),
        [ONE_SIZE, "row 0 of", "and 8x6 (row 172 of"],
    ),
    "not square": (
        lambda p: write_npz(p / "a.npz", COLOUR[:, :6]),
        ["data.image_size: expected square images or --data.image_size, got 8x6 (row 0 of"],
    ),
    "enormous label": (
        lambda p: write_npz(p / "a.npz", labels=LABELS + 10**12),
        ["data.path: expected labels in 0..1048575, got 1000000000000: row 0 of"],
    ),
    "negative label": (
        lambda p: write_npz(p / "a.npz", labels=LABELS - 1),
        ["data.path: expected labels in 0..2, got -1: row 0 of", "a.npz"],
    ),
    "objects": (
        lambda p: write_npz(p / "a.npz", labels=OBJECTS),
        ["data.path: expected a readable array without Python objects, got labels in", "a.npz"],
    ),
    "text named tar": (
        lambda p: write_text(p / "a.tar"),
        ["data.path: expected an uncompressed .tar file, got", "a.tar; --data.bad_images skip"],
    ),
    "truncated tar": (
        lambda p: write_half(write_tar(p / "a.tar", PNGS)),
        ["data.path: expected a whole .tar file, got", "a.tar, cut off or damaged at byte"],
    ),
    "empty tar": (
        lambda p: write_tar(p / "a.tar", []),
        ["data.path: expected at least one sample, got none in", "a.tar"],
    ),
    "text labels in a tar": (
        lambda p: write_tar(p / "a.tar", PNGS, b"cat"),
        ["data.path: expected an integer as label", "got 'cat': sample 000 of", "a.tar"],
    ),
    "negative labels in a tar": (
        lambda p: write_tar(p / "a.tar", PNGS, b"-1"),
        ["data.path: expected labels in 0..0, got -1: sample 000 of", "a.tar"],
    ),
    "empty image in a tar": (
        lambda p: write_tar(p / "a.tar", [*PNGS[:5], b"", *PNGS[6:]]),
        [UNREADABLE, "sample 005 of", "a.tar"],
    ),
    "truncated image in a tar": (
        lambda p: write_tar(p / "a.tar", [*MANY[:172], PNGS[1][:-60], *MANY[173:]]),
        [UNREADABLE, "sample 172 of", "a.tar"],
    ),
    "shard that is not there": (
        lambda p: write_tar(p / "a0.tar", PNGS).with_name("a{0..1}.tar"),
        ["data.path: expected all files of", "a{0..1}.tar, got no", "a1.tar"],
    ),
    "backward range": (
        lambda p: p / "a{9..0}.parquet",
        ["data.path: expected a range that counts up, got {9..0} in"],
    ),
    "largest label": (
        lambda p: write_npz(p / "a.npz", labels=LABELS + (2**63 - 4)),
        ["data.path: expected labels in 0..1048575, got 9223372036854775804: row 0 of"],
    ),
    "damaged npz": (
        lambda p: write_text(p / "a.npz"),
        ["data.path: expected a readable .npz file, got", "a.npz"],
    ),
    "truncated npz": (
        lambda p: write_half(write_npz(p / "a.npz")),
        ["data.path: expected a readable .npz file, got", "a.npz"],
    ),
    "npy named npz": (
        lambda p: write_array(p / "a.npz"),
        ["data.path: expected an .npz file of named arrays, got one array in"],
    ),
    "fewer labels": (
        lambda p: write_npz(p / "a.npz", labels=LABELS[:7]),
        ["data.path: expected as many images as labels, got 20 and 7 in"],
    ),
    "float labels": (
        lambda p: write_npz(p / "a.npz", labels=LABELS.astype(float)),
        ["data.path: expected integer labels [N], got float64 [20] in"],
    ),
    "one-hot labels": (
        lambda p: write_npz(p / "a.npz", labels=np.eye(20, dtype=int)),
        ["data.path: expected integer labels [N], got int64 [20, 20] in"],
    ),
    "one label": (
        lambda p: write_npz(p / "a.npz", labels=np.int64(1)),
        ["data.path: expected as many images as labels, got 20 and 1 in"],
    ),
    "integer images": (
        lambda p: write_npz(p / "a.npz", COLOUR.astype(int)),
        ["data.path: expected uint8 images or floats in [0, 1], got int64 in"],
    ),
    "floats out of range": (
        lambda p: write_npz(p / "a.npz", COLOUR.astype(np.float32)),
        ["data.path: expected float images in [0, 1], got 0 to 255 in"],
    ),
    "NaN pixels": (
        lambda p: write_npz(p / "a.npz", np.full((20, 8, 8), np.nan)),
        ["data.path: expected float images in [0, 1], got nan"],
    ),
    "flat images": (
        lambda p: write_npz(p / "a.npz", GREY.reshape(20, 64)),
        ["data.path: expected images [N, H, W]", "got [20, 64] in"],
    ),
    "two channels": (
        lambda p: write_npz(p / "a.npz", np.zeros((20, 8, 8, 2), np.uint8)),
        ["data.path: expected images [N, H, W]", "in", "a.npz"],
    ),
    "no pixels": (
        lambda p: write_npz(p / "a.npz", np.zeros((20, 0, 0, 3), np.uint8)),
        ["data.path: expected images [N, H, W]", "in", "a.npz"],
    ),
}


@pytest.mark.parametrize(("make", "fragments"), DATA.values(), ids=DATA.keys())
def test_bad_data_gets_one_clear_line(
    tmp_path: Path, make: Callable[[Path], Path], fragments: list[str]
) -> None:
    message = fail(make(tmp_path))
    for fragment in fragments:
        assert fragment in message


def test_npz_arrays_that_are_there_are_listed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", data=GREY)
    assert "expected arrays images and labels" in fail(tmp_path / "a.npz")


TEST_DATA: dict[str, tuple[Any, Any, str]] = {
    "size": (SMALLER, LABELS, "and 6x6 (row 0 of"),
    "channels": (GREY, LABELS, "data.test_path: expected colour images like the training data"),
    "labels": (COLOUR, LABELS + 1, "data.test_path: expected labels in 0..3, got 4: row 3 of"),
    "objects": (COLOUR, OBJECTS, "data.test_path: expected a readable array without"),
}


@pytest.mark.parametrize(("images", "labels", "fragment"), TEST_DATA.values(), ids=TEST_DATA.keys())
def test_test_data_that_does_not_fit_is_named(
    tmp_path: Path, images: Any, labels: Any, fragment: str
) -> None:
    test = write_npz(tmp_path / "other.npz", images, labels)
    message = fail(write_npz(tmp_path / "a.npz"), test_path=str(test))
    assert fragment in message
    assert "other.npz" in message


def test_a_split_that_an_explicit_path_lacks_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, "train/a/0.png", "train/a/1.png")
    message = fail(tmp_path, validation_path=str(tmp_path))
    assert message.startswith("data.validation_path: expected validation data, got only train in")


MODEL: list[tuple[dict[str, Any], str]] = [
    ({"num_classes": 3}, "data.path: expected labels in 0..2, got 3: row 3 of"),
    ({"num_channels": 1}, "data.path: expected grey images like the training data, got colour"),
    ({"class_names": list("abce")}, "data.path: expected the class names of the training data"),
]


@pytest.mark.parametrize(("settings", "fragment"), MODEL)
def test_other_data_that_a_model_does_not_know_is_named(
    tmp_path: Path, settings: dict[str, Any], fragment: str
) -> None:
    file = write_parquet(tmp_path / "a.parquet", PNGS, LABELS, list("abcd"))
    model: dict[str, Any] = {"num_classes": 4, "num_channels": 3, "image_size": 8} | settings
    with pytest.raises(ValueError, match=r"data\.path") as caught:
        load_evaluation_data(str(file), DataConfig(num_workers=0), batch_size=2, **model)
    assert fragment in str(caught.value)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"validation_fraction": 0.01}, "data.validation_fraction: expected at least one image"),
    ({"validation_fraction": 0.99}, "data.validation_fraction: expected at least one image"),
    ({"validation_fraction": 1.0}, "data.validation_fraction: expected a share in (0, 1), got 1.0"),
    ({"max_images": 1}, "data.max_images: expected training images of at least two classes"),
    ({"max_images": 0}, "data.max_images: expected at least 1, got 0"),
    ({"image_size": 0}, "data.image_size: expected at least 1, got 0"),
    ({"num_workers": -1}, "data.num_workers: expected at least 0, got -1"),
]


@pytest.mark.parametrize(("settings", "fragment"), SETTINGS)
def test_settings_that_the_data_cannot_meet_are_named(
    tmp_path: Path, settings: dict[str, Any], fragment: str
) -> None:
    assert fragment in fail(write_npz(tmp_path / "a.npz"), **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_in_a_stream_is_named_without_a_traceback(
    tmp_path: Path, num_workers: int
) -> None:
    photo = png(RNG.integers(0, 256, (80, 70, 3), dtype=np.uint8))
    names = [f"{'ab'[number % 2]}/{number}.png" for number in range(9)]
    write_folder(tmp_path, *names, image=photo)
    for name in names:
        write_half(tmp_path / name)
    message = fail(tmp_path, image_size=72, num_workers=num_workers)
    assert message.startswith(UNREADABLE + str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/0.png", "a/1.png")
    (tmp_path / "a/1.png").chmod(0)
    assert "a/1.png" in fail(tmp_path)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["a.npz", "a.parquet"])
def test_a_pickle_in_disguise_is_never_executed(tmp_path: Path, name: str) -> None:
    sprung = tmp_path / "sprung"
    (tmp_path / name).write_bytes(pickle.dumps(Trap(sprung)))
    assert "data.path: expected a readable" in fail(tmp_path / name)
    objects = write_npz(tmp_path / "objects.npz", np.array([Trap(sprung)] * 20, dtype=object))
    assert "without Python objects" in fail(objects)
    assert not sprung.exists()


def test_a_bad_image_is_an_error_that_says_what_would_help() -> None:
    lines: list[str] = []
    bad = BadImages(report=lines.append)
    with pytest.raises(ValueError, match=r"^a\.png is bad; --data\.bad_images skip leaves such"):
        bad.refuse("a.png is bad")
    assert (lines, bad.take(), bad.num_different) == ([], 0, 0)


def test_skipped_images_are_counted_each_time_and_reported_once() -> None:
    lines: list[str] = []
    bad = BadImages("skip", lines.append)
    for message in ("a", "b", "a", "a"):
        bad.refuse(message)
    assert lines == ["left out: a", "left out: b"]
    assert (bad.take(), bad.take(), bad.num_different) == (4, 0, 2)
    bad.refuse("a")
    assert (len(lines), bad.take(), bad.num_different) == (2, 1, 2)


def test_many_skipped_images_end_in_one_closing_line() -> None:
    lines: list[str] = []
    bad = BadImages("skip", lines.append)
    for number in range(3 * MOST_REPORTED):
        bad.refuse(f"image {number}")
    assert lines[:-1] == [f"left out: image {number}" for number in range(10)]
    assert lines[-1] == "left out: more images, which are counted and no longer named"
    assert (bad.take(), bad.num_different) == (30, 30)
