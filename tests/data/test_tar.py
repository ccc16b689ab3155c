"""Webdataset shards are read as documented, whatever they contain."""

from __future__ import annotations

import gc
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safer_fast.config.schema import DataConfig
from safer_fast.data import load_data
from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats import SkippedFiles, Source, open_splits, tar
from safer_fast.data.formats.tar import TarSource
from tests.support.cases import named
from tests.support.sets import Member, write_tar

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
HINT = "; --data.bad_images skip leaves such images out"
NO_IMAGE = "data.path: expected one image in each sample, got none: sample "
NO_LABEL = "data.path: expected an integer as label (cls, or label in json), got "
NOT_WHOLE = "data.path: expected a whole .tar file, got "


def encode(number: int, extension: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[number]).save(buffer, extension)
    return buffer.getvalue()


def sample(number: int) -> list[Member]:
    return [(f"{number:03}.png", encode(number)), (f"{number:03}.cls", b"%d\n" % (number % 4))]


def samples(*numbers: int) -> list[Member]:
    return [member for number in numbers for member in sample(number)]


def write_special(file: Path, *infos: tarfile.TarInfo, members: Sequence[Member] = ()) -> Path:
    """Members that are no regular files, before those that are."""
    blocks = b"".join(info.tobuf() for info in infos)
    file.write_bytes(blocks + write_tar(file, members).read_bytes())
    return file


def special(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def cut(file: Path, num_bytes: int) -> Path:
    file.write_bytes(file.read_bytes()[:num_bytes])
    return file


def open_all(path: Path | str) -> Source:
    return open_splits(str(path), "data.path")["all"]


def fail(path: Path | str, policy: str = "error") -> str:
    """The one line that opening ends with."""
    bad = BadImages("skip" if policy == "skip" else "error", report=lambda line: None)
    with pytest.raises(ValueError, match=r"^data\.path: expected [^\n]+, got [^\n]+$") as caught:
        open_splits(str(path), "data.path", bad)
    return str(caught.value)


def skip(path: Path) -> tuple[Source, list[str]]:
    """The samples left under policy skip, and the lines that were reported."""
    lines: list[str] = []
    source = open_splits(str(path), "data.path", BadImages("skip", lines.append))["all"]
    return source, [line.removeprefix("left out: ") for line in lines]


def keys(source: Source) -> list[str]:
    return [source.describe(row).split()[1] for row in range(len(source))]


def expect_images(source: Source, numbers: Sequence[int]) -> None:
    assert source.labels.tolist() == [number % 4 for number in numbers]
    assert source.labels.dtype == np.int64
    for row, number in enumerate(numbers):
        assert np.array_equal(np.asarray(source.read(row)), IMAGES[number])


def test_a_shard_gives_the_samples_that_were_written_in_their_order(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "pets.tar", samples(2, 0, 1))
    source = open_all(file)
    expect_images(source, [2, 0, 1])
    assert source.describe(1) == f"sample 000 of {file}"
    assert source.class_names is None


def test_a_run_is_trained_on_shards_as_on_any_format(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "pets.tar", samples(*range(12)))
    data = load_data(DataConfig(path=str(file), augmentation="none"), batch_size=2, seed=0)
    batches = [*data.train.epoch(1), *data.validation.epoch(1)]
    found = {
        image.numpy().tobytes(): label
        for batch in batches
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True)
    }
    written = {
        np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes(): number % 4
        for number, image in enumerate(IMAGES)
    }
    assert found.items() <= written.items()
    assert (len(batches), data.num_classes, data.name) == (7, 4, "pets")


@pytest.mark.parametrize("name", ["JPG", "jpeg", "png", "webp", "ppm", "bmp", "gif", "tif", "tiff"])
def test_every_usual_extension_is_an_image(tmp_path: Path, name: str) -> None:
    content = encode(0, {"JPG": "jpeg", "tif": "tiff"}.get(name, name))
    source = open_all(write_tar(tmp_path / "a.tar", [("0." + name, content), ("0.cls", b"3")]))
    assert (source.read(0).size, source.labels.tolist()) == ((8, 8), [3])


