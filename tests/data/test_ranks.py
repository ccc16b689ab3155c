"""Ranks share an epoch: each image comes once, in the batch where a single rank would have it."""

from __future__ import annotations

import io
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from safer_fast.config.schema import DataConfig
from safer_fast.data import Batch, Data, Loader, load_data
from safer_fast.data.mixing import Mixing
from safer_fast.data.subset import fixed_order

BACKENDS = ["device", "torch", "dali"]
WAYS: dict[str, dict[str, Any]] = {
    "device": {},
    "torch": {},
    "torch with workers": {"backend": "torch", "num_workers": 2},
    "dali": {},
    "synthetic": {"backend": "auto", "path": "synthetic", "max_images": 61, "image_size": 8},
}
"""Backends and settings by which images come."""
# Noise has as many validation images as ImageNet; workers take a tenth of a second to start.
SPLITS = {"synthetic": ["train"], "torch with workers": ["validation"]}
SIZES = [61, 62, 64]
NUMBERS_OF_RANKS = [1, 2, 3]
BATCH_SIZES = [7, 16, 60]
EDGE = 8
Parts = list[Batch]
"""The part of one batch of each rank."""


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
    path: Path, way: str, batch_size: int, rank: int = 0, num_ranks: int = 1, **settings: Any
) -> Data:
    if way == "dali":
        pytest.importorskip("nvidia.dali")
    defaults: dict[str, Any] = {"num_workers": 0, "augmentation": "crop"}
    defaults |= {"path": str(path), "backend": way} | WAYS[way]
    config = DataConfig(**(defaults | settings))
    return load_data(
        config, batch_size=batch_size, seed=5, rank=rank, num_ranks=num_ranks, report=pytest.fail
    )


def load_ranks(
    path: Path, way: str, batch_size: int, num_ranks: int, **settings: Any
) -> list[Data]:
    return [load(path, way, batch_size, rank, num_ranks, **settings) for rank in range(num_ranks)]


def read(
    loaders: list[Loader], number: int = 2, start: int = 0, limit: int | None = None
) -> list[Parts]:
    """The batches of an epoch, each in the parts of its ranks; all ranks have as many."""
    assert len({len(loader) for loader in loaders}) == 1
    assert len({loader.batch_size for loader in loaders}) == 1
    epochs = [list(loader.epoch(number, start, limit)) for loader in loaders]
    assert len({len(epoch) for epoch in epochs}) == 1
    for epoch, loader in zip(epochs, loaders, strict=True):
        assert limit is not None or len(epoch) == len(loader) - start
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


# every pair of two of the four settings stands in one of the nine rows
PAIRS = [
    (BACKENDS[i], SIZES[j], NUMBERS_OF_RANKS[(i + j) % 3], BATCH_SIZES[(i + 2 * j) % 3])
    for i in range(3)
    for j in range(3)
]


def test_every_pair_of_settings_is_among_the_rows() -> None:
    settings = [BACKENDS, SIZES, NUMBERS_OF_RANKS, BATCH_SIZES]
    for one, other in combinations(range(4), 2):
        wanted = set(product(settings[one], settings[other]))
        assert {(row[one], row[other]) for row in PAIRS} == wanted


@pytest.mark.parametrize(("backend", "size", "num_ranks", "batch_size"), PAIRS)
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


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [1, 20, 61, 100])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_probe_is_of_as_many_different_images_whatever_the_number_of_ranks(
    sets: dict[int, Path], backend: str, num_ranks: int, num_images: int
) -> None:
    ranks = [data.train for data in load_ranks(sets[61], backend, 7, num_ranks)]
    batches = probe(ranks, num_images)
    labels = all_labels(batches)
    assert len(set(labels)) == len(labels) == min(num_images, 61)
    alone = load(sets[61], backend, 7).train.probe(num_images, 1)
    assert_same_images(batches, [[batch] for batch in alone])


