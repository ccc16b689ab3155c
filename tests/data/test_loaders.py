"""Loaders: which images come in which order, how they are augmented, and that all of it repeats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from safer_fast.config.schema import DataConfig
from safer_fast.data import Batch, Data, as_pixels, backends, load_data, prefetch_to_device
from safer_fast.data.augmentation import draw_crop
from safer_fast.data.loaders import CpuSetLoader, GpuSetLoader, StreamLoader
from safer_fast.data.order import Ordering
from tests.support.pictures import find_data

NUM_IMAGES = 60


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        1, 256, (NUM_IMAGES, 3, 12, 12), dtype=torch.uint8, generator=generator
    )  # [N, C, H, W]


@pytest.fixture
def file(tmp_path: Path, images: Tensor) -> Path:
    """A set whose labels are the numbers of the images, so that batches show which they hold."""
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
    """The images that count, of all batches."""
    listed = list(batches)
    return Batch(
        torch.cat([batch.images[: batch.num_images] for batch in listed]),
        torch.cat([batch.labels[: batch.num_images] for batch in listed]),
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
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    moved = Batch(images, labels, 1, position=7).to("meta", non_blocking=True)
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert (moved.num_padding, moved.position) == (1, 7)


def test_padding_copies_images_and_counts_for_nothing() -> None:
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1)
    batch = Batch(images, torch.tensor([5, 6, 7]), position=4)
    assert batch.padded(3) is batch
    padded = batch.padded(8)
    assert padded.position == 4
    assert padded.labels.tolist() == [5, 6, 7, 5, 6, 7, 5, 6]
    assert padded.images.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert (padded.num_images, padded.num_padding) == (3, 5)
    torch.testing.assert_close(padded.weights(), torch.tensor([1 / 3] * 3 + [0.0] * 5))
    moved = padded.to("meta")
    assert (moved.num_padding, moved.weights().device.type) == (5, "meta")


def test_a_batch_without_images_is_padded_with_zeros_and_weighs_nothing() -> None:
    empty = Batch(torch.empty(0, 3, 2, 2, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    padded = empty.padded(4)
    assert padded.images.shape == (4, 3, 2, 2)
    assert padded.num_images == 0
    assert not padded.images.any()
    assert not padded.weights().any()


@pytest.mark.parametrize("batch_size", [9, 11, 17, 54])
def test_an_epoch_of_training_is_cut_into_equal_batches_of_all_images(
    file: Path, batch_size: int
) -> None:
    data = load(file, batch_size=batch_size)
    batches = list(data.train.epoch(1))
    assert data.train.num_images == 54
    assert len(batches) == len(data.train) == -(-54 // batch_size)
    assert {len(batch.labels) for batch in batches} == {data.train.batch_size}
    assert max(batch.num_padding for batch in batches) <= 1
    labels = join(iter(batches)).labels.tolist()
    assert len(labels) == len(set(labels)) == 54


def test_evaluation_sees_every_image_once_in_order_and_unaugmented(
    file: Path, images: Tensor
) -> None:
    config = DataConfig(path=str(file), test_path=str(file), augmentation="crop")
    data = load_data(config, batch_size=9, seed=0, evaluation_batch_size=29)
    assert data.test is not None
    batches = list(data.test.epoch(1))
    assert [len(batch.labels) for batch in batches] == [20, 20, 20]
    assert len(data.test) == 3
    assert_same(join(data.test.epoch(2)), Batch(images, torch.arange(NUM_IMAGES)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["device", "torch"])
@pytest.mark.parametrize("augmentation", ["none", "crop"])
def test_an_epoch_goes_on_at_any_batch(file: Path, augmentation: str, backend: str) -> None:
    settings: dict[str, Any] = {"augmentation": augmentation, "backend": backend}
    whole = list(load(file, batch_size=11, **settings).train.epoch(3))
    for start in range(len(whole) + 1):
        rest = list(load(file, batch_size=11, **settings).train.epoch(3, start))
        for one, other in zip(whole[start:], rest, strict=True):
            assert_same(one, other)


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


def changed(path: Path, folder: Path, **arrays: Any) -> Path:
    """The set with other arrays, at another path."""
    folder.mkdir()
    with np.load(path) as archive:
        np.savez(folder / "b.npz", **(dict(archive) | arrays))
    return folder / "b.npz"


def test_the_fingerprint_is_that_of_labels_rows_and_sizes_and_not_of_the_path(
    file: Path, tmp_path: Path
) -> None:
    first = load(file).fingerprint
    assert len(bytes.fromhex(first)) == 8
    same = [
        load(changed(file, tmp_path / "same")),
        load(file, batch_size=20, backend="torch", num_workers=0, augmentation="crop"),
    ]
    assert {data.fingerprint for data in same} == {first}
    labels = np.arange(NUM_IMAGES)
    labels[[3, 5]] = labels[[5, 3]]
    with np.load(file) as archive:
        images = archive["images"]
    others = [
        load(changed(file, tmp_path / "order", labels=labels)),
        load(changed(file, tmp_path / "less", images=images[:59], labels=np.arange(59))),
        load(changed(file, tmp_path / "grey", images=images[:, 0])),
        load(changed(file, tmp_path / "small", images=images[:, :, :11, :11])),
        load(file, image_size=16),
        load(file, seed=1),
        load(file, max_images=53),
        load(file, validation_fraction=0.2),
        load(file, validation_path=str(file)),
        load(file, test_path=str(file)),
    ]
    assert len({data.fingerprint for data in others} - {first}) == len(others)


def test_the_fingerprint_of_a_folder_is_that_of_its_copy_made_in_another_order(
    photos: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"batch_size": 3, "image_size": 72, "backend": "torch"}
    first = load(photos, **settings).fingerprint
    files = sorted(photos.glob("*/*.jpg"), reverse=True)
    for file in files:
        copy = tmp_path / "copy" / file.relative_to(photos)
        copy.parent.mkdir(parents=True)
        copy.write_bytes(file.read_bytes())
    assert load(tmp_path / "copy", **settings).fingerprint == first
    (tmp_path / "copy" / "03").rename(tmp_path / "copy" / "03 of another name")
    assert load(tmp_path / "copy", **settings).fingerprint != first


@pytest.mark.parametrize("backend", ["device", "torch"])
def test_images_left_out_at_the_start_change_the_fingerprint(photos: Path, backend: Any) -> None:
    settings: dict[str, Any] = {"image_size": 32, "bad_images": "skip", "augmentation": "none"}
    config = DataConfig(path=str(photos), backend=backend, num_workers=0, **settings)
    first = load_data(config, batch_size=3, seed=0).fingerprint
    (photos / "03" / "photo.jpg").write_bytes(b"no image")
    left_out = load_data(config, batch_size=3, seed=0, report=len).fingerprint
    # those of a stream are only found on the way
    assert (left_out == first) == (backend == "torch")


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
    large = join(load(file, batch_size=26, augmentation="crop").train.epoch(1))
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
    np.savez(tmp_path / "a.npz", images=np.zeros((10, size, size), np.uint8), labels=[0, 1] * 5)
    loader = load(tmp_path / "a.npz").train
    assert isinstance(loader, CpuSetLoader | StreamLoader)
    assert loader.augmentation == kind
    assert isinstance(loader, StreamLoader) == (kind == "random-resized-crop")


@pytest.mark.parametrize("augmentation", ["none", "shift", "crop"])
def test_a_stream_gives_what_memory_gives(file: Path, augmentation: str) -> None:
    in_memory = load(file, batch_size=11, augmentation=augmentation)
    stream = load(file, batch_size=11, augmentation=augmentation, backend="torch")
    assert isinstance(in_memory.train, CpuSetLoader)
    assert isinstance(stream.train, StreamLoader)
    assert_same(join(in_memory.train.epoch(1)), join(stream.train.epoch(1)))
    assert_same(join(in_memory.validation.epoch(1)), join(stream.validation.epoch(1)))
    assert_same(join(in_memory.train.probe(20, 1)), join(stream.train.probe(20, 1)))


def test_what_is_too_large_for_memory_is_streamed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "MEMORY_LIMIT", 0)
    assert load(file).train.backend == "torch"
    with pytest.raises(ValueError, match=r"^data\.backend: .* got device: the set takes more"):
        load(file, backend="device")


@pytest.mark.parametrize("augmentation", ["none", "crop", "random-resized-crop"])
def test_the_number_of_workers_makes_no_difference(photos: Path, augmentation: str) -> None:
    epochs = []
    for num_workers in (0, 2):
        settings: dict[str, Any] = {"augmentation": augmentation, "num_workers": num_workers}
        data = load(photos, batch_size=3, image_size=72, backend="torch", **settings)
        assert isinstance(data.train, StreamLoader)
        epochs.append(join(data.train.epoch(1)))
    assert epochs[0].images.shape == (11, 3, 72, 72)
    assert_same(*epochs)


def test_random_resized_crops_repeat_by_seed_and_number_and_differ_otherwise(photos: Path) -> None:
    loader = load(photos, batch_size=11, image_size=72, num_workers=0, backend="torch").train
    first, again, second = (join(loader.epoch(number)) for number in (1, 1, 2))
    assert_same(first, again)
    order, other = first.labels.argsort(), second.labels.argsort()
    changed = (first.images[order] != second.images[other]).flatten(1).any(1)
    assert changed.all()


def test_loading_leaves_the_global_generator_alone(photos: Path) -> None:
    loader = load(photos, batch_size=3, image_size=72, num_workers=0, backend="torch").train
    before = torch.get_rng_state()
    join(loader.epoch(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_of_photos_crops_the_centre_of_the_resized_image(photos: Path) -> None:
    test = load(photos, 3, image_size=112, test_path=str(photos), backend="torch").test
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
    assert not any(batch.num_padding for batch in batches)
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


def test_cifar_loads_with_its_class_names() -> None:
    data = load(find_data("cifar10-test.parquet"), batch_size=64)
    assert (data.name, data.num_channels, data.image_size) == ("cifar10-test", 3, 32)
    assert data.class_names[:3] == ["airplane", "automobile", "bird"]
    assert (data.train.num_images, data.validation.num_images) == (4500, 500)
    batch = join(data.train.epoch(1))
    assert torch.bincount(batch.labels).min() > 380
    assert data.train.backend == "device"
    # The mean colour that is published for CIFAR-10.
    mean = as_pixels(join(data.train.probe(4500, 1)).images).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.491, 0.482, 0.447]), atol=0.01, rtol=0)


def test_photos_stream_at_224_pixels() -> None:
    file = find_data("photos-256.parquet")
    data = load(file, batch_size=32, image_size=224, max_images=64, backend="torch")
    assert isinstance(data.train, StreamLoader)
    assert data.num_classes == 1000
    for batch in (*data.train.epoch(1), next(data.validation.epoch(1))):
        assert batch.images.shape in ((32, 3, 224, 224), (25, 3, 224, 224))
        assert batch.images.dtype == torch.uint8


def test_photos_of_many_sizes_need_an_image_size() -> None:
    with pytest.raises(ValueError, match=r"data\.image_size: expected one size for all images"):
        load(find_data("photos-256.parquet"))


def test_batches_come_to_the_device_in_order() -> None:
    batches = [Batch(torch.full((2, 1, 3, 3), i), torch.tensor([i, i])) for i in range(5)]
    found = list(prefetch_to_device(batches, torch.device("cpu")))
    assert [int(batch.labels[0]) for batch in found] == list(range(5))
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, batches, strict=True))


def on_gpu_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets lie on the CPU, and are cut as on a GPU."""

    def loader(images: Any, labels: Any, ordering: Ordering) -> GpuSetLoader:
        return GpuSetLoader(images, labels, ordering, torch.device("cpu"))

    monkeypatch.setattr(backends, "CpuSetLoader", loader)


