"""Random erasing, Mixup, CutMix and RandAugment: what they draw, and what they leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from safer_fast import train_model
from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import DataConfig
from safer_fast.data import Batch, Data, Mixing, as_pixels, load_data
from safer_fast.data.mixing import erase
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime.seeds import make_generator
from tests.support.steps import forbidding_host_syncs

NUM_CLASSES = 5
MIXINGS: dict[str, dict[str, float]] = {
    "erasing": {"random_erasing": 0.5},
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "all": {"random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0},
}
each_mixing = pytest.mark.parametrize("settings", MIXINGS.values(), ids=MIXINGS.keys())


def mixing(seed: int = 0, **settings: Any) -> Mixing:
    return Mixing(DataConfig(**settings), NUM_CLASSES, seed)


def make_batch(num_images: int = 12, channels: int = 3, height: int = 16, width: int = 16) -> Batch:
    """Bytes of noise; every image has a class, and every class more than one image."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, channels, height, width)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(num_images) % NUM_CLASSES)


def shares_of(mixed: Batch, labels: Tensor) -> list[float]:
    """The share of each mixed image is its own, by its label; images mixed within a class left
    out."""
    others = labels.flip(0)
    return [
        float(mixed.labels[row, labels[row]])
        for row in range(len(labels))
        if labels[row] != others[row]
    ]


def same(first: Batch, second: Batch) -> bool:
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


@pytest.fixture
def global_numbers() -> Iterator[None]:
    """The global generators of numpy and torch give what they would have given anyway."""
    np.random.seed(7)
    torch.manual_seed(7)
    expected = np.random.random(4), torch.rand(4)
    np.random.seed(7)
    torch.manual_seed(7)
    yield
    assert np.array_equal(np.random.random(4), expected[0])
    assert torch.equal(torch.rand(4), expected[1])


def test_without_settings_only_bytes_become_pixels() -> None:
    batch = make_batch(5)
    batch.num_padding = 2
    mixed = mixing()(batch, 1, 0)
    assert mixed.images.dtype == torch.float32
    assert torch.equal(mixed.images, batch.images.float() / 255)
    assert torch.equal(mixed.labels, batch.labels)
    assert mixed.num_padding == 2


@each_mixing
def test_draws_depend_on_seed_epoch_and_batch_alone(settings: Any) -> None:
    batch = make_batch()
    first = mixing(**settings)(batch, 3, 4)
    used = mixing(**settings)
    used(batch, 1, 0)  # what was drawn before makes no difference
    torch.rand(1), np.random.random()
    assert same(used(batch, 3, 4), first)
    moved = replace(batch, position=12)
    others = [used(batch, 4, 4), used(moved, 3, 5), mixing(1, **settings)(batch, 3, 4)]
    assert not any(torch.equal(other.images, first.images) for other in others)


@pytest.mark.parametrize("position", [0, 7, 1018, 1024, 3000])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 12])
def test_erasing_draws_by_position_in_the_epoch(num_ranks: int, position: int) -> None:
    batch = replace(make_batch(), position=position)
    mix = mixing(random_erasing=0.5)
    whole = mix(batch, 3, 4)
    assert (whole.position, whole.num_padding) == (position, 0)
    parts, start = [], 0
    for rows in torch.arange(12).tensor_split(num_ranks):
        part = Batch(batch.images[rows], batch.labels[rows], position=position + start)
        mixed = mix(part.padded(5), 3, index=start)
        assert (mixed.position, mixed.num_images) == (position + start, len(rows))
        parts.append(mixed.images[: len(rows)])
        start += len(rows)
    assert torch.equal(torch.cat(parts), whole.images)
    is_erased = (whole.images != as_pixels(batch.images)).flatten(1).any(1)
    assert 1 <= int(is_erased.sum()) <= 11


@pytest.mark.parametrize("height", [1, 7])
def test_what_is_erased_depends_on_no_other_image(height: int) -> None:
    mix, batch = mixing(random_erasing=0.9), make_batch(11, 1, height, 5)
    whole = mix(batch, 1, 0).images
    for first in range(11):
        for last in range(first + 1, 12):
            part = Batch(batch.images[first:last], batch.labels[first:last], position=first)
            assert torch.equal(mix(part, 1, 0).images, whole[first:last])


def test_an_empty_batch_stays_empty() -> None:
    for position in (0, 5, 1024):
        empty = Batch(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0).long())
        erased_ = mixing(random_erasing=0.5)(replace(empty, position=position), 1, 0)
        assert (erased_.images.shape, erased_.position) == ((0, 3, 8, 8), position)