def probe(loaders: list[Loader], num_images: int) -> list[Parts]:
    probes = [list(loader.probe(num_images, 1)) for loader in loaders]
    return [list(parts) for parts in zip(*probes, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [0, 1, 8])
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_without_an_image_to_probe_gets_an_empty_batch(
    sets: dict[int, Path], way: str, num_images: int
) -> None:
    ranks = [data.train for data in load_ranks(sets[61], way, 7, 3)]
    *_, parts = probe(ranks, num_images)
    assert [len(part.labels) for part in parts] == ([0, 0, 0] if num_images == 0 else [1, 0, 0])
    assert [part.position for part in parts] == [7 if num_images == 8 else 0] + [num_images] * 2
    for part in parts[1:]:
        assert part.images.shape == (0, 3, EDGE, EDGE)
        assert (part.images.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
        assert (part.num_images, part.num_padding) == (0, 0)


def assert_in_place(batches: list[Parts], order: list[int], start: int = 0) -> None:
    """Image k of the epoch has position k, and `order` says which image that is."""
    for parts in batches:
        for part in parts:
            assert part.position == start
            start += part.num_images
            assert labels_of([part]) == order[part.position : part.position + part.num_images]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_image_k_of_an_epoch_or_a_probe_has_position_k(
    sets: dict[int, Path], way: str, num_ranks: int
) -> None:
    alone = load(sets[61], "synthetic" if way == "synthetic" else "device", 16)
    ranks = load_ranks(sets[61], way, 16, num_ranks)
    for split in SPLITS.get(way, ["train", "validation"]):
        loaders: list[Loader] = [getattr(data, split) for data in ranks]
        order = all_labels(read([getattr(alone, split)]))
        assert len(order) == 61
        assert_in_place(read(loaders), order)
        assert_in_place(read(loaders, start=3), order, start=46)
    assert_in_place(probe(loaders, 20), all_labels(probe([getattr(alone, split)], 20)))


def test_a_part_without_an_image_stands_where_its_first_would(sets: dict[int, Path]) -> None:
    batches = read([data.validation for data in load_ranks(sets[61], "device", 2, 3)])
    assert [[part.position for part in parts] for parts in batches[:2]] == [[0, 1, 2], [2, 3, 4]]
    assert [part.position for part in batches[-1]] == [60, 61, 61]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_limit_takes_the_same_images_for_any_number_of_ranks(
    sets: dict[int, Path], way: str, num_ranks: int
) -> None:
    alone = load(sets[61], "synthetic" if way == "synthetic" else "device", 16)
    ranks = load_ranks(sets[61], way, 16, num_ranks)
    for split in SPLITS.get(way, ["train", "validation"]):
        loaders: list[Loader] = [getattr(data, split) for data in ranks]
        whole = read([getattr(alone, split)])
        order, images = all_labels(whole), torch.cat([images_of(parts) for parts in whole])
        # batches begin at 0, 16, 31 and 46
        for limit, num_batches in {1: 1, 16: 1, 17: 2, 61: 4, 100: 4}.items():
            # every image is a class of its own, whose number is its place
            is_subset = split == "validation" and limit < 61
            expected = fixed_order(np.arange(61)).tolist() if is_subset else order
            batches = read(loaders, limit=limit)
            assert len(batches) == num_batches
            assert all_labels(batches) == expected[:limit]
            found = torch.cat([images_of(parts) for parts in batches])
            places = expected[:limit] if is_subset else range(min(limit, 61))
            assert torch.equal(found, images[list(places)])
            assert_in_place(batches, expected)
    assert read(loaders, limit=0) == read(loaders, start=2, limit=31) == []
    expected = order if way == "synthetic" else fixed_order(np.arange(61)).tolist()
    assert_in_place(read(loaders, start=1, limit=20), expected, start=16)


@pytest.mark.parametrize("way", ["torch", "torch with workers", "dali"])
def test_images_beyond_the_limit_are_not_read(
    tmp_path: Path, sets: dict[int, Path], way: str
) -> None:
    unread = fixed_order(np.arange(61))[20:].tolist()
    for split in ("train", "validation"):
        table = pq.read_table(sets[61] / f"{split}.parquet")
        images = table["image"].to_pylist()
        for place in unread:
            images[place] = b"no image"
        pq.write_table(table.set_column(0, "image", [images]), tmp_path / f"{split}.parquet")
    for num_ranks in (1, 3):
        loaders: list[Loader] = [
            data.validation for data in load_ranks(tmp_path, way, 16, num_ranks, image_size=EDGE)
        ]
        assert len(all_labels(read(loaders, limit=20))) == 20
    with pytest.raises(ValueError, match=f"image, got an unreadable one: row {unread[0]} of"):
        read(loaders, limit=21)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"mixup": 1e-9}])
def test_the_same_is_erased_whatever_the_number_of_ranks(
    sets: dict[int, Path], num_ranks: int, settings: Any
) -> None:
    def erased(batch_size: int, num_ranks: int, **settings: Any) -> dict[int, Tensor]:
        ranks = load_ranks(sets[61], "device", batch_size, num_ranks, **settings)
        mix = Mixing(DataConfig(random_erasing=0.5), 61, seed=0)
        return {
            int(label): image
            for index, parts in enumerate(read([data.train for data in ranks]))
            for part in (mix(part, 2, index) for part in parts)
            for label, image in zip(
                part.labels[: part.num_images], part.images[: part.num_images], strict=True
            )
        }

    alone, found = erased(16, 1), erased(16, num_ranks, **settings)
    assert len(found) == 61
    assert all(torch.equal(found[label], alone[label]) for label in alone)
    # nor does the size of the batches matter
    other = erased(7, num_ranks, **settings)
    assert all(torch.equal(other[label], alone[label]) for label in alone)


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


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "batch_size"), [(2, 61), (3, 2), (3, 16)])
def test_noise_is_the_same_whatever_the_number_of_ranks(
    tmp_path: Path, num_ranks: int, batch_size: int
) -> None:
    ranks = load_ranks(tmp_path, "synthetic", batch_size, num_ranks, mixup=0.4)
    alone = load(tmp_path, "synthetic", batch_size).train
    batches = read([data.train for data in ranks])
    assert_same_images(batches, read([alone]))
    first, second = (batches[index][0].images for index in (0, 1 % len(batches)))
    assert first.data_ptr() == second.data_ptr()