@pytest.mark.parametrize("augmentation", ["none", "shift", "crop"])
def test_a_set_on_a_gpu_gives_the_same_batches_as_one_on_a_cpu(
    file: Path, augmentation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = load(file, batch_size=11, augmentation=augmentation)
    on_gpu_code(monkeypatch)
    on_device = load(file, batch_size=11, augmentation=augmentation)
    for part in ("train", "validation"):
        first, second = getattr(on_cpu, part), getattr(on_device, part)
        assert type(second).__name__ == "GpuSetLoader"
        assert len(first) == len(second)
        for epoch in (1, 2):
            pairs = zip(first.epoch(epoch), second.epoch(epoch), strict=True)
            for one, other in pairs:
                assert_same(one, other)
                assert one.num_padding == other.num_padding
    for one, other in zip(on_cpu.train.probe(20, 3), on_device.train.probe(20, 3), strict=True):
        assert_same(one, other)
    assert not list(on_device.train.epoch(1, len(on_device.train)))


def test_a_set_on_a_gpu_never_waits_for_it_within_an_epoch(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.steps import forbidding_host_syncs

    on_gpu_code(monkeypatch)
    batches = load(file, augmentation="crop").train.epoch(1)
    first = next(batches)
    with forbidding_host_syncs():
        rest = list(batches)
    assert len(rest) == 5
    assert first.images.dtype == torch.uint8


def test_small_sets_lie_on_the_device_unless_worker_processes_are_asked_for(file: Path) -> None:
    assert load(file).train.backend == load(file, backend="device").train.backend == "device"
    assert load(file, backend="torch").train.backend == "torch"


def test_images_that_are_cut_in_their_own_size_cannot_lie_on_the_device(photos: Path) -> None:
    expected = r"^data\.backend: expected auto or torch, got device: random-resized-crop needs"
    with pytest.raises(ValueError, match=expected):
        load(photos, image_size=32, augmentation="random-resized-crop", backend="device")


def test_crops_have_the_distribution_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms import RandomResizedCrop

    sizes = [(300, 200), (180, 260), (640, 90)]
    for width, height in sizes:
        image = Image.new("L", (width, height))
        torch.manual_seed(0)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
        ).double()
        crops = [draw_crop(width, height, 7, index) for index in range(4000)]
        ours = torch.tensor([(c.top, c.left, c.height, c.width) for c in crops]).double()
        spread = theirs.std(0).clamp(min=1e-9)
        # four standard errors of a difference of means of 4,000 draws each; spreads alike
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * spread * (2 / 4000) ** 0.5 + 1e-9).all()
        torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=0)
        assert (ours[:, 0] + ours[:, 2] <= height).all()
        assert (ours[:, 1] + ours[:, 3] <= width).all()
        assert 0.46 < np.mean([c.is_flipped for c in crops]) < 0.54


