"""DALI gives the batches of the torch backend, in order, crops and pixels."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from safer_fast.data import reading
from safer_fast.data.augmentation import Crop
from safer_fast.data.dali import loader as dali_module
from tests.support.pictures import (
    assert_same,
    differences,
    encode,
    find_data,
    images_by_label,
    load,
    load_photos,
    num_alive,
    photo,
    whole,
)

pytest.importorskip("nvidia.dali")


def test_training_batches_are_those_of_the_torch_backend(jpegs: Path) -> None:
    dali, plain = load_photos(jpegs), load_photos(jpegs, "torch")
    assert (dali.train.backend, plain.train.backend) == ("dali", "torch")
    for epoch in (1, 2):
        found = differences(dali.train.epoch(epoch), plain.train.epoch(epoch))
        # asked for are 2; on a CPU it is the same resizing of the same bits
        assert max(found) < 0.1


def test_evaluation_batches_are_those_of_the_torch_backend(jpegs: Path) -> None:
    dali, plain = load_photos(jpegs), load_photos(jpegs, "torch")
    assert max(differences(whole(dali).epoch(1), whole(plain).epoch(1))) < 0.1
    assert max(differences(dali.validation.epoch(1), plain.validation.epoch(1))) < 0.1
    assert max(differences(dali.train.probe(12, 1), plain.train.probe(12, 1))) < 0.1


def test_pixels_differ_from_those_of_pil_images_by_one_level_at_most(jpegs: Path) -> None:
    dali, plain = load_photos(jpegs), load_photos(jpegs, "torch")
    epochs = [
        (dali.train.epoch(1), plain.train.epoch(1)),
        (whole(dali).epoch(1), whole(plain).epoch(1)),
    ]
    for one, other in itertools.chain(*(zip(*pair, strict=True) for pair in epochs)):
        assert (one.images.int() - other.images.int()).abs().max() <= 1


def record_crops(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Record the arguments and results of the module's calls of `draw_crop`."""
    calls: list[tuple[Any, ...]] = []
    draw_crop = module.draw_crop

    def recording(*arguments: int) -> Crop:
        crop: Crop = draw_crop(*arguments)
        calls.append((arguments, crop))
        return crop

    monkeypatch.setattr(module, "draw_crop", recording)
    return calls