LABELS: list[tuple[list[Member], int]] = [
    ([("0.cls", b" 7\n")], 7),
    ([("0.CLS", b"7")], 7),
    ([("0.json", b'{"label": 7, "cls": 1}')], 7),
    ([("0.json", b'{"cls": 7}')], 7),
    ([("0.json", b'{"label": "dog", "cls": 7}')], 7),
    ([("0.cls", b"7"), ("0.json", b'{"label": 1}')], 7),
    ([("0.json", b'{"caption": "a dog"}'), ("0.cls", b"7"), ("0.txt", b"a dog")], 7),
]


@pytest.mark.parametrize(("members", "label"), LABELS)
def test_labels_come_from_cls_or_json(tmp_path: Path, members: list[Member], label: int) -> None:
    file = write_tar(tmp_path / "a.tar", [("0.png", encode(0)), *members])
    assert open_all(file).labels.tolist() == [label]


def test_samples_whose_json_has_another_class_than_their_cls_are_noted(tmp_path: Path) -> None:
    contents = [b'{"label": 1}', b'{"label": 7}', b'{"label": 2}', b'{"label": "dog"}', b"?"]
    members: list[Member] = []
    for number, content in enumerate(contents):
        key = str(number)
        members += [(f"{key}.png", encode(0)), (f"{key}.cls", b"7"), (f"{key}.json", content)]
    file = write_tar(tmp_path / "a.tar", members)
    skipped = SkippedFiles()
    source = open_splits(str(file), "data.path", skipped=skipped)["all"]
    assert source.labels.tolist() == [7] * 5
    (line,) = skipped.lines()
    assert (
        line == f"data: .cls counts in 2 samples whose .json has another class: sample 0 of {file}"
    )


def test_class_names_are_the_lines_of_the_file_beside_the_shards(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", samples(0, 1, 2, 3))
    (tmp_path / "classnames.txt").write_text("cat\nguinea pig\r\nfox\nhen\n")
    assert open_all(file).class_names == ["cat", "guinea pig", "fox", "hen"]
    (tmp_path / "classnames.txt").write_text("cat\ndog\nfox\n")
    assert fail(file) == f"data.path: expected labels in 0..2, got 3: sample 003 of {file}"
    (tmp_path / "classnames.txt").write_bytes(b"\xff\n")
    assert fail(file).startswith("data.path: expected class names in UTF-8, got ")
    (tmp_path / "classnames.txt").write_text("\n")
    assert open_all(file).class_names is None


def test_keys_end_at_the_first_dot_of_the_last_component(tmp_path: Path) -> None:
    members = [
        ("v1.0/a.png", encode(0)),
        ("v1.0/a.seg.png", encode(1)),
        ("v1.0/a.cls", b"0"),
        ("v1.0/._b.png", b"what macOS adds"),
        ("README", b"no extension"),
        ("v1.0/b.png", encode(1)),
        ("v1.0/b.cls", b"1"),
    ]
    source = open_all(write_tar(tmp_path / "a.tar", members))
    assert keys(source) == ["v1.0/a", "v1.0/b"]
    expect_images(source, [0, 1])


def test_the_same_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, samples(0))
    source = open_all(tmp_path)
    described = [source.describe(row) for row in range(len(source))]
    assert described == [f"sample 000 of {tmp_path / name}" for name in ("a.tar", "b.tar")]


def test_images_are_the_bytes_of_their_members(tmp_path: Path) -> None:
    source = open_all(write_tar(tmp_path / "a.tar", samples(0, 1)))
    assert isinstance(source, TarSource)
    assert [source.encoded(row).tobytes() for row in (1, 0)] == [encode(1), encode(0)]
    assert not source.encoded(0).flags.writeable