def test_a_crop_depends_on_seed_and_image_alone() -> None:
    crops = {(s, i): draw_crop(300, 200, s, i) for s in (1, 2**64 - 1) for i in (0, 1, 10**9)}
    assert all(draw_crop(300, 200, *key) == crop for key, crop in crops.items())
    assert len(set(crops.values())) == len(crops)


def test_images_too_thin_for_any_crop_are_cut_in_the_middle() -> None:
    assert draw_crop(1000, 10, 0, 0).width == 13
    assert draw_crop(1000, 10, 0, 0).left == 493
    assert draw_crop(10, 1000, 0, 0).height == 13
    assert draw_crop(1, 1, 0, 0).height == 1


@pytest.mark.slow
def test_noise_costs_nothing_and_repeats() -> None:
    first, second = (load_data(DataConfig(path="synthetic"), batch_size=4, seed=0) for _ in "12")
    assert (first.name, first.num_classes, first.image_size) == ("synthetic", 1000, 224)
    assert first.train.num_images == 1_281_167
    batches = first.train.epoch(1)
    one, other = next(batches), next(batches)
    assert one.images.shape == (4, 3, 224, 224)
    assert one.images.data_ptr() == other.images.data_ptr()
    assert_same(one, next(second.train.epoch(2)))


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((20, 8, 8), np.uint8), labels=[0, 3, 5, 9] * 5)
    assert load(tmp_path / "a.npz").notes == [
        "data.path: no training image of class 1, 2, 4 and 3 more"
    ]


