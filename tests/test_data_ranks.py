"""Ranks share an epoch: each image comes once, in the batch where a single rank would have it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from safer_fast.config import DataConfig
from safer_fast.data import Batch, Data, Loader, load_data
from safer_fast.data.mixing import Mixing

BACKENDS = ["device", "torch", "dali"]
SIZES = [61, 62, 64]
BATCH_SIZES = [7, 16, 60]
EDGE = 8
Parts = list[Batch]
"""What each rank has of one batch."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with as many training and validation images; labels are the numbers of the images."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(max(SIZES)):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "png")
        files.append(buffer.getvalue())
    folder = tmp_path_factory.mktemp("sets")
    for size in SIZES:
        (folder / str(size)).mkdir()
        table = pa.table({"image": pa.array(files[:size], pa.binary()), "label": range(size)})
        for split in ("train", "validation"):
            pq.write_table(table, folder / str(size) / f"{split}.parquet")
    return {size: folder / str(size) for size in SIZES}


def load(
    path: Path, backend: Any, batch_size: int, rank: int = 0, num_ranks: int = 1, **settings: Any
) -> Data:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    defaults: dict[str, Any] = {"num_workers": 0, "augmentation": "crop"}
    config = DataConfig(path=str(path), backend=backend, **(defaults | settings))
    return load_data(
        config, batch_size=batch_size, seed=5, rank=rank, num_ranks=num_ranks, report=pytest.fail
    )


def load_ranks(
    path: Path, backend: str, batch_size: int, num_ranks: int, **settings: Any
) -> list[Data]:
    return [
        load(path, backend, batch_size, rank, num_ranks, **settings) for rank in range(num_ranks)
    ]


def read(loaders: list[Loader], number: int = 2, start: int = 0) -> list[Parts]:
    """The batches of an epoch, each in the parts of its ranks; all ranks have as many."""
    assert len({len(loader) for loader in loaders}) == 1
    assert len({loader.batch_size for loader in loaders}) == 1
    epochs = [list(loader.epoch(number, start)) for loader in loaders]
    for epoch, loader in zip(epochs, loaders, strict=True):
        assert len(epoch) == len(loader) - start
        assert {len(batch.labels) for batch in epoch} <= {loader.batch_size}
        assert {len(batch.images) for batch in epoch} <= {loader.batch_size}
    return [list(parts) for parts in zip(*epochs, strict=True)]


def labels_of(parts: Parts) -> list[int]:
    """The labels that count."""
    return [int(label) for part in parts for label in part.labels[: part.num_images]]


def all_labels(batches: list[Parts]) -> list[int]:
    return [label for parts in batches for label in labels_of(parts)]


def images_of(parts: Parts) -> Tensor:
    """The images that count."""
    return torch.cat([part.images[: part.num_images] for part in parts])


