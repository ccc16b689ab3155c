"""Loading: open the splits, agree on classes and image format, divide the rows, make loaders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from safer_fast.config.schema import DataConfig
from safer_fast.data.augmentation import choose_augmentation
from safer_fast.data.backends import Backends
from safer_fast.data.bad_images import BadImages
from safer_fast.data.batch import Loader
from safer_fast.data.classes import (
    agree_on_classes,
    check_classes,
    check_several,
    notes_on_classes,
    relabel,
)
from safer_fast.data.extra import MixedLoader
from safer_fast.data.fingerprint import fingerprint
from safer_fast.data.formats import Columns, SkippedFiles, Source, names_of, open_splits
from safer_fast.data.formats.hugging_face import PREFIX
from safer_fast.data.formats.synthetic import SIZE as SYNTHETIC_SIZE
from safer_fast.data.formats.synthetic import SyntheticSource
from safer_fast.data.images import ImageFormat, find_num_channels, find_sizes, short_side
from safer_fast.data.order import Ordering
from safer_fast.data.subset import Indices, draw
from safer_fast.runtime.seeds import derive_seed


@dataclass
class Data:
    """The loaders of a run, and the facts about the data that its model needs.

    name: "digits" or the stem of the path. test: None if there is no test data. num_extra: number
    of extra images in all.
    num_channels: 1 for grey images, else 3. image_size: edge in pixels of the images that the
    loaders yield. short_side: size that the short side of an image is resized to before its centre
    is evaluated. validation_rows: rows of the training data that form the validation split, sorted;
    None if the data has its own. fingerprint: hash of the data set, see fingerprint.py. bad: counts
    images that are left out. notes: lines on what a user may not expect.
    """

    name: str
    train: Loader
    validation: Loader
    test: Loader | None
    num_classes: int
    class_names: list[str]
    num_channels: int
    image_size: int
    short_side: int
    validation_rows: list[int] | None
    fingerprint: str
    num_extra: int = 0
    bad: BadImages = field(default_factory=BadImages)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Splits:
    train: Source
    validation: Source | None
    test: Source | None
    extra: Source | None

    def all(self) -> list[Source]:
        """All sources, training data first."""
        sources = (self.train, self.validation, self.test, self.extra)
        return [source for source in sources if source is not None]


def load_data(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    evaluation_batch_size: int | None = None,
    device: torch.device | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    report: Callable[[str], None] = print,
) -> Data:
    """Make loaders for training, validation and test; sets held on the device are decoded now.

    Batches are uint8, on `device` if the backend prepares them there, else on the CPU. A validation
    split taken from the training data and the `max_images` training images are drawn with `seed`.
    batch_size: most images of a training batch, over all ranks. evaluation_batch_size: the same for
    validation and test; default: batch_size. rank, num_ranks: the part of every batch that these
    loaders yield. report: receives a line for each image that is left out.
    Raises ValueError, one line naming the setting and the file, for data that is missing, damaged,
    or does not fit together.
    """
    _check_settings(config)
    bad = BadImages(config.bad_images, report)
    skipped = SkippedFiles()
    splits = _open(config, bad, skipped)
    if splits.extra is not None and splits.train.class_names is not None:
        relabel(splits.extra, splits.train.class_names)
    class_names = agree_on_classes(splits.train, splits.all()[1:])
    image_format = _agree_on_images(splits, config.image_size)
    rows = _divide(splits, config, seed)
    cut_by = "validation_fraction" if config.max_images is None else "max_images"
    check_several(*rows["train"], class_names, f"data.{cut_by}")
    new_backends = partial(
        Backends, config, image_format, len(class_names), device or torch.device("cpu"), bad
    )
    backends = new_backends()
    evaluation = Ordering(evaluation_batch_size or batch_size, seed, rank=rank, num_ranks=num_ranks)
    training = replace(
        evaluation,
        batch_size=batch_size,
        augmentation=choose_augmentation(config.augmentation, image_format.size),
        # timm mixes pairs
        multiple=2 if config.mixup or config.cutmix else 1,
    )
    loaders = {
        split: backends.loader(source, numbers, training if split == "train" else evaluation)
        for split, (source, numbers) in rows.items()
    }
    train, num_extra = loaders["train"], 0
    if splits.extra is not None:
        rows["extra"] = splits.extra, np.arange(len(splits.extra))
        # of its own seed, and of its own pipeline of DALI: both loaders are read in turns
        ordering = replace(training, seed=derive_seed(seed, "extra"))
        loaders["extra"] = new_backends().loader(*rows["extra"], ordering)
        num_extra = loaders["extra"].num_images
        train = MixedLoader(train, loaders["extra"], training, config.extra_fraction)
    return Data(
        name=_name(config.path),
        train=train,
        validation=loaders["validation"],
        test=loaders.get("test"),
        num_classes=len(class_names),
        class_names=class_names,
        num_channels=image_format.num_channels,
        image_size=image_format.size,
        short_side=_short_side(splits, image_format),
        validation_rows=rows["validation"][1].tolist() if splits.validation is None else None,
        fingerprint=fingerprint(rows, loaders, class_names, image_format),
        num_extra=num_extra,
        bad=bad,
        notes=[
            *skipped.lines(),
            *notes_on_classes(*rows["train"], class_names),
            *_batch_notes(train, batch_size),
            *backends.notes,
        ],
    )


def load_evaluation_data(
    path: str,
    config: DataConfig,
    *,
    batch_size: int,
    num_classes: int,
    num_channels: int,
    image_size: int,
    class_names: list[str] | None = None,
    device: torch.device | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> Loader:
    """Make a loader of other data for a trained model.

    It has the test split at `path`, else the validation split, else all data without splits.
    config: how the data is loaded. Images are resized to `image_size`. class_names: of the model;
    the data may have all or some of them, matched by name where it has names; default: not
    compared. Rank 0 prints a line that counts files that were passed over.
    Raises ValueError as `load_data` does, also for labels and channels that the model does not
    have.
    """
    bad, skipped = BadImages(config.bad_images), SkippedFiles()
    found = open_splits(path, "data.path", bad, skipped, _columns(config))
    source = found.get("test") or found.get("validation") or found.get("all")
    if source is None:
        raise ValueError(
            f"data.path: expected test or validation data, got only {', '.join(found)} in {path}"
        )
    if class_names is not None:
        relabel(source, class_names)
    check_classes(source, class_names, num_classes)
    _check_channels(source, num_channels)
    for line in skipped.lines() if rank == 0 else []:
        bad.report(f"note:       {line}")
    image_format = ImageFormat(image_size, num_channels)
    backends = Backends(config, image_format, num_classes, device or torch.device("cpu"), bad)
    ordering = Ordering(batch_size, seed=0, rank=rank, num_ranks=num_ranks)
    return backends.loader(source, np.arange(len(source)), ordering)


def find_image_size(config: DataConfig) -> int:
    """Edge in pixels of the images that `load_data` will yield; raises ValueError as it does."""
    if config.image_size is not None:
        return config.image_size
    train = _open(config, BadImages(config.bad_images, lambda _: None), SkippedFiles()).train
    if isinstance(train, SyntheticSource):
        return SYNTHETIC_SIZE
    width, _ = next(iter(find_sizes([train])))
    return width


def _batch_notes(train: Loader, batch_size: int) -> list[str]:
    """A note on a batch size that the training images do not fill, as a list."""
    if train.images_per_epoch >= batch_size:
        return []
    return [f"batch_size: all {train.num_images} training images are one batch, not {batch_size}"]


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
    if config.prefetch < 1:
        raise ValueError(f"data.prefetch: expected at least 1, got {config.prefetch}")


def _open(config: DataConfig, bad: BadImages, skipped: SkippedFiles) -> _Splits:
    """Open all splits; explicitly named ones take precedence over those found with the data."""
    columns = _columns(config)
    found = open_splits(config.path, "data.path", bad, skipped, columns)
    train = found.get("train") or found.get("all")
    if train is None:
        raise ValueError(
            f"data.path: expected training data, got only {', '.join(found)} in {config.path}"
        )
    splits = _Splits(
        train,
        _open_one(config, "validation", bad, skipped) or found.get("validation"),
        _open_one(config, "test", bad, skipped) or found.get("test"),
        _open_one(config, "extra", bad, skipped) or found.get("extra"),
    )
    if splits.extra and any(isinstance(item, SyntheticSource) for item in (train, splits.extra)):
        raise ValueError("data.extra_path: expected images beside images, got synthetic")
    for role, name in vars(columns).items():
        if name is not None and not any(source.has_columns for source in splits.all()):
            raise ValueError(
                f"data.{role}_column: expected parquet files, which have columns, "
                f"got {config.path or 'digits'}"
            )
    return splits


def _columns(config: DataConfig) -> Columns:
    return Columns(config.image_column, config.label_column)


def _open_one(
    config: DataConfig, split: str, bad: BadImages, skipped: SkippedFiles
) -> Source | None:
    path = getattr(config, f"{split}_path")
    if path is None:
        return None
    wanted = "train" if split == "extra" else split
    found = open_splits(path, f"data.{split}_path", bad, skipped, _columns(config))
    source = found.get(wanted) or found.get("all")
    if source is None:
        raise ValueError(
            f"data.{split}_path: expected {wanted} data, got only {', '.join(found)} in {path}"
        )
    return source


def _agree_on_images(splits: _Splits, image_size: int | None) -> ImageFormat:
    """Return the size and number of channels shared by all splits; raises ValueError otherwise."""
    train, *others = splits.all()
    num_channels = find_num_channels(train)
    for source in others:
        _check_channels(source, num_channels)
    if image_size is not None or isinstance(train, SyntheticSource):
        return ImageFormat(image_size or SYNTHETIC_SIZE, num_channels)
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


def _short_side(splits: _Splits, image_format: ImageFormat) -> int:
    """Size of the short side before the centre crop; images of the right size are not resized."""
    size, short = image_format.size, short_side(image_format.size)
    if image_format.example is not None or short == size:
        return size
    evaluated = splits.test or splits.validation or splits.train
    return size if set(find_sizes([evaluated])) == {(size, size)} else short


def _check_channels(source: Source, num_channels: int) -> None:
    kinds = {1: "grey", 3: "colour"}
    if (got := find_num_channels(source)) != num_channels:
        raise ValueError(
            f"{source.flag}: expected {kinds[num_channels]} images like the training data, "
            f"got {kinds[got]} ones: {source.describe(0)}"
        )


def _divide(splits: _Splits, config: DataConfig, seed: int) -> dict[str, tuple[Source, Indices]]:
    """Source and sorted rows of each split, at most max_images for training."""
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
        drawn = draw(generator.permutation(training), splits.train.labels, config.max_images)
        training = np.sort(drawn)
    rows = {"train": (splits.train, training), "validation": (splits.train, validation)}
    for split, source in (("validation", splits.validation), ("test", splits.test)):
        if source is not None:
            rows[split] = (source, np.arange(len(source)))
    return rows


def _name(path: str | None) -> str:
    if path is None or path in names_of("word"):
        return path or "digits"
    if path.startswith(PREFIX):
        return path.removeprefix(PREFIX).rpartition("/")[2].replace(":", "-") or "data"
    location = Path(path).expanduser().resolve()
    name = location.name if location.is_dir() else location.stem
    return re.sub(r"[-_.]*\{[^}]*\}", "", name) or "data"
