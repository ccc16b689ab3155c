"""Loading: open the splits, agree on classes and image format, divide the rows, make loaders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from safer_fast.data.corrupted import CorruptedSource, Corruption
from safer_fast.data.extra import MixedLoader
from safer_fast.data.fingerprint import fingerprint
from safer_fast.data.formats import SkippedFiles, Source, names_of, open_splits
from safer_fast.data.formats.hugging_face import PREFIX
from safer_fast.data.formats.synthetic import SIZE as SYNTHETIC_SIZE
from safer_fast.data.formats.synthetic import SyntheticSource
from safer_fast.data.images import ImageFormat, find_sizes, short_side
from safer_fast.data.order import Ordering
from safer_fast.data.overlap import notes_on_overlap
from safer_fast.data.splits import (
    KnownData,
    Splits,
    agree_on_images,
    check_channels,
    columns_of,
    divide,
    open_all,
)
from safer_fast.data.subset import Indices
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
    images that are left out. has_labels: False where all labels are 0, as images have none. notes:
    lines on what a user may not expect.
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
    has_labels: bool = True
    bad: BadImages = field(default_factory=BadImages)
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> str:
        """The words for the number of classes."""
        return f"{self.num_classes} classes" if self.has_labels else "no labels"


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
    needs_labels: bool = True,
) -> Data:
    """Make loaders for training, validation and test; sets held on the device are decoded now.

    Batches are uint8, on `device` if the backend prepares them there, else on the CPU. A validation
    split taken from the training data and the `max_images` training images are drawn with `seed`.
    batch_size: most images of a training batch, over all ranks. evaluation_batch_size: the same for
    validation and test; default: batch_size. rank, num_ranks: the part of every batch that these
    loaders yield. report: receives a line for each image that is left out. needs_labels: False
    takes images of one class, and images without labels.
    Raises ValueError, one line naming the setting and the file, for data that is missing, damaged,
    or does not fit together.
    """
    _check_settings(config)
    bad = BadImages(config.bad_images, report)
    skipped = SkippedFiles()
    splits = open_all(config, bad, skipped, needs_labels)
    if splits.extra is not None and splits.train.class_names is not None:
        relabel(splits.extra, splits.train.class_names)
    class_names = agree_on_classes(splits.train, splits.all()[1:], needs_labels)
    image_format = agree_on_images(splits, config.image_size)
    rows = divide(splits, config, seed)
    cut_by = "validation_fraction" if config.max_images is None else "max_images"
    if needs_labels:
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
        validation_rows=splits.cut_off(rows),
        fingerprint=fingerprint(rows, loaders, class_names, image_format),
        num_extra=num_extra,
        has_labels=splits.train.has_labels,
        bad=bad,
        notes=[
            *skipped.lines(),
            *notes_on_classes(*rows["train"], class_names),
            *notes_on_overlap(splits.train, {"validation": splits.validation, "test": splits.test}),
            *_batch_notes(train, batch_size),
            *backends.notes,
        ],
    )


def open_evaluation_data(
    path: str,
    config: DataConfig,
    bad: BadImages,
    skipped: SkippedFiles,
    *,
    num_classes: int,
    num_channels: int,
    class_names: list[str] | None = None,
    needs_labels: bool = True,
) -> Source:
    """Open the images that `load_evaluation_data` loads, with all of its checks."""
    found = open_splits(path, "data.path", bad, skipped, columns_of(config), needs_labels)
    source = found.get("test") or found.get("validation") or found.get("all")
    if source is None:
        raise ValueError(
            f"data.path: expected test or validation data, got only {', '.join(found)} in {path}"
        )
    if class_names is not None:
        relabel(source, class_names)
    check_classes(source, class_names, num_classes)
    check_channels(source, num_channels)
    return source


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
    corruption: Corruption | None = None,
    needs_labels: bool = True,
) -> Loader:
    """Make a loader of other data for a trained model.

    It has the test split at `path`, else the validation split, else all data without splits.
    config: how the data is loaded. Images are resized to `image_size`. class_names: of the model;
    the data may have all or some of them, matched by name where it has names; default: not
    compared. Rank 0 prints a line that counts files that were passed over. corruption: images are
    corrupted by it. needs_labels: see `load_data`.
    Raises ValueError as `load_data` does, also for labels and channels that the model does not
    have.
    """
    bad, skipped = BadImages(config.bad_images), SkippedFiles()
    source = open_evaluation_data(
        path,
        config,
        bad,
        skipped,
        num_classes=num_classes,
        num_channels=num_channels,
        class_names=class_names,
        needs_labels=needs_labels,
    )
    for line in skipped.lines() if rank == 0 else []:
        bad.report(f"note:       {line}")
    rows = source, np.arange(len(source))
    image_format = ImageFormat(image_size, num_channels)
    parts = _Parts(batch_size, device or torch.device("cpu"), rank, num_ranks)
    return _evaluation_loader(rows, config, image_format, num_classes, bad, parts, corruption)


def load_own_split(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    corruption: Corruption | None = None,
    needs_labels: bool = True,
    known: KnownData | None = None,
) -> tuple[str, Loader]:
    """Make a loader of the test split of a run's data, else of its validation split; name it.

    It yields what the loader of `load_data` does, without loading the training images.
    config, seed: those of the run. corruption: images are corrupted by it. needs_labels: see
    `load_data`. known: facts of the data that the run was trained on. Raises ValueError as
    `load_data` does, and for data that have changed.
    """
    bad = BadImages(config.bad_images)
    splits = open_all(replace(config, extra_path=None), bad, SkippedFiles(), needs_labels)
    class_names = agree_on_classes(splits.train, splits.all()[1:], needs_labels)
    image_format = agree_on_images(splits, config.image_size)
    rows = divide(splits, config, seed)
    name = "test" if "test" in rows else "validation"
    if known is not None:  # what is cut off does not matter to a test split
        cut = splits.cut_off(rows) if name == "validation" else known.validation_rows
        known.check(class_names, image_format.num_channels, image_format.size, cut)
    parts = _Parts(batch_size, device or torch.device("cpu"), rank, num_ranks)
    num_classes = len(class_names)
    return name, _evaluation_loader(
        rows[name], config, image_format, num_classes, bad, parts, corruption
    )


class _Parts(NamedTuple):
    """The size of batches, and the part of each that a rank loads to its device."""

    batch_size: int
    device: torch.device
    rank: int
    num_ranks: int


def _evaluation_loader(
    rows: tuple[Source, Indices],
    config: DataConfig,
    image_format: ImageFormat,
    num_classes: int,
    bad: BadImages,
    parts: _Parts,
    corruption: Corruption | None,
) -> Loader:
    source, numbers = rows
    if corruption is not None:
        source = CorruptedSource(source, image_format, corruption)
    backends = Backends(config, image_format, num_classes, parts.device, bad)
    ordering = Ordering(parts.batch_size, seed=0, rank=parts.rank, num_ranks=parts.num_ranks)
    return backends.loader(source, numbers, ordering)


def find_image_size(config: DataConfig, needs_labels: bool = True) -> int:
    """Edge in pixels of the images that `load_data` will yield; raises ValueError as it does."""
    if config.image_size is not None:
        return config.image_size
    bad = BadImages(config.bad_images, lambda _: None)
    train = open_all(config, bad, SkippedFiles(), needs_labels).train
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


def _short_side(splits: Splits, image_format: ImageFormat) -> int:
    """Size of the short side before the centre crop; images of the right size are not resized."""
    size, short = image_format.size, short_side(image_format.size)
    if image_format.example is not None or short == size:
        return size
    evaluated = splits.test or splits.validation or splits.train
    return size if set(find_sizes([evaluated])) == {(size, size)} else short


def _name(path: str | None) -> str:
    if path is None or path in names_of("word"):
        return path or "digits"
    if path.startswith(PREFIX):
        return path.removeprefix(PREFIX).rpartition("/")[2].replace(":", "-") or "data"
    location = Path(path).expanduser().resolve()
    name = location.name if location.is_dir() else location.stem
    return re.sub(r"[-_.]*\{[^}]*\}", "", name) or "data"