@each_mixing
@pytest.mark.usefixtures("global_numbers")
def test_the_global_generators_are_left_alone(settings: Any) -> None:
    for index in range(3):
        mixing(**settings)(make_batch(), 1, index)


@pytest.mark.usefixtures("global_numbers")
def test_the_global_generator_is_given_back_after_a_failure() -> None:
    batch = make_batch(12)
    batch.labels += NUM_CLASSES
    with pytest.raises((RuntimeError, IndexError)):
        mixing(mixup=0.8)(batch, 1, 0)


@each_mixing
def test_images_of_somebody_else_stay_as_they_are(settings: Any) -> None:
    batch = make_batch()
    for images in (batch.images, as_pixels(batch.images)):
        given = Batch(images, batch.labels)
        images, labels = given.images.clone(), given.labels.clone()
        mixed = mixing(**settings)(given, 1, 0)
        assert not torch.equal(mixed.images, as_pixels(images))
        assert torch.equal(given.images, images)
        assert torch.equal(given.labels, labels)


@each_mixing
def test_bytes_and_their_pixels_are_mixed_alike(settings: Any) -> None:
    batch = make_batch()
    pixels = Batch(as_pixels(batch.images), batch.labels)
    assert same(mixing(**settings)(batch, 1, 0), mixing(**settings)(pixels, 1, 0))


@each_mixing
def test_pixels_stay_pixels_and_padding_stays(settings: Any) -> None:
    batch = make_batch(9).padded(12)
    mixed = mixing(**settings)(batch, 1, 0)
    assert (mixed.num_padding, mixed.num_images) == (3, 9)
    assert mixed.images.dtype == torch.float32
    assert 0 <= float(mixed.images.min()) <= float(mixed.images.max()) <= 1
    assert torch.equal(mixed.weights(), batch.weights())


@each_mixing
def test_mixing_never_waits_for_the_device(settings: Any) -> None:
    mix, batch = mixing(**settings), make_batch()
    with forbidding_host_syncs():
        for index in range(8):
            mix(batch, 1, index)


def erased(images: Tensor, probability: float, index: int = 0) -> tuple[Tensor, Tensor]:
    """Images after erasing, and where they were erased, bool [B, H, W].

    The images must have no pixel that erasing could leave as it is.
    """
    after = erase(images, probability, uniform(len(images), images.shape[1], index))
    return after, (after != images).any(1)


def uniform(num_images: int, channels: int, index: int = 0) -> Tensor:
    """Numbers for `erase`."""
    generator = make_generator(0, "erase", 1, index)
    return torch.rand(num_images, 5 + channels, generator=generator, dtype=torch.float64)


