"""Extra images: their share of a batch, their passes, and that order and resume are exact."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from safer_fast.config.schema import DataConfig
from safer_fast.data import Batch, Data, load_data
from safer_fast.data.formats import arrays, open_splits

NUM_REAL, NUM_EXTRA = 60, 50
BATCH_SIZE, FRACTION = 10, 0.7
REAL_BATCH = 3
BACKENDS = ("device", "torch")


def save(path: Path, num_images: int, first: int) -> Path:
    """Images of one level each, which is their number: batches show which they hold."""
    levels = np.arange(first, first + num_images, dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (num_images, 12, 12, 3))
    np.savez(path, images=images, labels=levels % 10)
    return path


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    real, extra = save(tmp_path / "real.npz", NUM_REAL, 0), save(tmp_path / "x.npz", NUM_EXTRA, 100)
    return {"path": str(real), "validation_path": str(real), "extra_path": str(extra)}


def load(paths: dict[str, str], *, rank: int = 0, num_ranks: int = 1, **settings: Any) -> Data:
    chosen = {"augmentation": "none", "extra_fraction": FRACTION, **paths, **settings}
    config = DataConfig(**chosen)
    return load_data(config, batch_size=BATCH_SIZE, seed=3, rank=rank, num_ranks=num_ranks)


def levels(batch: Batch) -> list[int]:
    """The numbers of the images of a batch that count."""
    return batch.images[: batch.num_images, 0, 5, 5].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extra_images_fill_their_share_of_every_batch(paths: dict[str, str], backend: str) -> None:
    data = load(paths, backend=backend)
    batches = list(data.train.epoch(1))
    assert len(data.train) == len(batches) == NUM_REAL // REAL_BATCH
    assert (data.train.num_images, data.num_extra) == (NUM_REAL, NUM_EXTRA)
    assert data.train.images_per_epoch == len(batches) * BATCH_SIZE
    for batch in batches:
        assert [level >= 100 for level in levels(batch)] == [False] * 3 + [True] * 7
        assert torch.equal(batch.labels, batch.images[:, 0, 0, 0] % 10)
    real = [level for batch in batches for level in levels(batch) if level < 100]
    assert sorted(real) == list(range(NUM_REAL))


def test_an_extra_image_comes_again_when_all_have_come(paths: dict[str, str]) -> None:
    data = load(paths)
    epochs = (batch for number in (1, 2, 3) for batch in data.train.epoch(number))
    extra = [level for batch in epochs for level in levels(batch) if level >= 100]
    assert len(extra) == 3 * 20 * 7
    passes = [extra[first : first + NUM_EXTRA] for first in range(0, len(extra), NUM_EXTRA)]
    whole, rest = passes[:-1], passes[-1]
    assert all(sorted(turn) == list(range(100, 100 + NUM_EXTRA)) for turn in whole)
    assert len(set(map(tuple, whole))) == len(whole)
    assert len(set(rest)) == len(rest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_begins_at_any_batch(paths: dict[str, str], backend: str) -> None:
    """As a resumed run does, in a loader that has yielded nothing before."""
    whole = list(load(paths, augmentation="crop").train.epoch(4))
    part = list(load(paths, backend=backend, augmentation="crop").train.epoch(4, 13))
    assert len(part) == len(whole) - 13
    for batch, expected in zip(part, whole[13:], strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.labels, expected.labels)
        assert batch.position == expected.position


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_share_the_batches_of_one(paths: dict[str, str], num_ranks: int) -> None:
    """With four, the first rank has real images alone."""
    alone = list(load(paths, augmentation="crop").train.epoch(2))
    ranks = [
        list(load(paths, rank=rank, num_ranks=num_ranks, augmentation="crop").train.epoch(2))
        for rank in range(num_ranks)
    ]
    for expected, *parts in zip(alone, *ranks, strict=True):
        counted = torch.cat([part.images[: part.num_images] for part in parts])
        assert torch.equal(counted, expected.images)
        assert parts[1].position - expected.position == parts[0].num_images


def test_passes_crop_the_same_image_differently(paths: dict[str, str]) -> None:
    data = load(paths, augmentation="crop", extra_fraction=0.9)
    seen: dict[int, set[bytes]] = {}
    for batch in data.train.epoch(1):
        for image in batch.images:
            if (level := int(image.max())) >= 100:
                seen.setdefault(level, set()).add(image.numpy().tobytes())
    assert sum(len(kinds) > 1 for kinds in seen.values()) > NUM_EXTRA // 2


def test_fewer_extra_images_than_a_batch_takes_come_several_times(
    tmp_path: Path, paths: dict[str, str]
) -> None:
    few = save(tmp_path / "few.npz", 3, 100)
    (batch, *_) = load(paths | {"extra_path": str(few)}).train.epoch(1)
    assert sorted(Counter(levels(batch)[REAL_BATCH:]).values()) == [2, 2, 3]


def test_the_probe_has_real_images_alone(paths: dict[str, str]) -> None:
    data = load(paths)
    probed = [level for batch in data.train.probe(NUM_REAL, 1) for level in levels(batch)]
    assert sorted(probed) == list(range(NUM_REAL))


def test_other_extra_images_are_other_data(tmp_path: Path, paths: dict[str, str]) -> None:
    other = save(tmp_path / "other.npz", NUM_EXTRA - 1, 100)
    with_other = load(paths | {"extra_path": str(other)})
    without = load({name: path for name, path in paths.items() if name != "extra_path"})
    prints = {data.fingerprint for data in (load(paths), with_other, without)}
    digests = {data.train.digest for data in (load(paths), with_other, without)}
    assert len(prints) == len(digests) == 3


def test_backends_are_mixed(tmp_path: Path, paths: dict[str, str]) -> None:
    """Real images by DALI or by worker processes, extra ones as well or held in memory."""
    pytest.importorskip("nvidia.dali")
    for number in range(12):
        folder = tmp_path / "files" / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (number, number, number)).save(folder / f"{number:02}.png")
    files = str(tmp_path / "files")
    expected = None
    for backend in ("dali", "torch", "device"):
        own = {"path": files, "validation_path": files, "extra_path": files, "backend": backend}
        batches = [levels(batch) for batch in load(own).train.epoch(2)]
        expected = expected or batches
        assert batches == expected
    mixed = load({**paths, "path": files, "validation_path": files})
    assert any(level >= 100 for batch in mixed.train.epoch(1) for level in levels(batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra_path": "synthetic"}, "data.extra_path: expected images beside images, got"),
        ({"extra_fraction": 0.01}, "data.extra_fraction: expected a share that leaves room for"),
        ({"extra_fraction": 0.99}, "data.extra_fraction: expected a share that leaves room for"),
        ({"extra_path": "nothing.npz"}, "data.extra_path: expected a .parquet"),
        ({"extra_path": "digits"}, "data.extra_path: expected colour images like the training"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    change: dict[str, Any], message: str, paths: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(paths | change)
    assert "\n" not in str(caught.value)


def test_labels_beyond_the_classes_are_refused(tmp_path: Path, paths: dict[str, str]) -> None:
    images = np.zeros((4, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "more.npz", images=images, labels=np.array([0, 1, 2, 10]))
    with pytest.raises(ValueError, match=r"data.extra_path: expected labels in 0..9, got 10: row"):
        load(paths | {"extra_path": str(tmp_path / "more.npz")})


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["channels last", "channels first", "columns first"])
def test_a_large_uncompressed_array_stays_on_disk(
    layout: str, paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    stored = {
        "channels last": images,
        "channels first": np.ascontiguousarray(images.transpose(0, 3, 1, 2)),
        "columns first": np.asfortranarray(images),
    }[layout]
    file = tmp_path / "large.npz"
    np.savez(file, image=stored, label=np.arange(30) % 10)
    monkeypatch.setattr(arrays, "MAPPED_FROM", 1000)
    source = open_splits(str(file), "data.extra_path")["all"]
    assert isinstance(source, arrays.MappedSource)
    again = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 2000
    for row in (0, 17, 29):
        for mapped in (source, again):
            assert np.array_equal(np.asarray(mapped.read(row)), images[row])
    data = load(paths | {"extra_path": str(file)}, backend="torch", num_workers=1)
    assert sum(batch.num_images for batch in data.train.epoch(1)) == data.train.images_per_epoch


def test_a_compressed_array_is_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "MAPPED_FROM", 1000)
    images = np.zeros((30, 12, 12, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.arange(30))
    (source,) = open_splits(str(tmp_path / "a.npz"), "data.path").values()
    assert not isinstance(source, arrays.MappedSource)
