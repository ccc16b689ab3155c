"""From settings to loaders: open the splits, agree on classes and images, cut, load."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from safer_fast.config import DataConfig
from safer_fast.data.batch import Loader
from safer_fast.data.formats import Source, check_labels, open_splits
from safer_fast.data.images import ImageFormat, find_num_channels, find_sizes
from safer_fast.data.loaders import DeviceLoader, Ordering, make_loader
from safer_fast.data.reading import Rows
from safer_fast.data.seeds import derive_seed

LARGEST_UNAUGMENTED_SIZE = 16
LARGEST_CROP_SIZE = 64


@dataclass
class Data:
    """The loaders of a run, and what its model must know of the data.

    name: "digits" or the stem of the path. test: None where there is no test data.
    num_channels: 1 for grey images, else 3. image_size: edge in pixels of the images that the
    loaders give. validation_rows: rows of the training data that were cut off as validation
    split, sorted; None where the data has its own.
    """

    name: str
    train: Loader
    validation: Loader
    test: Loader | None
    num_classes: int
    class_names: list[str]
    num_channels: int
    image_size: int
    validation_rows: list[int] | None


@dataclass
class _Splits:
    train: Source
    validation: Source | None
    test: Source | None

    def all(self) -> list[Source]:
        """Those that are there, training data first."""
        return [source for source in (self.train, self.validation, self.test) if source is not None]


def load_data(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    evaluation_batch_size: int | None = None,
    device: torch.device | None = None,
) -> Data:
    """Loaders for training, validation and test, decoded already where the images are small.

    Batches are uint8, on the CPU, or on `device` where `data.backend` puts the set there. The
    validation split, where it is cut from the training data,
    and the `max_images` training images are drawn with `seed`. evaluation_batch_size: of
    validation and test; default: batch_size.
    Raises ValueError, one line that names the setting and the file, for data that is missing,
    damaged, or does not fit together.
    """
    _check_settings(config)
    splits = _open(config)
    class_names = _agree_on_classes(splits)
    image_format = _agree_on_images(splits, config.image_size)
    training_rows, validation_rows = _cut(splits, config, seed)
    place = _place(config, device)
    training = Ordering(batch_size, seed, _augmentation(config, image_format.size))
    evaluation = Ordering(evaluation_batch_size or batch_size, seed)

    def load(source: Source, rows: Rows, ordering: Ordering) -> Loader:
        loader = make_loader(source, rows, image_format, ordering, config.num_workers, place)
        if config.backend == "device" and not isinstance(loader, DeviceLoader):
            raise ValueError(
                "data.backend: expected auto or torch for images that are decoded when needed "
                "(random-resized-crop, large ones of other sizes, over 1 GiB in all), got device"
            )
        return loader

    test = splits.test
    return Data(
        name=_name(config.path),
        train=load(splits.train, training_rows, training),
        validation=load(splits.validation or splits.train, validation_rows, evaluation),
        test=None if test is None else load(test, np.arange(len(test)), evaluation),
        num_classes=len(class_names),
        class_names=class_names,
        num_channels=image_format.num_channels,
        image_size=image_format.size,
        validation_rows=validation_rows.tolist() if splits.validation is None else None,
    )


def load_evaluation_data(
    path: str,
    *,
    batch_size: int,
    num_classes: int,
    num_channels: int,
    image_size: int,
    num_workers: int,
    class_names: list[str] | None = None,
) -> Loader:
    """A loader of other data for a trained model: the test split at `path`, else its validation
    split, else all of it where it has no splits.

    Images are brought to `image_size`. class_names: those of the model, to be compared with the
    data's where that has names; default: not compared.
    Raises ValueError as `load_data` does, also for labels and channels that the model does not
    know.
    """
    found = open_splits(path, "data.path")
    source = found.get("test") or found.get("validation") or found.get("all")
    if source is None:
        raise ValueError(
            f"data.path: expected test or validation data, got only {', '.join(found)} in {path}"
        )
    _check_classes(source, class_names, num_classes)
    _check_channels(source, num_channels)
    image_format = ImageFormat(image_size, num_channels)
    rows = np.arange(len(source))
    return make_loader(source, rows, image_format, Ordering(batch_size, seed=0), num_workers)


def _place(config: DataConfig, device: torch.device | None) -> torch.device | None:
    """Where sets that are held in memory lie, if not in the CPU's."""
    if config.backend == "device":
        return device or torch.device("cpu")
    on_gpu = device is not None and device.type == "cuda"
    return device if on_gpu and config.backend == "auto" else None


