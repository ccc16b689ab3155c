"""What a data format gives: labels, class names, and images by row."""

from __future__ import annotations

import functools
import io
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats.beside import Beside

# Not all that PIL knows: it would have Ghostscript run what an EPS file says.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF")


@dataclass(frozen=True)
class Columns:
    """The columns of images and labels that the settings name; None: those that leave no choice."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class OpenRequest:
    """How data is to be opened, the same for all its splits.

    flag: the setting that names the data, for messages. bad: receives damaged shards and samples
    without image. beside: counts what is not read. columns: of formats that have any.
    """

    flag: str
    bad: BadImages
    beside: Beside
    columns: Columns


class Source(ABC):
    """Labelled images on disk or in memory; picklable, for worker processes.

    flag: the setting that named the data, for error messages.
    labels: int64 [N]. class_names: None where the format has no names. has_columns: whether
    `Columns` choose what is read. has_text_labels: class names are the labels that were read.
    """

    has_columns = False
    has_text_labels = False
    flag: str
    labels: NDArray[np.int64]
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.labels)

    def adopt(self, class_names: list[str]) -> None:
        """Counts classes as `class_names` does, where labels are texts and all of them are there.

        Other labels are numbers already, and stay.
        """
        names = self.class_names
        if self.has_text_labels and names is not None and set(names) <= set(class_names):
            self.labels, self.class_names = renumbered(self.labels, names, class_names), class_names

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The image of a row, opened but not necessarily decoded; raises anything if damaged."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where a row comes from: its file, or its row (counted from 0) and file."""


class EncodedSource(Source):
    """A source of image files, in bytes, of any of `IMAGE_FORMATS`."""

    @abstractmethod
    def encoded(self, index: int) -> NDArray[np.uint8]:
        """The bytes of a row's image file, [num_bytes], read-only; a view where they lie in memory.

        Raises anything if they cannot be read.
        """

    def read(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.encoded(index).data), formats=IMAGE_FORMATS)


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings of names by which images of `IMAGE_FORMATS` are known: .jpg, .png and so on."""
    endings = Image.registered_extensions()
    return frozenset(ending for ending, name in endings.items() if name in IMAGE_FORMATS)


def is_image(file: str) -> bool:
    """Whether a file begins as images of `IMAGE_FORMATS` do; raises OSError as `open` does."""
    try:
        Image.open(file, formats=IMAGE_FORMATS).close()
    except UnidentifiedImageError:
        return False
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it cannot be opened
        # PIL stumbles over it: what is wrong is said, with its name, when it is decoded
    return True


def renumbered(labels: NDArray[np.int64], names: list[str], wanted: list[str]) -> NDArray[np.int64]:
    """Labels that count `wanted`, which has all of `names`, in place of `names`."""
    places = {name: place for place, name in enumerate(wanted)}
    return np.array([places[name] for name in names], dtype=np.int64)[labels]


def check_labels(source: Source, num_classes: int) -> None:
    """Raises ValueError that names the first row whose label is not in 0..num_classes-1."""
    bad = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
    if len(bad):
        raise ValueError(
            f"{source.flag}: expected labels in 0..{num_classes - 1}, "
            f"got {source.labels[bad[0]]}: {source.describe(int(bad[0]))}"
        )


def empty_classes(labels: NDArray[np.int64], num_classes: int) -> list[int]:
    """The class numbers without any row; labels are in 0..num_classes-1."""
    counts = np.bincount(labels, minlength=num_classes)
    return [int(number) for number in np.flatnonzero(counts == 0)]