def canvas(num_images: int = 2000, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    """Images in a colour that no erasing has: 2."""
    return torch.full((num_images, channels, height, width), 2.0)


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_erased_images_is_the_probability(probability: float) -> None:
    num_images = 4000
    _, is_erased = erased(canvas(num_images, 1, 16, 16), probability)
    share = float(is_erased.flatten(1).any(1).float().mean())
    deviation = (probability * (1 - probability) / num_images) ** 0.5
    assert abs(share - probability) <= 4 * deviation


SHAPES = [(3, 32, 32), (1, 33, 17), (3, 7, 41), (1, 8, 8), (3, 3, 2), (1, 1, 1)]


@pytest.mark.parametrize(("channels", "height", "width"), SHAPES)
def test_what_is_erased_is_one_rectangle_of_one_colour(
    channels: int, height: int, width: int
) -> None:
    images = canvas(300, channels, height, width)
    images[:, :, ::2] = 3.0
    after, is_erased = erased(images, 1.0)
    for row in range(len(images)):
        rows, columns = is_erased[row].any(1), is_erased[row].any(0)
        area = int(rows.sum()) * int(columns.sum())
        assert 1 <= area == int(is_erased[row].sum())
        for along in (rows, columns):
            places = along.nonzero().flatten()
            assert len(places) == places[-1] - places[0] + 1
        colours = after[row][:, is_erased[row]]  # [C, area]
        assert (colours == colours[:, :1]).all()
        assert ((colours >= 0) & (colours < 1)).all()
        assert torch.equal(after[row][:, ~is_erased[row]], images[row][:, ~is_erased[row]])
    if channels == 3:
        found = after[is_erased[:, None].expand_as(after)]
        assert len(found.unique()) > 2 * len(images)  # channels and images have their own


def test_erased_areas_and_shapes_are_those_of_the_paper() -> None:
    edge, smallest, largest = 100, 0.02, 1 / 3
    _, is_erased = erased(canvas(4000, 1, edge, edge), 1.0)
    tall = is_erased.any(2).sum(1).double()
    wide = is_erased.any(1).sum(1).double()
    # rounding moves each edge by half a pixel; what is longer than the image is cut off
    assert ((tall + 0.5) * (wide + 0.5) >= smallest * edge**2).all()
    assert ((tall - 0.5) * (wide - 0.5) <= largest * edge**2).all()
    whole = (tall < edge) & (wide < edge)
    assert whole.double().mean() > 0.95
    ratio = (tall / wide)[whole]
    assert 0.25 < ratio.min() < 0.35
    assert 1 / 0.35 < ratio.max() < 1 / 0.25
    assert abs(ratio.log().mean()) < 0.05
    mean_share = float((tall * wide)[whole].mean()) / edge**2
    assert abs(mean_share - (smallest + largest) / 2) < 0.01


def test_rectangles_lie_everywhere_in_the_image() -> None:
    _, is_erased = erased(canvas(), 1.0)
    hits = is_erased.float().mean(0)  # [H, W]
    assert hits.min() > 0
    for flipped in (hits.flip(0), hits.flip(1), hits.T):
        torch.testing.assert_close(hits, flipped, atol=0.06, rtol=0)
    batches = [erased(canvas(8), 1.0, index)[1] for index in (0, 1)]
    assert not torch.equal(*batches)


def test_mixup_blends_images_as_their_labels_say() -> None:
    batch = make_batch()
    pixels, labels = as_pixels(batch.images), batch.labels
    shares = set()
    for index in range(20):
        mixed = mixing(mixup=0.8)(batch, 1, index)
        assert mixed.labels.dtype == torch.float32
        assert mixed.labels.shape == (12, NUM_CLASSES)
        torch.testing.assert_close(mixed.labels.sum(1), torch.ones(12))
        share = shares_of(mixed, labels)[0]
        assert shares_of(mixed, labels) == pytest.approx([share] * len(shares_of(mixed, labels)))
        blend = pixels * share + pixels.flip(0) * (1 - share)
        torch.testing.assert_close(mixed.images, blend)
        shares.add(round(share, 4))
    assert len(shares) > 15


def test_cutmix_pastes_the_share_that_the_labels_say() -> None:
    batch = make_batch(12, 3, 16, 24)
    pixels, labels = as_pixels(batch.images), batch.labels
    shares = set()
    for index in range(20):
        mixed = mixing(cutmix=1.0)(batch, 1, index)
        torch.testing.assert_close(mixed.labels.sum(1), torch.ones(12))
        is_pasted = (mixed.images != pixels).any(1).any(0)  # [H, W]
        rows, columns = is_pasted.any(1), is_pasted.any(0)
        assert torch.equal(is_pasted, rows[:, None] & columns)
        pasted = torch.where(is_pasted, pixels.flip(0), pixels)
        assert torch.equal(mixed.images, pasted)
        own = 1 - float(is_pasted.float().mean())
        assert shares_of(mixed, labels) == pytest.approx([own] * len(shares_of(mixed, labels)))
        shares.add(round(own, 4))
    assert len(shares) > 10


def test_mixup_and_cutmix_take_turns() -> None:
    batch = make_batch()
    pixels, kinds = as_pixels(batch.images), []
    for index in range(100):
        mixed = mixing(mixup=0.8, cutmix=1.0)(batch, 1, index)
        is_copied = (mixed.images == pixels) | (mixed.images == pixels.flip(0))
        kinds.append(bool(is_copied.all()))
    assert 30 <= sum(kinds) <= 70


def test_images_are_erased_before_they_are_mixed() -> None:
    batch = make_batch()
    pixels = mixing(random_erasing=0.5)(batch, 1, 0)
    both = mixing(random_erasing=0.5, mixup=0.8)(batch, 1, 0)
    assert same(both, mixing(mixup=0.8)(pixels, 1, 0))
    assert not same(both, mixing(mixup=0.8)(batch, 1, 0))


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_all_ranks_mix_alike_each_its_own_images(settings: Any) -> None:
    batch = make_batch(12)
    pixels, mix = as_pixels(batch.images), mixing(**settings)
    whole = mix(batch, 1, 4)
    for first, last in ((0, 6), (6, 10)):
        part = Batch(batch.images[first:last], batch.labels[first:last], position=first)
        mixed = mix(part, 1, 4)
        assert mixed.position == first
        assert shares_of(mixed, part.labels)[0] == pytest.approx(shares_of(whole, batch.labels)[0])
        if "mixup" in settings:
            share = shares_of(mixed, part.labels)[0]
            own = pixels[first:last]
            torch.testing.assert_close(mixed.images, own * share + own.flip(0) * (1 - share))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """50 images, of which 45 are for training; labels are the numbers of the images."""
    images = make_batch(50, 3, 12, 12).images.numpy()
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(50))
    return tmp_path / "a.npz"


