"""Settings of the images and of the backend that loads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safer_fast.config import ranges
from safer_fast.config.ranges import at_least, between, ranged

GIVEN = "given"
"""`data.path` of a run that is trained on data given in Python."""


@dataclass
class DataConfig:
    """Source of the images, their augmentation, and the backend that loads them."""

    path: str | None = None
    """A .parquet file or folder of them (Hugging Face image schema), a folder of images
    (train/CLASS/*.jpg), webdataset tar files (DIR or DIR/train-{000..099}.tar), an .npz file,
    hf:NAME of the Hugging Face hub or a folder of its save_to_disk, digits or synthetic (noise that
    costs nothing); default: digits, those of scikit-learn."""
    validation_path: str | None = None
    """Validation data in the same formats; default: found with the training data or split off."""
    test_path: str | None = None
    """Data for the final figures, in the same formats; default: found with the training data, or
    none."""
    extra_path: str | None = None
    """More training data, such as generated images, in the same formats (its training split);
    they fill a share of every batch. Default: none."""
    extra_fraction: float = ranged(0.7, between(0.001, 0.999))
    """Share of each batch that the images of extra_path fill; an epoch counts the others."""
    validation_fraction: float = ranged(0.1, between(0.001, 0.9))
    """Share of training rows used as validation split if the data has none, in (0, 1)."""
    max_images: int | None = ranged(None, at_least(1, ranges.IMAGES))
    """Use at most this many training images, drawn with the seed, covering as many classes as
    possible; default: all."""
    image_column: str | None = None
    """Column of images in parquet files; default: image or img, or the only one of images."""
    label_column: str | None = None
    """Column of labels in parquet files, integers or text, such as fine_label; default: label, or
    the only one that metadata or name calls labels."""
    image_size: int | None = ranged(None, at_least(2, ranges.EDGE))
    """Edge in pixels that images are resized to; default: their own, the same for all."""
    resolution_schedule: str | None = None
    """Smaller images in the first part of training: 112@0.8,224 trains on 112 pixels for 80 % of
    all epochs, then on 224, the full size. Default: the full size throughout."""
    augmentation: Literal["auto", "none", "shift", "crop", "random-resized-crop"] = "auto"
    """auto: none up to 16 pixels, crop (pad 4, crop, flip) up to 64, random-resized-crop (and
    flip) above."""
    randaugment: int = ranged(0, between(0, 30, "a magnitude"))
    """Magnitude of RandAugment, 0 to 30, two operations for each training image; 0: none."""
    random_erasing: float = ranged(0.0, between(0, 1))
    """Probability that a rectangle of a training image is erased."""
    mixup: float = ranged(0.0, at_least(0, ranges.FACTOR))
    """Alpha of Mixup, which blends pairs of training images and their labels; 0: none."""
    cutmix: float = ranged(0.0, at_least(0, ranges.FACTOR))
    """Alpha of CutMix, which pastes a rectangle of another image; with mixup, every other batch on
    average; 0: none."""
    backend: Literal["auto", "dali", "torch", "device"] = "auto"
    """Backend that prepares batches. device: data that fits (1 GiB decoded) is decoded once, held
    on the device, and shuffled, cropped and flipped there. dali: NVIDIA DALI, on the GPU or on the
    CPU. torch: worker processes. auto: device if the data fits, else dali if it is installed, else
    torch."""
    num_workers: int = ranged(2, at_least(0, 1024))
    """Worker processes, or threads of dali, that decode images; 0: none. Data on the device is
    decoded once, at the start."""
    prefetch: int = ranged(2, at_least(1, 1024))
    """Batches prepared in advance, by dali or by each worker process."""
    bad_images: Literal["error", "skip"] = "error"
    """Images that cannot be read. error: the run ends and names the first. skip: they are left out,
    counted and reported."""