def test_a_pickled_source_holds_no_image_and_opens_its_shards_anew(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.bmp", encode(0, "bmp") + bytes(10**6)), ("0.cls", b"0")])
    source = open_all(tmp_path)
    expect_images(source, [0])
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    expect_images(copy, [0])
    assert (copy.describe(0), copy.flag) == (source.describe(0), source.flag)
    del source
    gc.collect()
    expect_images(copy, [0])  # descriptors are its own


def test_a_thousand_samples_are_indexed(tmp_path: Path) -> None:
    members = [(f"{number}.{name}", b"1") for number in range(1000) for name in ("jpg", "cls")]
    source = open_all(write_tar(tmp_path / "a.tar", members))
    assert len(source) == 1000
    assert source.describe(999).startswith("sample 999 of")


def test_several_processes_find_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", samples(number, number + 5))
    write_tar(tmp_path / "3.tar", [*samples(3), ("text.txt", b""), *samples(8)])
    alone, alone_lines = skip(tmp_path)
    monkeypatch.setattr(tar, "LARGEST_ALONE", 0)
    source, lines = skip(tmp_path)
    assert (keys(source), lines) == (keys(alone), alone_lines)
    expect_images(source, [0, 5, 1, 6, 2, 7, 3, 8, 4, 9])
    write_tar(tmp_path / "2.tar", [("a.png", b"")])
    assert "got none: sample a of" in fail(tmp_path)


def test_a_pattern_names_shards_and_keeps_zeros(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number % 2}/train-{number // 2:03}.tar", samples(number))
    source = open_all(tmp_path / "{0..1}/train-{000..005}.tar")
    expect_images(source, [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])
    expect_images(open_all(tmp_path / "0/train-{2..003}.tar"), [4, 6])


def test_a_pattern_without_zeros_counts_plainly(tmp_path: Path) -> None:
    for number in range(8, 12):
        write_tar(tmp_path / f"a{number}.tar", samples(number))
    expect_images(open_all(tmp_path / "a{8..11}.tar"), [8, 9, 10, 11])


def test_a_pattern_that_names_too_much_or_nothing_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a0.tar", samples(0))
    pattern = tmp_path / "a{0..99999999999}.tar"
    message = f"data.path: expected all files of {pattern}, got no {tmp_path / 'a1.tar'}"
    assert fail(pattern) == message
    assert "expected a range that counts up, got {9..0} in " in fail(tmp_path / "a{9..0}.tar")
    (tmp_path / "a0.txt").touch()
    assert fail(tmp_path / "a{0..0}.txt").startswith("data.path: expected a .parquet or .tar file")


def test_a_folder_of_shards_is_split_by_their_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000.tar", samples(0, 1))
    write_tar(tmp_path / "train-001.tar", samples(2))
    write_tar(tmp_path / "val-000.tar", samples(3))
    write_tar(tmp_path / "test-000.tar", samples(4))
    splits = open_splits(str(tmp_path), "data.path")
    assert {name: len(source) for name, source in splits.items()} == {
        "test": 1,
        "train": 3,
        "validation": 1,
    }
    expect_images(splits["train"], [0, 1, 2])
    write_tar(tmp_path / "more.tar", samples(5))
    assert "expected train, val or test in the name of every file" in fail(tmp_path)


def test_image_folders_beside_the_archive_they_came_from_are_what_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", [("n01440764.tar", b"")])
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/0.png").write_bytes(encode(0))
    assert set(open_splits(str(tmp_path), "data.path")) == {"train"}


REFUSED: dict[str, tuple[list[Member], list[int], str]] = {
    "no image": (
        [*samples(0), ("a.txt", b"x"), ("a.cls", b"1"), *samples(1)],
        [0, 1],
        NO_IMAGE + "a of",
    ),
    "not in one place": (
        [("a.png", encode(0)), *samples(1), ("a.cls", b"0"), *samples(2)],
        [],
        NO_LABEL + "none: sample a of",
    ),
    "several images": (
        [*samples(0), ("a.png", encode(0)), ("a.jpg", b""), ("a.cls", b"1")],
        [0],
        "data.path: expected one image in each sample, got several: sample a of",
    ),
    "a key of several lines": (
        [*samples(0), ("a\nb\x1b[2J.txt", b"")],
        [0],
        NO_IMAGE + "a?b?[2J of",
    ),
}


@pytest.mark.parametrize(("members", "left", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_samples_without_one_image_are_named_or_left_out(
    tmp_path: Path, members: list[Member], left: list[int], message: str
) -> None:
    file = write_tar(tmp_path / "a.tar", members)
    if not left:
        assert fail(file) == fail(file, "skip") == f"{message} {file}"
        return
    assert fail(file) == f"{message} {file}{HINT}"
    source, lines = skip(file)
    expect_images(source, left)
    assert lines == [f"{message} {file}"]


BAD_LABELS: dict[str, tuple[list[Member], str]] = {
    "none": ([], "none"),
    "text": ([("a.cls", b"cat")], "'cat'"),
    "several lines": ([("a.cls", b"cat\ndog")], "'cat\\ndog'"),
    "empty": ([("a.cls", b"")], "''"),
    "no ASCII digits": ([("a.cls", "٣".encode())], "'"),
    "enormous": ([("a.cls", b"9" * 10**5)], "'9999"),
    "float": ([("a.json", b'{"label": 1.0}')], "1.0"),
    "bool": ([("a.json", b'{"label": true}')], "True"),
    "text in json": ([("a.json", b'{"label": "1"}')], "'1'"),
    "null in json": ([("a.json", b'{"label": null}')], "None"),
    "enormous in json": ([("a.json", b'{"label": 99999999999999999999}')], "99999999"),
    "no label in json": ([("a.json", b'{"caption": "cat"}')], "none"),
    "list": ([("a.json", b'["label"]')], "json without names"),
    "number": ([("a.json", b"3")], "json without names"),
    "damaged json": ([("a.json", b'{"label": ')], "unreadable json"),
    "deep json": ([("a.json", b"[" * 10**5)], "unreadable json"),
    "many digits in json": ([("a.json", b'{"label": ' + b"9" * 10**4 + b"}")], "unreadable json"),
    "bytes": ([("a.json", b"\xff\xfe\xfa")], "unreadable json"),
}


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_labels_that_are_missing_or_no_integers_are_always_errors(
    tmp_path: Path, policy: str
) -> None:
    for name, (members, got) in BAD_LABELS.items():
        with named(name):
            around = [*samples(0), ("a.png", encode(0)), *members, *samples(1)]
            file = write_tar(tmp_path / f"{name}.tar", around)
            message = fail(file, policy)
            assert message.startswith(NO_LABEL + got)
            assert message.endswith(f": sample a of {file}")


# Where a shard of two samples (headers and contents of 512 bytes each) is cut: images left.
CUTS = {
    "in the first header": (100, None),
    "in the first image": (600, None),
    "before the second sample": (2048, [0]),
    "in the second header": (2100, [0]),
    "in the second image": (2700, [0]),
    "before the second label": (3072, [0]),
    "in the header of the second label": (3100, [0]),
    "in the second label": (3584, [0]),
    "after the second label": (3586, [0, 1]),
    "before the end marker": (4096, [0, 1]),
    "in the end marker": (4097, [0, 1]),
}


@pytest.mark.parametrize(("num_bytes", "left"), CUTS.values(), ids=CUTS.keys())
def test_a_truncated_shard_is_named_or_keeps_its_whole_samples(
    tmp_path: Path, num_bytes: int, left: list[int] | None
) -> None:
    assert len(encode(0)) < 512
    write_tar(tmp_path / "a.tar", samples(2))
    file = cut(write_tar(tmp_path / "b.tar", samples(0, 1)), num_bytes)
    message = fail(tmp_path)
    if num_bytes < 512:
        assert message == f"data.path: expected an uncompressed .tar file, got {file}{HINT}"
    else:
        assert message.startswith(f"{NOT_WHOLE}{file}, cut off or damaged at byte ")
    source, lines = skip(tmp_path)
    expect_images(source, [2, *(left or [])])
    assert lines == [message.removesuffix(HINT)]


def test_one_block_of_zeros_ends_a_shard(tmp_path: Path) -> None:
    file = cut(write_tar(tmp_path / "a.tar", samples(0, 1)), 4096 + 512)
    expect_images(open_all(file), [0, 1])


def test_what_lies_behind_damage_is_not_guessed(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", samples(0, 1))
    content = bytearray(file.read_bytes())
    content[2048:2148] = b"?" * 100
    file.write_bytes(content)
    assert fail(file) == f"{NOT_WHOLE}{file}, cut off or damaged at byte 2048{HINT}"
    source, lines = skip(file)
    expect_images(source, [0])
    assert len(lines) == 1


def compress(file: Path) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    return file


UNREADABLE: dict[str, Callable[[Path], Path | int]] = {
    "compressed": compress,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no archive " * 100),
    "noise": lambda file: file.write_bytes(RNG.bytes(5000)),
}


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_shard_that_is_no_tar_is_named_or_left_out(
    tmp_path: Path, make: Callable[[Path], Path | int]
) -> None:
    file = tmp_path / "b.tar"
    make(file)
    message = f"data.path: expected an uncompressed .tar file, got {file}"
    assert fail(file) == message + HINT
    assert fail(file, "skip") == f"data.path: expected at least one sample, got none in {file}"
    write_tar(tmp_path / "a.tar", samples(0))
    source, lines = skip(tmp_path)
    expect_images(source, [0])
    assert lines == [message]


def test_shards_without_samples_are_an_error_only_where_all_are(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar", [("README", b"")])
    message = "data.path: expected at least one sample, got none in "
    assert fail(tmp_path) == f"{message}{tmp_path / 'a.tar'} to {tmp_path / 'b.tar'}"
    write_tar(tmp_path / "c.tar", samples(0))
    expect_images(open_all(tmp_path), [0])


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(0))
    (tmp_path / "b.tar").symlink_to(tmp_path / "gone.tar")
    assert f"got {tmp_path / 'b.tar'} (No such file or directory)" in fail(tmp_path)


def test_names_that_point_elsewhere_do_no_harm(tmp_path: Path) -> None:
    names = ["../../outside", "/tmp/outside", "~/outside"]
    members = [
        member
        for number, name in enumerate(names)
        for member in ((f"{name}.png", encode(number)), (f"{name}.cls", b"%d" % number))
    ]
    file = write_tar(tmp_path / "inside/shards/a.tar", members)
    source = open_all(file)
    expect_images(source, [0, 1, 2])
    assert keys(source) == names
    assert {path.name for path in tmp_path.rglob("*")} == {"inside", "shards", "a.tar"}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_only_regular_files_count(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode(0))
    member = special("a.png", kind, str(secret))
    file = write_special(tmp_path / "a.tar", member, members=[("a.cls", b"0"), *samples(1)])
    assert fail(file) == f"{NO_IMAGE}a of {file}{HINT}"
    expect_images(skip(file)[0], [1])


CRAFTED = {
    "negative": special("a.png", tarfile.REGTYPE, size=-1024),
    "beyond the end": special("a.png", tarfile.REGTYPE, size=10**9),
    "beyond 64 bits": special("a.png", tarfile.REGTYPE, size=2**70),
    "long name beyond the end": special("a.png", tarfile.GNUTYPE_LONGNAME, size=2**70),
    "negative long name": special("a.png", tarfile.GNUTYPE_LONGNAME, size=-1024),
    "negative extended header": special("a.png", tarfile.XHDTYPE, size=-1024),
    "sparse": special("a.png", tarfile.GNUTYPE_SPARSE, size=-1024),
}


@pytest.mark.parametrize("crafted", CRAFTED.values(), ids=CRAFTED.keys())
def test_crafted_sizes_are_damage(tmp_path: Path, crafted: tarfile.TarInfo) -> None:
    block = crafted.tobuf(tarfile.GNU_FORMAT)
    whole = write_tar(tmp_path / "a.tar", samples(0, 1)).read_bytes()
    for before in (0, 2048):
        file = tmp_path / f"b{before}.tar"
        file.write_bytes(whole[:before] + block + whole[before:])
        assert fail(file).startswith("data.path: expected a")
    source, lines = skip(file)
    expect_images(source, [0])
    assert lines[0].startswith(NOT_WHOLE)


def test_a_chain_of_long_names_is_damage(tmp_path: Path) -> None:
    link = special("a", tarfile.GNUTYPE_LONGNAME, size=1).tobuf() + b"a".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(link * 5000)
    assert fail(tmp_path / "a.tar").startswith("data.path: expected an uncompressed .tar file")


def test_a_key_of_any_length_takes_little_room(tmp_path: Path) -> None:
    long = "é" * 50_000
    members = [(f"{long}.png", encode(0)), (f"{long}.cls", b"0"), *samples(1)]
    source = open_all(write_tar(tmp_path / "a.tar", members))
    expect_images(source, [0, 1])
    assert isinstance(source, TarSource)
    assert source.keys.itemsize <= 200
    assert source.describe(0).startswith("sample éé")


def test_the_largest_integer_is_refused_as_label(tmp_path: Path) -> None:
    label = json.dumps({"label": 2**63 - 1}).encode()
    file = write_tar(tmp_path / "a.tar", [("a.png", encode(0)), ("a.json", label)])
    assert "expected labels in 0..1048575, got 9223372036854775807: sample a of" in fail(file)