def assert_same_images(first: list[Parts], second: list[Parts]) -> None:
    for one, other in zip(first, second, strict=True):
        assert labels_of(one) == labels_of(other)
        assert torch.equal(images_of(one), images_of(other))


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_image_comes_once_whatever_the_number_of_ranks(
    sets: dict[int, Path], backend: str, size: int, num_ranks: int, batch_size: int
) -> None:
    ranks = load_ranks(sets[size], backend, batch_size, num_ranks)
    assert {data.train.backend for data in ranks} == {backend}
    training = read([data.train for data in ranks])
    evaluation = read([data.validation for data in ranks])
    assert sorted(all_labels(training)) == list(range(size))
    assert all_labels(evaluation) == list(range(size))
    for batches in (training, evaluation):
        assert len(batches) == -(-size // batch_size)
        counts = [len(labels_of(parts)) for parts in batches]
        assert max(counts) - min(counts) <= 1
        assert max(counts) <= batch_size
        for parts in batches:
            shares = [part.num_images for part in parts]
            assert max(shares) - min(shares) <= 1
            assert max(part.num_padding for part in parts) <= 2


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_the_same_images_whatever_the_number_of_ranks(
    sets: dict[int, Path], backend: str, num_ranks: int
) -> None:
    alone = load(sets[61], backend, 7)
    ranks = load_ranks(sets[61], backend, 7, num_ranks)
    for split in ("train", "validation"):
        loaders = [getattr(data, split) for data in ranks]
        expected = read([getattr(alone, split)])
        assert_same_images(read(loaders), expected)
        assert_same_images(read(loaders, start=4), expected[4:])


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_part_of_a_rank_is_the_same_bits_with_every_backend(
    sets: dict[int, Path], num_ranks: int
) -> None:
    for rank in range(num_ranks):
        datas = [load(sets[62], backend, 16, rank, num_ranks) for backend in BACKENDS]
        for split in ("train", "validation"):
            epochs = [getattr(data, split).epoch(3) for data in datas]
            for first, *others in zip(*epochs, strict=True):
                for other in others:
                    assert torch.equal(first.images, other.images)
                    assert torch.equal(first.labels, other.labels)
                    assert first.num_padding == other.num_padding


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_copies_images_and_weighs_nothing(sets: dict[int, Path], backend: str) -> None:
    num_padded = 0
    for parts in read([data.train for data in load_ranks(sets[61], backend, 7, 3)]):
        for part in parts:
            assert float(part.weights().sum()) == pytest.approx(1)
            assert not part.weights()[part.num_images :].any()
            padding = slice(part.num_images, None)
            assert torch.equal(part.images[padding], part.images[: part.num_padding])
            assert torch.equal(part.labels[padding], part.labels[: part.num_padding])
            num_padded += part.num_padding
    assert num_padded > 0


@pytest.mark.parametrize("num_images", [1, 20, 61, 100])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_probe_is_of_as_many_different_images_whatever_the_number_of_ranks(
    sets: dict[int, Path], backend: str, num_ranks: int, num_images: int
) -> None:
    ranks = [data.train for data in load_ranks(sets[61], backend, 7, num_ranks)]
    probes = [list(loader.probe(num_images, 1)) for loader in ranks]
    batches = [list(parts) for parts in zip(*probes, strict=True)]
    labels = all_labels(batches)
    assert len(set(labels)) == len(labels) == min(num_images, 61)
    alone = load(sets[61], backend, 7).train.probe(num_images, 1)
    assert_same_images(batches, [[batch] for batch in alone])


@pytest.mark.parametrize("augmentation", ["none", "shift", "crop"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_without_an_image_gets_zeros_that_weigh_nothing(
    sets: dict[int, Path], backend: str, augmentation: str
) -> None:
    ranks = load_ranks(sets[61], backend, 2, 3, augmentation=augmentation)
    for loaders in ([data.train for data in ranks], [data.validation for data in ranks]):
        batches = read(loaders)
        assert sorted(all_labels(batches)) == list(range(61))
        for _, _, empty in batches:
            assert empty.num_padding == len(empty.labels) == loaders[2].batch_size == 1
            assert empty.images.shape == (1, 3, EDGE, EDGE)
            assert empty.images.dtype == torch.uint8
            assert empty.labels.dtype == torch.int64
            assert not empty.images.any()
            assert not empty.labels.any()
            assert float(empty.weights().sum()) == 0
    single = [parts for parts in batches if len(labels_of(parts)) == 1]
    assert [part.num_images for part in single[0]] == [1, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_resized_crops_do_not_depend_on_the_number_of_ranks(
    sets: dict[int, Path], backend: str
) -> None:
    if backend == "device":
        pytest.skip("images on the device have lost their own size")
    settings: dict[str, Any] = {"augmentation": "random-resized-crop", "image_size": 12}
    alone = load(sets[61], backend, 16, **settings)
    ranks = load_ranks(sets[61], backend, 16, 3, **settings)
    assert_same_images(read([data.train for data in ranks]), read([alone.train]))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_that_are_mixed_have_an_even_number_of_images(
    sets: dict[int, Path], backend: str, num_ranks: int
) -> None:
    ranks = load_ranks(sets[61], backend, 7, num_ranks, mixup=0.4)
    assert all(data.train.batch_size % 2 == 0 for data in ranks)
    batches = read([data.train for data in ranks])
    assert sorted(all_labels(batches)) == list(range(61))
    mixing = Mixing(DataConfig(mixup=0.4), 61, seed=0)
    for index, parts in enumerate(batches):
        for part in parts:
            mixed = mixing(part, 2, index)
            assert mixed.labels.shape == (len(part.labels), 61)
            assert mixed.num_padding == part.num_padding
            torch.testing.assert_close(mixed.labels.sum(1), torch.ones(len(part.labels)))
    # evaluation is not mixed
    plain = load_ranks(sets[61], backend, 7, num_ranks)
    assert [d.validation.batch_size for d in ranks] == [d.validation.batch_size for d in plain]


def test_a_rank_without_an_image_to_mix_gets_zeros(sets: dict[int, Path]) -> None:
    (batch, *_) = load(sets[61], "device", 2, 2, 3, mixup=0.4).train.epoch(1)
    assert (len(batch.labels), batch.num_images) == (2, 0)
    mixed = Mixing(DataConfig(mixup=0.4), 61, seed=0)(batch, 1, 0)
    assert not mixed.images.any()
    assert float(mixed.weights().sum()) == 0


def test_noise_comes_in_parts_of_the_same_sizes() -> None:
    def sizes(rank: int, num_ranks: int) -> list[int]:
        config = DataConfig(path="synthetic", image_size=EDGE, max_images=620)
        data = load_data(config, batch_size=60, seed=0, rank=rank, num_ranks=num_ranks)
        return [batch.num_images for batch in data.train.epoch(1)]

    parts = zip(*(sizes(rank, 3) for rank in range(3)), strict=True)
    assert [sum(part) for part in parts] == sizes(0, 1)