def test_crops_are_those_of_the_torch_backend(jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_dali = record_crops(dali_module, monkeypatch)
    by_torch = record_crops(reading, monkeypatch)
    for backend in ("dali", "torch"):
        list(load_photos(jpegs, backend).train.epoch(2))
    assert by_dali == by_torch
    assert len(by_dali) == load_photos(jpegs).train.num_images


def test_photographs_are_those_of_the_torch_backend() -> None:
    file = find_data("photos-256.parquet")
    settings: dict[str, Any] = {"image_size": 224, "max_images": 96, "test_path": None}
    dali, plain = (load(file, backend, 32, **settings) for backend in ("dali", "torch"))
    found = differences(dali.train.epoch(1), plain.train.epoch(1))
    assert len(found) == 3
    assert max(found) < 0.1
    first = (itertools.islice(data.validation.epoch(1), 2) for data in (dali, plain))
    assert max(differences(*first)) < 0.1


def test_every_class_comes_as_often_as_with_the_torch_backend(tmp_path: Path) -> None:
    for number, count in enumerate((3, 11, 6)):
        for index in range(count):
            folder = tmp_path / f"class {number}"
            folder.mkdir(exist_ok=True)
            (folder / f"{index}.jpg").write_bytes(encode(photo(80, 90, index), "jpeg"))
    counts, rows, sizes = [], [], []
    for backend in ("dali", "torch"):
        data = load_photos(tmp_path, backend, max_images=14, validation_fraction=0.25)
        labels = [batch.labels[: batch.num_images] for batch in data.train.epoch(1)]
        counts.append(torch.bincount(torch.cat(labels), minlength=3).tolist())
        rows.append(data.validation_rows)
        sizes.append((data.train.num_images, data.validation.num_images))
    assert counts[0] == counts[1]
    assert rows[0] == rows[1]
    assert sizes == [(14, 5)] * 2


@pytest.mark.parametrize("augmentation", ["none", "shift", "crop"])
def test_small_images_are_the_same_bits_with_every_backend(pngs: Path, augmentation: str) -> None:
    dali, plain, device = (
        load(pngs, backend, augmentation=augmentation) for backend in ("dali", "torch", "device")
    )
    for other in (plain, device):
        assert_same(dali.train.epoch(2), other.train.epoch(2))
        assert_same(dali.validation.epoch(1), other.validation.epoch(1))
        assert_same(dali.train.probe(9, 1), other.train.probe(9, 1))


@pytest.mark.parametrize("augmentation", ["random-resized-crop", "crop"])
def test_an_epoch_goes_on_at_any_batch_as_if_never_interrupted(
    jpegs: Path, augmentation: str
) -> None:
    loader = load_photos(jpegs, augmentation=augmentation).train
    batches = list(loader.epoch(3))
    assert len(batches) == len(loader) == 5
    for start in (0, 1, 3, 4, 5):
        assert_same(loader.epoch(3, start), batches[start:])
    fresh = load_photos(jpegs, augmentation=augmentation).train
    next(fresh.epoch(1))  # what was read before makes no difference
    assert_same(fresh.epoch(3, 2), batches[2:])


@pytest.mark.parametrize(("name", "value"), [("num_workers", 2), ("prefetch", 1), ("prefetch", 7)])
def test_threads_and_prefetching_make_no_difference(jpegs: Path, name: str, value: int) -> None:
    assert_same(
        load_photos(jpegs, **{name: value}).train.epoch(1), load_photos(jpegs).train.epoch(1)
    )


def test_epochs_differ_and_the_probe_repeats_by_number(jpegs: Path) -> None:
    train = load_photos(jpegs).train
    first, second = (images_by_label(train.epoch(number)) for number in (1, 2))
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[label], second[label]) for label in first)
    probe = list(train.probe(7, 1))
    assert [len(batch.labels) for batch in probe] == [5, 2]
    assert_same(load_photos(jpegs).train.probe(7, 1), probe)
    assert images_by_label(train.probe(7, 2)).keys() != images_by_label(probe).keys()


def test_loaders_in_turns_give_the_same_batches_with_one_pipeline_at_a_time(
    jpegs: Path, pipelines: list[weakref.ref[Any]]
) -> None:
    data = load_photos(jpegs)
    training, validation = list(data.train.epoch(1)), list(data.validation.epoch(1))
    assert num_alive(pipelines) == 0
    epoch, first = data.train.epoch(1), []
    for batch in itertools.islice(epoch, 3):
        first.append(batch)
        evaluation = data.validation.epoch(1)
        assert_same([next(evaluation)], validation[:1])
        assert num_alive(pipelines) == 1
    assert_same([*first, *epoch], training)
    assert len(pipelines) > 6


def test_epochs_of_one_loader_may_be_mixed(jpegs: Path, pipelines: list[weakref.ref[Any]]) -> None:
    train = load_photos(jpegs).train
    expected = [list(train.epoch(number)) for number in (1, 2)]
    for pairs in zip(train.epoch(1), train.epoch(2), *expected, strict=True):
        assert num_alive(pipelines) == 1
        assert_same(pairs[:2], pairs[2:])


def test_an_epoch_that_is_given_up_leaves_no_pipeline(
    jpegs: Path, pipelines: list[weakref.ref[Any]]
) -> None:
    epoch = load_photos(jpegs).train.epoch(1)
    next(epoch)
    assert num_alive(pipelines) == 1
    del epoch
    assert num_alive(pipelines) == 0
