"""Splits of a data set: open their sources, agree on the image format, divide the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from safer_fast.config.messages import shortened
from safer_fast.config.schema import DataConfig
from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats import Columns, SkippedFiles, Source, names_of, open_splits
from safer_fast.data.formats.synthetic import SIZE as SYNTHETIC_SIZE
from safer_fast.data.formats.synthetic import SyntheticSource
from safer_fast.data.images import ImageFormat, find_num_channels, find_sizes
from safer_fast.data.subset import Indices, draw
from safer_fast.runtime.seeds import derive_seed

_CHANGED = "data.path: expected the data that the run was trained on"


@dataclass(frozen=True)
class KnownData:
    """Facts of the data that a model was trained on, to tell whether they are still the same.

    class_names: None where nothing is classified. validation_rows: sorted rows of the training data
    that were cut off for validation, None for data with a validation split of their own.
    knows_rows: False for a run of a version that did not write them. num_extra: extra images beside
    the training images.
    """

    class_names: list[str] | None
    num_channels: int
    image_size: int
    validation_rows: list[int] | None
    knows_rows: bool
    num_extra: int = 0

    def check(
        self,
        class_names: list[str],
        num_channels: int,
        image_size: int,
        validation_rows: list[int] | None,
    ) -> None:
        """Raise ValueError for other data: they have changed since the model was trained."""
        facts = {
            "classes": (self.class_names, class_names),
            "channels": (self.num_channels, num_channels),
            "pixels an edge": (self.image_size, image_size),
        }
        for what, (before, now) in facts.items():
            if before is not None and before != now:
                raise ValueError(f"{_CHANGED}, got other {what}: {_first_other(before, now)}")
        if self.knows_rows and self.validation_rows != validation_rows:
            raise ValueError(
                f"{_CHANGED}, got data of which other images are cut off for validation: images "
                "came or went, and some of the split would be images that it was trained on"
            )


@dataclass
class Splits:
    train: Source
    validation: Source | None
    test: Source | None
    extra: Source | None

    def all(self) -> list[Source]:
        """All sources, training data first."""
        sources = (self.train, self.validation, self.test, self.extra)
        return [source for source in sources if source is not None]

    def cut_off(self, rows: Mapping[str, tuple[Source, Indices]]) -> list[int] | None:
        """Rows of the training data that are the validation split, None if it has its own.

        rows: of `divide`.
        """
        return rows["validation"][1].tolist() if self.validation is None else None


def open_all(
    config: DataConfig, bad: BadImages, skipped: SkippedFiles, needs_labels: bool = True
) -> Splits:
    """Open all splits; explicitly named ones take precedence over those found with the data.

    Without needs_labels images may have none; the labels of all are left out if some have none.
    """
    columns = columns_of(config)
    found = open_splits(config.path, "data.path", bad, skipped, columns, needs_labels)
    train = found.get("train") or found.get("all")
    if train is None:
        raise ValueError(
            f"data.path: expected training data, got only {', '.join(found)} in {config.path}"
        )
    splits = Splits(
        train,
        _open_one(config, "validation", bad, skipped, needs_labels) or found.get("validation"),
        _open_one(config, "test", bad, skipped, needs_labels) or found.get("test"),
        _open_one(config, "extra", bad, skipped, needs_labels) or found.get("extra"),
    )
    if splits.extra and any(isinstance(item, SyntheticSource) for item in (train, splits.extra)):
        raise ValueError("data.extra_path: expected images beside images, got synthetic")
    for role, name in vars(columns).items():
        if name is not None and not any(source.has_columns for source in splits.all()):
            kinds = "parquet files, which have columns"
            if config.path in names_of("given"):
                kinds = "dictionaries or a dataset of Hugging Face, whose columns have names"
            raise ValueError(f"data.{role}_column: expected {kinds}, got {config.path or 'digits'}")
    if not all(source.has_labels for source in splits.all()):
        for source in splits.all():
            source.leave_out_labels()
    return splits


def columns_of(config: DataConfig) -> Columns:
    return Columns(config.image_column, config.label_column)


def _open_one(
    config: DataConfig, split: str, bad: BadImages, skipped: SkippedFiles, needs_labels: bool
) -> Source | None:
    path = getattr(config, f"{split}_path")
    if path is None:
        return None
    wanted = "train" if split == "extra" else split
    found = open_splits(path, f"data.{split}_path", bad, skipped, columns_of(config), needs_labels)
    source = found.get(wanted) or found.get("all")
    if source is None:
        raise ValueError(
            f"data.{split}_path: expected {wanted} data, got only {', '.join(found)} in {path}"
        )
    return source


def agree_on_images(splits: Splits, image_size: int | None) -> ImageFormat:
    """Return the size and number of channels shared by all splits; raises ValueError otherwise."""
    train, *others = splits.all()
    num_channels = find_num_channels(train)
    for source in others:
        check_channels(source, num_channels)
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


def check_channels(source: Source, num_channels: int) -> None:
    kinds = {1: "grey", 3: "colour"}
    if (got := find_num_channels(source)) != num_channels:
        raise ValueError(
            f"{source.flag}: expected {kinds[num_channels]} images like the training data, "
            f"got {kinds[got]} ones: {source.describe(0)}"
        )


def divide(splits: Splits, config: DataConfig, seed: int) -> dict[str, tuple[Source, Indices]]:
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


def _first_other(before: object, now: object) -> str:
    if not isinstance(before, list) or not isinstance(now, list):
        return f"{now} in place of {before}"
    if gone := [name for name in before if name not in now]:
        return f"{shortened(repr(gone[0]))} is gone"
    if new := [name for name in now if name not in before]:
        return f"{shortened(repr(new[0]))} is new"
    return "their order has changed"