def _check_settings(config: DataConfig) -> None:
    fraction = config.validation_fraction
    if not 0 < fraction < 1:
        raise ValueError(f"data.validation_fraction: expected a share in (0, 1), got {fraction}")
    for name in ("max_images", "image_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"data.{name}: expected at least 1, got {value}")
    if config.num_workers < 0:
        raise ValueError(f"data.num_workers: expected at least 0, got {config.num_workers}")


def _open(config: DataConfig) -> _Splits:
    """Splits named explicitly go before those found beside the training data."""
    found = open_splits(config.path, "data.path")
    train = found.get("train") or found.get("all")
    if train is None:
        raise ValueError(
            f"data.path: expected training data, got only {', '.join(found)} in {config.path}"
        )
    return _Splits(
        train,
        _open_one(config.validation_path, "validation") or found.get("validation"),
        _open_one(config.test_path, "test") or found.get("test"),
    )


def _open_one(path: str | None, split: str) -> Source | None:
    if path is None:
        return None
    found = open_splits(path, f"data.{split}_path")
    source = found.get(split) or found.get("all")
    if source is None:
        raise ValueError(
            f"data.{split}_path: expected {split} data, got only {', '.join(found)} in {path}"
        )
    return source


def _agree_on_classes(splits: _Splits) -> list[str]:
    """The training data's class names, else its label numbers; other splits may not differ."""
    train, *others = splits.all()
    names = train.class_names or [str(number) for number in range(int(train.labels.max()) + 1)]
    for source in others:
        _check_classes(source, train.class_names, len(names))
    return names


def _check_classes(source: Source, names: list[str] | None, num_classes: int) -> None:
    given = source.class_names
    if given is not None and names is not None and given != names:
        raise ValueError(
            f"{source.flag}: expected the class names of the training data, "
            f"got {_first_difference(names, given)}: {source.describe(0)}"
        )
    check_labels(source, num_classes)


def _first_difference(expected: list[str], got: list[str]) -> str:
    pairs = zip_longest(expected, got, fillvalue="nothing")
    wanted, name = next(pair for pair in pairs if pair[0] != pair[1])
    return f"{name} in place of {wanted}"


def _agree_on_images(splits: _Splits, image_size: int | None) -> ImageFormat:
    """One size and one number of channels for all splits."""
    train, *others = splits.all()
    num_channels = find_num_channels(train)
    for source in others:
        _check_channels(source, num_channels)
    if image_size is not None:
        return ImageFormat(image_size, num_channels)
    sizes = find_sizes(splits.all())
    (width, height), example = next(iter(sizes.items()))
    if len(sizes) > 1 or width != height:
        expected = "one size for all images" if len(sizes) > 1 else "square images"
        examples = [f"{w}x{h} ({where})" for (w, h), where in sizes.items()]
        raise ValueError(
            f"data.image_size: expected {expected} or --data.image_size, "
            f"got {' and '.join(examples[:2])}"
        )
    return ImageFormat(width, num_channels, example)


def _check_channels(source: Source, num_channels: int) -> None:
    kinds = {1: "grey", 3: "colour"}
    if (got := find_num_channels(source)) != num_channels:
        raise ValueError(
            f"{source.flag}: expected {kinds[num_channels]} images like the training data, "
            f"got {kinds[got]} ones: {source.describe(0)}"
        )


def _cut(splits: _Splits, config: DataConfig, seed: int) -> tuple[Rows, Rows]:
    """Sorted rows for training, at most max_images, and for validation."""
    generator = np.random.default_rng(derive_seed(seed, "split"))
    num_rows = len(splits.train)
    order = generator.permutation(num_rows)
    num_validation = 0
    if splits.validation is None:
        num_validation = round(num_rows * config.validation_fraction)
        if not 0 < num_validation < num_rows:
            raise ValueError(
                "data.validation_fraction: expected at least one image for validation and one "
                f"for training, got {config.validation_fraction} of {num_rows}"
            )
    training, validation = np.sort(order[num_validation:]), np.sort(order[:num_validation])
    if config.max_images is not None:
        training = np.sort(generator.permutation(training)[: config.max_images])
    return training, validation if splits.validation is None else np.arange(len(splits.validation))


def _augmentation(config: DataConfig, image_size: int) -> str:
    if config.augmentation != "auto":
        return config.augmentation
    if image_size <= LARGEST_UNAUGMENTED_SIZE:
        return "none"
    return "crop" if image_size <= LARGEST_CROP_SIZE else "random-resized-crop"


def _name(path: str | None) -> str:
    if path is None:
        return "digits"
    location = Path(path).expanduser().resolve()
    return location.name if location.is_dir() else location.stem
