"""Images that DALI cannot decode are named, left out, or decoded by PIL; the epoch continues."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest

from safer_fast.data import Data
from safer_fast.data.dali.pipeline import DecodingRun
from tests.support.bad_images import (
    BAD,
    GOOD,
    MIDDLE,
    REFUSED_BY_DALI,
    write_around,
)
from tests.support.pictures import (
    ONE_LINE,
    SIZES,
    assert_same,
    differences,
    encode,
    images_by_label,
    load,
    load_photos,
    num_alive,
    photo,
    whole,
    write,
)

pytest.importorskip("nvidia.dali")


CUT_OFF = ["half a JPEG", "nearly all of a JPEG", "all but a byte of a JPEG"]
UNUSUAL = {
    "garbage in the middle of a JPEG": GOOD[:MIDDLE] + bytes(range(40)) + GOOD[MIDDLE + 40 :],
    "half a JPEG with an end": GOOD[:MIDDLE] + b"\xff\xd9",
}


def fail(data: Data) -> str:
    """The error that reading an epoch of the test split ends with."""
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        list(whole(data).epoch(1))
    return str(caught.value)


@pytest.mark.parametrize("file", BAD.values(), ids=BAD.keys())
def test_a_bad_image_is_named_with_what_would_help(file: bytes, tmp_path: Path) -> None:
    path = write_around(tmp_path, file)
    reported: list[str] = []
    message = fail(load_photos(path, reported=reported))
    assert message == fail(load_photos(path, "torch"))
    assert str(path / "003" / "photo.jpg") in message
    assert message.endswith("; --data.bad_images skip leaves such images out")
    assert not any(line.startswith("left out") for line in reported)


@pytest.mark.parametrize("file", BAD.values(), ids=BAD.keys())
def test_a_bad_image_is_left_out_counted_and_reported_once(file: bytes, tmp_path: Path) -> None:
    path = write_around(tmp_path, file)
    reported: list[str] = []
    data = load_photos(path, reported=reported, bad_images="skip")
    for epoch in (1, 2):
        batches = list(whole(data).epoch(epoch))
        assert [len(batch.labels) for batch in batches] == [5, 5]
        assert [batch.num_padding for batch in batches] == [1, 1]
        assert list(images_by_label(batches)) == [0, 1, 2, 4, 5, 6, 7, 8]
        assert data.bad.take() == 1
    left_out = [line for line in reported if line.startswith("left out: ")]
    assert len(left_out) == data.bad.num_different == 1
    assert "003/photo.jpg" in left_out[0]
    plain = load_photos(path, "torch", reported=[], bad_images="skip")
    again = whole(data).epoch(1)
    assert max(differences(again, whole(plain).epoch(1))) < 0.1


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_jpeg_that_was_cut_off_does_not_stop_dali(name: str, tmp_path: Path) -> None:
    reported: list[str] = []
    data = load_photos(write_around(tmp_path, BAD[name]), reported=reported, bad_images="skip")
    list(whole(data).epoch(1))
    assert len(reported) == 1
    assert reported[0].startswith("left out: ")


@pytest.mark.parametrize("file", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_a_damaged_jpeg_that_pil_takes_is_taken(file: bytes, tmp_path: Path) -> None:
    path = write_around(tmp_path, file)
    dali, plain = load_photos(path), load_photos(path, "torch")
    assert max(differences(whole(dali).epoch(1), whole(plain).epoch(1))) < 0.1
    assert dali.bad.take() == 0


@pytest.mark.parametrize("file", REFUSED_BY_DALI.values(), ids=REFUSED_BY_DALI.keys())
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_an_image_that_only_dali_refuses_is_decoded_by_pil(
    file: bytes, policy: str, tmp_path: Path, pipelines: list[weakref.ref[Any]]
) -> None:
    path = write_around(tmp_path, file)
    reported: list[str] = []
    dali = load_photos(path, reported=reported, bad_images=policy)
    plain = load_photos(path, "torch")
    for epoch in (1, 2):
        found = differences(whole(dali).epoch(epoch), whole(plain).epoch(epoch))
        assert max(found) < 0.1
    assert len(pipelines) == 2 * 2
    assert num_alive(pipelines) == 0
    assert len(reported) == 1
    assert reported[0].startswith("note:       DALI failed on a batch, PIL decoded it (")
    assert dali.bad.take() == 0


def test_the_note_on_a_failure_of_dali_says_what_failed(tmp_path: Path) -> None:
    reported: list[str] = []
    path = write_around(tmp_path, REFUSED_BY_DALI["a PNG without its end"])
    list(whole(load_photos(path, reported=reported)).epoch(1))
    assert "no longer valid" not in reported[0]
    assert "nvImageCodec failure" in reported[0]


def test_bad_images_are_counted_once_however_often_dali_starts_again(tmp_path: Path) -> None:
    # in the batch before, in that of the one that DALI stumbles over, and in those prefetched
    path = write_around(tmp_path, BAD["text"], BAD["half a PNG"], BAD["half a JPEG"])
    reported: list[str] = []
    data = load_photos(path, batch_size=3, reported=reported, bad_images="skip", prefetch=3)
    assert len(images_by_label(whole(data).epoch(1))) == len(SIZES)
    assert sum(line.startswith("left out") for line in reported) == 3
    assert data.bad.take() == 3


def test_bad_images_are_counted_once_when_another_loader_comes_between(tmp_path: Path) -> None:
    path = write_around(tmp_path / "train", BAD["text"], BAD["half a JPEG"])
    good = write(tmp_path / "good", [GOOD] * (len(SIZES) + 2))
    settings: dict[str, Any] = {"bad_images": "skip", "validation_path": str(good), "prefetch": 3}
    data = load_photos(path, batch_size=3, reported=[], **settings)
    for _ in whole(data).epoch(1):
        next(data.validation.epoch(1))
    assert data.bad.take() == 2


def test_batches_before_a_bad_image_come_before_its_error(tmp_path: Path) -> None:
    files = [encode(photo(80, 90, seed), "jpeg") for seed in range(11)]
    path = write(tmp_path, [*files, BAD["text"]])
    for backend in ("torch", "dali"):
        data = load_photos(path, backend, batch_size=3, prefetch=3)
        labels: list[int] = []
        with pytest.raises(ValueError, match=ONE_LINE):
            labels.extend(int(n) for batch in whole(data).epoch(1) for n in batch.labels)
        assert labels == list(range(9)), backend


def test_a_batch_of_only_bad_images_counts_for_nothing(tmp_path: Path) -> None:
    files = [encode(photo(80, 90, seed), "jpeg") for seed in range(9)]
    files[3:6] = [BAD["half a JPEG"], BAD["text"], BAD["half a PNG"]]
    data = load_photos(
        write(tmp_path, files), batch_size=3, reported=[], bad_images="skip", augmentation="none"
    )
    first, bad, last = whole(data).epoch(1)
    assert bad.num_padding == len(bad.labels) == 3
    assert not bad.images.any()
    assert float(bad.weights().sum()) == 0
    assert first.num_padding == last.num_padding == 0
    assert last.labels.tolist() == [6, 7, 8]
    assert data.bad.take() == 3


@pytest.mark.parametrize("augmentation", ["crop", "shift"])
def test_bad_images_do_not_move_the_crops_of_others(tmp_path: Path, augmentation: str) -> None:
    files = [encode(photo(32, 32, seed), "png") for seed in range(20)]
    files[4] = files[11] = BAD["text"]
    files[7] = files[7][: len(files[7]) // 2]
    path = write(tmp_path, files)
    settings: dict[str, Any] = {"bad_images": "skip", "augmentation": augmentation}
    dali, plain = (load(path, kind, reported=[], **settings) for kind in ("dali", "torch"))
    assert_same(dali.train.epoch(1), plain.train.epoch(1))


def test_a_size_that_no_first_look_sees_is_named(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    for number in range(300):
        edge = 9 if number == 172 else 8
        file = tmp_path / "ab"[number // 200] / f"{number:03}.png"
        file.write_bytes(encode(photo(edge, edge), "png"))
    data = load(tmp_path, batch_size=50, augmentation="none")
    assert "got 8x8 (" in (message := fail(data))
    assert f"and 9x9 ({tmp_path / 'a' / '172.png'})" in message


def test_a_failure_within_dali_is_noted_once_and_costs_no_image(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(load_photos(jpegs).train.epoch(1))
    reported: list[str] = []
    data = load_photos(jpegs, reported=reported)
    calls, next_batch = itertools.count(), DecodingRun.next_batch

    def failing_twice(run: DecodingRun) -> Any:
        if next(calls) in (1, 3):
            raise RuntimeError("x")
        return next_batch(run)

    monkeypatch.setattr(DecodingRun, "next_batch", failing_twice)
    found = differences(data.train.epoch(1), expected)
    assert len(found) == 5
    assert max(found) < 0.1
    assert found[0] == found[2] == found[4] == 0
    assert reported == ["note:       DALI failed on a batch, PIL decoded it (x)"]


def test_a_failure_within_dali_leaves_small_images_the_same_bits(
    pngs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(run: DecodingRun) -> Any:
        raise RuntimeError("x")

    expected = list(load(pngs, augmentation="crop").train.epoch(1))
    monkeypatch.setattr(DecodingRun, "next_batch", failing)
    assert_same(load(pngs, augmentation="crop", reported=[]).train.epoch(1), expected)