def load(path: Path, batch_size: int, num_ranks: int = 1, **settings: Any) -> Data:
    config = DataConfig(path=str(path), **settings)
    return load_data(config, batch_size=batch_size, seed=0, num_ranks=num_ranks)


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"random_erasing": 0.5}, {}])
@pytest.mark.parametrize("backend", ["device", "torch"])
@pytest.mark.parametrize(("batch_size", "num_ranks"), [(45, 1), (15, 1), (7, 1), (1, 1), (30, 4)])
def test_training_batches_that_are_mixed_are_even(
    file: Path, backend: Any, batch_size: int, num_ranks: int, settings: Any
) -> None:
    data = load(file, batch_size, num_ranks, backend=backend, num_workers=0, **settings)
    is_mixed = bool(settings) and "random_erasing" not in settings
    mix = Mixing(DataConfig(**settings), data.num_classes, seed=0)
    numbers = []
    for index, batch in enumerate(data.train.epoch(1)):
        assert len(batch.labels) == data.train.batch_size
        assert len(batch.labels) % (2 if is_mixed else 1) == 0
        assert mix(batch, 1, index).num_images == batch.num_images
        numbers += batch.labels[: batch.num_images].tolist()
    assert len(set(numbers)) == len(numbers)
    if num_ranks == 1:
        assert len(numbers) == data.train.num_images == 45
        assert data.train.batch_size - -(-45 // len(data.train)) <= (1 if is_mixed else 0)
    else:
        assert 45 // num_ranks - 1 <= len(numbers) <= -(-45 // num_ranks) + 1


def test_evaluation_batches_are_not_filled_up_to_be_even(file: Path) -> None:
    data = load(file, 45, mixup=0.8, test_path=str(file))
    assert data.test is not None
    (validation,) = data.validation.epoch(1)
    assert (len(validation.labels), validation.num_padding) == (5, 0)
    assert [len(batch.labels) for batch in data.test.epoch(1)] == [25, 25]
    assert (data.train.batch_size, data.validation.batch_size, data.test.batch_size) == (46, 5, 25)


DIGITS = [
    "--epochs=3",
    "--selection.warmup_epochs=2",
    "--selection.num_images=32",
    "--attack.steps=1",
    "--data.max_images=127",
    "--batch_size=32",
    "--evaluation.steps=1",
    "--evaluation.max_images=32",
    "--evaluation.attacks=clean",
    "--evaluation.every_epochs=3",
    "--runtime.log_every_steps=1",
    "--runtime.num_threads=1",
    "--data.mixup=0.8",
    "--data.cutmix=1.0",
    "--data.random_erasing=0.25",
]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["pgd-at", "trades"])
def test_a_whole_run_on_mixed_images_stays_finite_and_repeats(
    objective: str, tmp_path: Path
) -> None:
    flags = [*DIGITS, "--objective.name", objective, "--output"]
    steps = []
    for name in ("first", "again"):
        folder = train_model(parse_config([*flags, str(tmp_path / name)]))
        events = read_metrics(folder / "metrics.jsonl")
        assert events[-1]["event"] == "end"
        steps.append([event for event in events if event["event"] == "step"])
    assert len(steps[0]) == 3 * 4
    losses = [step["loss"] for step in steps[0]]
    assert all(loss is not None and 0 < loss < 100 for loss in losses)
    assert all(step["skipped_steps"] == 0 for step in steps[0])
    assert losses == [step["loss"] for step in steps[1]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth colours of several sizes as JPEG; a class folder for each image."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for number in range(20):
        height, width = 80 + 3 * number, 140 - 3 * number
        y, x = np.mgrid[:height, :width] * (255 / 140)
        pixels = np.stack([y, x, np.full_like(x, 12 * number)], axis=2).astype(np.uint8)
        (folder / f"{number:02}").mkdir(parents=True)
        Image.fromarray(pixels).save(folder / f"{number:02}" / "photo.jpg")
    return folder


def by_label(batches: Iterator[Batch]) -> dict[int, Tensor]:
    """The images by their labels, which are all different."""
    return {
        int(label): image
        for batch in batches
        for image, label in zip(batch.images, batch.labels, strict=True)
    }


def load_photos(path: Path, randaugment: int = 9, seed: int = 0, **settings: Any) -> Data:
    config = DataConfig(path=str(path), image_size=72, randaugment=randaugment, **settings)
    return load_data(config, batch_size=9, seed=seed)


def num_alike(first: dict[int, Tensor], second: dict[int, Tensor]) -> int:
    return sum(torch.equal(first[label], second[label]) for label in first.keys() & second.keys())


@pytest.mark.parametrize("augmentation", ["none", "crop", "random-resized-crop"])
def test_randaugment_changes_training_images_alone(photos: Path, augmentation: str) -> None:
    settings: dict[str, Any] = {"augmentation": augmentation, "num_workers": 0}
    plain = load_photos(photos, 0, backend="torch", **settings)
    data = load_photos(photos, backend="torch", **settings)
    one, other = by_label(plain.train.epoch(1)), by_label(data.train.epoch(1))
    assert one.keys() == other.keys()
    assert len(one) == 18
    # an operation may be the identity, and others leave some images as they are
    assert num_alike(one, other) <= 6
    for part in ("validation.epoch", "train.probe"):
        loader, method = part.split(".")
        pair = [
            by_label(getattr(getattr(each, loader), method)(*arguments))
            for each in (plain, data)
            for arguments in [(1,) if method == "epoch" else (18, 1)]
        ]
        assert num_alike(*pair) == len(pair[0]) > 0


def test_randaugment_repeats_by_seed_and_epoch_whatever_the_number_of_workers(
    photos: Path,
) -> None:
    settings: dict[str, Any] = {"augmentation": "none", "backend": "torch"}
    first = by_label(load_photos(photos, num_workers=0, **settings).train.epoch(2))
    loader = load_photos(photos, num_workers=2, **settings).train
    by_label(loader.epoch(1))  # what was drawn before makes no difference
    assert num_alike(by_label(loader.epoch(2)), first) == 18
    assert num_alike(by_label(loader.epoch(3)), first) <= 6
    # another seed cuts off other images for validation
    other = by_label(load_photos(photos, seed=1, num_workers=0, **settings).train.epoch(2))
    assert num_alike(other, first) <= 6


def test_randaugment_draws_by_image_and_not_by_batch(photos: Path) -> None:
    config = DataConfig(str(photos), image_size=72, randaugment=9, num_workers=0, backend="torch")
    one, other = (load_data(config, batch_size=size, seed=0).train for size in (4, 18))
    assert num_alike(by_label(one.epoch(1)), by_label(other.epoch(1))) == 18


@pytest.mark.usefixtures("global_numbers")
def test_randaugment_leaves_the_global_generators_alone(photos: Path) -> None:
    loader = load_photos(photos, num_workers=0).train
    assert len(list(loader.epoch(1))) == 2


def test_randaugment_grows_with_its_magnitude(photos: Path) -> None:
    plain = by_label(load_photos(photos, 0, num_workers=0, backend="torch").train.epoch(1))

    def change(magnitude: int) -> float:
        images = by_label(load_photos(photos, magnitude, num_workers=0).train.epoch(1))
        return sum(float((images[n].float() - plain[n].float()).abs().mean()) for n in plain)

    assert 0 < change(1) < change(30)


def test_randaugment_draws_for_every_image_anew(tmp_path: Path) -> None:
    images = make_batch(1, 3, 16, 16).images.numpy().repeat(20, axis=0)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20))
    train = load(tmp_path / "a.npz", 18, randaugment=9, num_workers=0).train
    assert len({image.numpy().tobytes() for image in by_label(train.epoch(1)).values()}) > 10


def test_randaugment_takes_grey_images(tmp_path: Path) -> None:
    images = make_batch(20, 1, 16, 16).images.squeeze(1).numpy()
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20))
    data = load(tmp_path / "a.npz", 9, randaugment=9, num_workers=0)
    found = by_label(data.train.epoch(1))
    assert {image.shape for image in found.values()} == {torch.Size([1, 16, 16])}
    changed = [not np.array_equal(found[number][0], images[number]) for number in found]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize("size", [12, 72])
def test_randaugment_is_the_work_of_the_torch_backend(file: Path, photos: Path, size: int) -> None:
    path = file if size == 12 else photos
    data = load(path, 9, image_size=size, randaugment=9)
    assert data.train.backend == "torch"
    plain = load(path, 9, image_size=size)
    assert data.validation.backend == plain.validation.backend
    for backend in ("device", "dali"):
        with pytest.raises(ValueError, match=r"^data\.backend: expected auto or torch, got "):
            load(path, 9, image_size=size, randaugment=9, backend=backend)
