"""Loaders: which images come in which order, how they are augmented, and that all of it repeats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from safer_fast.config import DataConfig
from safer_fast.data import Batch, Data, ahead, as_pixels, load_data, loaders
from safer_fast.data import load as load_module
from safer_fast.data.loaders import InMemoryLoader, StreamLoader

NUM_IMAGES = 60


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        1, 256, (NUM_IMAGES, 3, 12, 12), dtype=torch.uint8, generator=generator
    )  # [N, C, H, W]


@pytest.fixture
def file(tmp_path: Path, images: Tensor) -> Path:
    """A set whose labels are the numbers of the images, so that batches tell which they hold."""
    np.savez(tmp_path / "a.npz", images=images.numpy(), labels=np.arange(NUM_IMAGES))
    return tmp_path / "a.npz"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Smooth colour gradients of several sizes as JPEG, one class folder."""
    for number in range(12):
        height, width = 80 + 5 * number, 140 - 5 * number
        y, x = np.mgrid[:height, :width] * (255 / 140)
        pixels = np.stack([y, x, np.full_like(x, 20 * number)], axis=2).astype(np.uint8)
        folder = tmp_path / "photos" / f"{number:02}"
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "photo.jpg")
    return tmp_path / "photos"


def load(path: Path, batch_size: int = 9, seed: int = 0, **settings: Any) -> Data:
    return load_data(DataConfig(path=str(path), **settings), batch_size=batch_size, seed=seed)


def join(batches: Iterator[Batch]) -> Batch:
    listed = list(batches)
    return Batch(
        torch.cat([batch.images for batch in listed]), torch.cat([batch.labels for batch in listed])
    )


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_pixels_are_bytes_divided_by_255_and_floats_as_they_are() -> None:
    pixels = as_pixels(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert torch.equal(pixels, torch.tensor([0.0, 0.2, 1.0]))
    assert torch.equal(as_pixels(torch.tensor([0.25, 1.0])), torch.tensor([0.25, 1.0]))
    assert as_pixels(torch.tensor([0.5], dtype=torch.float64)).dtype == torch.float32


def test_a_batch_moves_as_a_whole() -> None:
    batch = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    moved = batch.to("meta", non_blocking=True)
    assert moved.images.device.type == moved.labels.device.type == "meta"


def test_training_sees_no_image_twice_and_drops_the_last_partial_batch(file: Path) -> None:
    data = load(file, batch_size=11)
    batches = list(data.train.epoch(1))
    assert [len(batch.labels) for batch in batches] == [11] * 4 == [11] * len(data.train)
    labels = torch.cat([batch.labels for batch in batches])
    assert len(set(labels.tolist())) == 44


def test_training_sees_every_image_once_when_batches_divide_them(file: Path) -> None:
    data = load(file)
    assert data.train.num_images == 54
    assert len(set(join(data.train.epoch(1)).labels.tolist())) == 54


def test_evaluation_sees_every_image_once_in_order_and_unaugmented(
    file: Path, images: Tensor
) -> None:
    config = DataConfig(path=str(file), test_path=str(file), augmentation="crop")
    data = load_data(config, batch_size=9, seed=0, evaluation_batch_size=25)
    assert data.test is not None
    batches = list(data.test.epoch(1))
    assert [len(batch.labels) for batch in batches] == [25, 25, 10]
    assert len(data.test) == 3
    assert_same(join(data.test.epoch(2)), Batch(images, torch.arange(NUM_IMAGES)))


def test_validation_rows_are_disjoint_from_training_and_recorded(file: Path) -> None:
    data = load(file)
    assert data.validation_rows is not None
    assert join(data.validation.epoch(1)).labels.tolist() == data.validation_rows
    assert data.validation_rows == sorted(data.validation_rows)
    training = set(join(data.train.epoch(1)).labels.tolist())
    assert training | set(data.validation_rows) == set(range(NUM_IMAGES))
    assert len(training) + len(data.validation_rows) == NUM_IMAGES


def test_the_cut_depends_on_the_seed_and_on_nothing_else(file: Path) -> None:
    rows = load(file).validation_rows
    assert load(file, batch_size=3, augmentation="crop", max_images=20).validation_rows == rows
    assert load(file, seed=1).validation_rows != rows


def test_max_images_draws_from_the_training_rows_left_by_the_cut(file: Path) -> None:
    data = load(file, batch_size=10, max_images=20)
    drawn = set(join(data.train.epoch(1)).labels.tolist())
    assert data.validation_rows is not None
    assert len(drawn) == data.train.num_images == 20
    assert not drawn & set(data.validation_rows)
    assert load(file, max_images=1000).train.num_images == 54


@pytest.mark.parametrize("augmentation", ["none", "shift", "crop"])
def test_epochs_repeat_by_seed_and_number_and_differ_otherwise(
    file: Path, augmentation: str
) -> None:
    first = join(load(file, augmentation=augmentation).train.epoch(3))
    loader = load(file, augmentation=augmentation).train
    next(loader.epoch(1))  # What was read before makes no difference.
    assert_same(join(loader.epoch(3)), first)
    assert not torch.equal(join(loader.epoch(4)).labels, first.labels)
    other_seed = load(file, augmentation=augmentation, seed=1).train
    assert not torch.equal(join(other_seed.epoch(3)).labels, first.labels)


def test_what_happens_to_an_image_does_not_depend_on_the_batch_size(file: Path) -> None:
    small = join(load(file, batch_size=9, augmentation="crop").train.epoch(1))
    large = join(load(file, batch_size=27, augmentation="crop").train.epoch(1))
    assert_same(small, large)


def find_windows(image: Tensor, padding: int) -> Tensor:
    """All crops of the padded image, [(2 * padding + 1) ** 2, C, H, W]."""
    padded = F.pad(image, [padding] * 4)
    height, width = image.shape[1:]
    windows = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return torch.stack(windows)


@pytest.mark.parametrize(("augmentation", "padding"), [("none", 0), ("shift", 1), ("crop", 4)])
def test_augmented_images_are_crops_of_the_padded_image(
    file: Path, images: Tensor, augmentation: str, padding: int
) -> None:
    batch = join(load(file, augmentation=augmentation).train.epoch(1))
    places, flips = set(), 0
    for image, label in zip(batch.images, batch.labels, strict=True):
        windows = find_windows(images[label], padding)
        straight = (windows == image).flatten(1).all(1)
        mirrored = (windows == image.flip(2)).flatten(1).all(1)
        assert straight.any() or mirrored.any()
        places.add(int((straight | mirrored).nonzero()[0]))
        flips += bool(mirrored.any())
    assert len(places) == 1 if padding == 0 else len(places) >= 9
    assert 15 < flips < 40 if augmentation == "crop" else flips == 0


@pytest.mark.parametrize(
    ("size", "kind"), [(16, "none"), (17, "crop"), (64, "crop"), (65, "random-resized-crop")]
)
def test_auto_augmentation_goes_by_size(tmp_path: Path, size: int, kind: str) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((10, size, size), np.uint8), labels=[0] * 10)
    loader = load(tmp_path / "a.npz").train
    assert isinstance(loader, InMemoryLoader | StreamLoader)
    assert loader.augmentation == kind
    assert isinstance(loader, StreamLoader) == (kind == "random-resized-crop")