def test_images_left_out_of_a_set_are_reported_at_the_start(photos: Path) -> None:
    (photos / "03" / "photo.jpg").write_bytes(b"no image")
    lines: list[str] = []
    config = DataConfig(path=str(photos), image_size=32, bad_images="skip", augmentation="none")
    data = load_data(config, batch_size=3, seed=0, report=lines.append)
    assert data.train.num_images + data.validation.num_images == 11
    assert data.bad.num_different == 1
    assert len(lines) == 1
    assert "03/photo.jpg" in lines[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_left_out_of_a_stream_leave_batches_as_large_as_they_are(
    photos: Path, num_workers: int
) -> None:
    for number in (2, 8):
        (photos / f"{number:02}" / "photo.jpg").write_bytes(b"no image")
    lines: list[str] = []
    settings: dict[str, Any] = {"image_size": 72, "num_workers": num_workers, "backend": "torch"}
    config = DataConfig(path=str(photos), bad_images="skip", test_path=str(photos), **settings)
    data = load_data(config, batch_size=6, seed=0, report=lines.append)
    assert data.test is not None
    for _ in range(2):
        batches = list(data.test.epoch(1))
        assert [len(batch.labels) for batch in batches] == [6, 6]
        assert [batch.num_padding for batch in batches] == [1, 1]
        assert join(iter(batches)).labels.tolist() == [0, 1, 3, 4, 5, 6, 7, 9, 10, 11]
        assert data.bad.take() == 2
    assert len(lines) == 2


def test_a_set_lies_on_the_gpu_where_there_is_one(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def loader(images: Any, labels: Any, ordering: Ordering, device: torch.device) -> GpuSetLoader:
        devices.append(device)
        return GpuSetLoader(images, labels, ordering, torch.device("cpu"))

    monkeypatch.setattr(backends, "GpuSetLoader", loader)
    cuda = torch.device("cuda")
    load_data(DataConfig(path=str(file)), batch_size=9, seed=0, device=cuda)
    assert devices == [cuda, cuda]  # training and validation
    stream = DataConfig(path=str(file), backend="torch")
    assert load_data(stream, batch_size=9, seed=0, device=cuda).train.backend == "torch"
    assert len(devices) == 2


@pytest.mark.parametrize("batch_size", [4, 5])
def test_noise_fills_mixed_batches_up(batch_size: int) -> None:
    config = DataConfig(path="synthetic", mixup=0.8, max_images=1000, image_size=8)
    data = load_data(config, batch_size=batch_size, seed=0)
    batches = list(data.train.epoch(1))
    assert {len(batch.labels) for batch in batches} == {batch_size + batch_size % 2}
    assert sum(batch.num_images for batch in batches) == 1000
    assert len(next(data.train.probe(batch_size, 1)).labels) == batch_size


def test_a_split_without_an_image_that_can_be_read_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad" / "00").mkdir(parents=True)
    (tmp_path / "bad" / "00" / "photo.jpg").write_bytes(b"no image")
    settings: dict[str, Any] = {"test_path": str(tmp_path / "bad"), "bad_images": "skip"}
    with pytest.raises(ValueError, match=r"^data\.[a-z_]+: expected [^\n]+, got [^\n]+$"):
        load(photos, 3, image_size=32, augmentation="none", **settings)


def test_an_evaluation_of_no_image_that_can_be_read_is_one_line() -> None:
    from safer_fast.attacks.named import ThreatModel
    from safer_fast.evaluation.accuracy import evaluate
    from tests.support.networks import build

    nothing = Batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2).long(), 2)
    with pytest.raises(ValueError, match=r"^data\.path: expected an image that can be read"):
        evaluate(build(), iter([nothing]), ["clean"], ThreatModel("linf", 0.1))