@pytest.mark.parametrize("augmentation", ["none", "crop"])
def test_a_stream_gives_what_memory_gives(
    file: Path, augmentation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = load(file, augmentation=augmentation)
    monkeypatch.setattr(loaders, "MEMORY_LIMIT", 0)
    stream = load(file, augmentation=augmentation)
    assert isinstance(in_memory.train, InMemoryLoader)
    assert isinstance(stream.train, StreamLoader)
    assert_same(join(in_memory.train.epoch(1)), join(stream.train.epoch(1)))
    assert_same(join(in_memory.validation.epoch(1)), join(stream.validation.epoch(1)))
    assert_same(join(in_memory.train.probe(20, 1)), join(stream.train.probe(20, 1)))


@pytest.mark.parametrize("augmentation", ["none", "crop", "random-resized-crop"])
def test_the_number_of_workers_makes_no_difference(photos: Path, augmentation: str) -> None:
    epochs = []
    for num_workers in (0, 2):
        settings: dict[str, Any] = {"augmentation": augmentation, "num_workers": num_workers}
        data = load(photos, batch_size=3, image_size=72, **settings)
        assert isinstance(data.train, StreamLoader)
        epochs.append(join(data.train.epoch(1)))
    assert epochs[0].images.shape == (9, 3, 72, 72)
    assert_same(*epochs)


def test_random_resized_crops_repeat_by_seed_and_number_and_differ_otherwise(photos: Path) -> None:
    loader = load(photos, batch_size=11, image_size=72, num_workers=0).train
    first, again, second = (join(loader.epoch(number)) for number in (1, 1, 2))
    assert_same(first, again)
    order, other = first.labels.argsort(), second.labels.argsort()
    changed = (first.images[order] != second.images[other]).flatten(1).any(1)
    assert changed.all()


def test_loading_leaves_the_global_generator_alone(photos: Path) -> None:
    loader = load(photos, batch_size=3, image_size=72, num_workers=0).train
    before = torch.get_rng_state()
    join(loader.epoch(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_of_photos_crops_the_centre_of_the_resized_image(photos: Path) -> None:
    test = load(photos, batch_size=3, image_size=112, test_path=str(photos)).test
    assert test is not None
    batch = join(test.epoch(1))
    assert batch.images.shape == (12, 3, 112, 112)
    with Image.open(photos / "00" / "photo.jpg") as image:
        assert image.size == (140, 80)
        # Short side 112 * 256 / 224 = 128, so 140x80 becomes 224x128, less 8 and 56 pixels.
        expected = np.asarray(image.resize((224, 128), Image.Resampling.BILINEAR))[8:120, 56:168]
    difference = batch.images[0].int() - torch.from_numpy(expected.copy()).permute(2, 0, 1).int()
    assert difference.abs().max() <= 1


def test_the_probe_is_unaugmented_distinct_and_repeats_by_number(
    file: Path, images: Tensor
) -> None:
    train = load(file, augmentation="crop").train
    batches = list(train.probe(20, 1))
    assert [len(batch.labels) for batch in batches] == [9, 9, 2]
    probe = join(iter(batches))
    assert len(set(probe.labels.tolist())) == 20
    assert torch.equal(probe.images, images[probe.labels])
    assert_same(join(train.probe(20, 1)), probe)
    assert not torch.equal(join(train.probe(20, 2)).labels, probe.labels)
    assert len(join(train.probe(1000, 1)).labels) == train.num_images


def test_the_probe_of_a_stream_is_unaugmented(photos: Path) -> None:
    train = load(photos, batch_size=3, image_size=72).train
    first, again = join(train.probe(5, 1)), join(train.probe(5, 1))
    assert_same(first, again)
    evaluation = load(photos, batch_size=3, image_size=72, test_path=str(photos)).test
    assert evaluation is not None
    assert torch.equal(first.images, join(evaluation.epoch(1)).images[first.labels])


def find_data(name: str) -> Path:
    """A file of the shared test data; skips the test where there is none."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    file = Path(os.environ.get("SAFER_FAST_TEST_DATA", beside)) / name
    if not file.exists():
        pytest.skip(f"{name} is not there: set SAFER_FAST_TEST_DATA to the folder that has it")
    return file


def test_cifar_loads_with_its_class_names() -> None:
    data = load(find_data("cifar10-test.parquet"), batch_size=64)
    assert (data.name, data.num_channels, data.image_size) == ("cifar10-test", 3, 32)
    assert data.class_names[:3] == ["airplane", "automobile", "bird"]
    assert (data.train.num_images, data.validation.num_images) == (4500, 500)
    batch = join(data.train.epoch(1))
    assert torch.bincount(batch.labels).min() > 380
    # The mean colour that is published for CIFAR-10.
    mean = as_pixels(join(data.train.probe(4500, 1)).images).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.491, 0.482, 0.447]), atol=0.01, rtol=0)


def test_photos_stream_at_224_pixels() -> None:
    data = load(find_data("photos-256.parquet"), batch_size=32, image_size=224, max_images=64)
    assert isinstance(data.train, StreamLoader)
    assert data.num_classes == 1000
    for batch in (*data.train.epoch(1), next(data.validation.epoch(1))):
        assert batch.images.shape == (32, 3, 224, 224)
        assert batch.images.dtype == torch.uint8


def test_photos_of_many_sizes_need_an_image_size() -> None:
    with pytest.raises(ValueError, match=r"data\.image_size: expected one size for all images"):
        load(find_data("photos-256.parquet"))


def test_batches_come_to_the_device_in_order() -> None:
    batches = [Batch(torch.full((2, 1, 3, 3), i), torch.tensor([i, i])) for i in range(5)]
    found = list(ahead(batches, torch.device("cpu")))
    assert [int(batch.labels[0]) for batch in found] == list(range(5))
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, batches, strict=True))


@pytest.mark.parametrize("augmentation", ["none", "shift", "crop"])
def test_a_set_on_the_device_gives_the_same_batches_as_one_in_memory(
    file: Path, augmentation: str
) -> None:
    on_cpu = load(file, batch_size=11, augmentation=augmentation)
    on_device = load(file, batch_size=11, augmentation=augmentation, backend="device")
    for part in ("train", "validation"):
        first, second = getattr(on_cpu, part), getattr(on_device, part)
        assert type(second).__name__ == "DeviceLoader"
        assert len(first) == len(second)
        for epoch in (1, 2):
            pairs = zip(first.epoch(epoch), second.epoch(epoch), strict=True)
            for one, other in pairs:
                assert_same(one, other)
    for one, other in zip(on_cpu.train.probe(20, 3), on_device.train.probe(20, 3), strict=True):
        assert_same(one, other)


def test_a_set_on_a_device_never_waits_for_it_within_an_epoch(file: Path) -> None:
    from .test_step import forbidding_host_syncs

    batches = load(file, augmentation="crop", backend="device").train.epoch(1)
    first = next(batches)
    with forbidding_host_syncs():
        rest = list(batches)
    assert len(rest) == 5
    assert first.images.dtype == torch.uint8


def test_sets_lie_on_a_gpu_by_themselves_and_on_a_cpu_when_asked(file: Path) -> None:
    def kind(device: str, backend: Any) -> str:
        config = DataConfig(path=str(file), backend=backend)
        data = load_data(config, batch_size=9, seed=0, device=torch.device(device))
        return type(data.train).__name__

    assert kind("cpu", "auto") == kind("cpu", "torch") == "InMemoryLoader"
    assert kind("cpu", "device") == "DeviceLoader"
    assert load_module._place(DataConfig(), torch.device("cuda")) == torch.device("cuda")
    assert load_module._place(DataConfig(backend="torch"), torch.device("cuda")) is None


def test_images_that_are_decoded_when_needed_cannot_lie_on_the_device(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.backend: expected auto or torch .* got device$"):
        load(photos, image_size=32, augmentation="random-resized-crop", backend="device")
