"""Source: labelled images of a data format, by row."""

from __future__ import annotations

import functools
import io
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats.skipped import SkippedFiles

# Not all formats of PIL: for an EPS file it would run Ghostscript on untrusted code.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of images and labels in the settings; None: to be found."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class OpenRequest:
    """Settings for opening a data set, the same for all its splits.

    flag: the setting that names the data, for messages. bad: receives damaged shards and samples
    without image. skipped: counts what is not read. columns: of formats that have any.
    needs_labels: images without labels are an error.
    """

    flag: str
    bad: BadImages
    skipped: SkippedFiles
    columns: Columns
    needs_labels: bool = True


class RowError(ValueError):
    """A row that cannot be read, in one line that names it; its cause is what was raised."""


class Source(ABC):
    """Labelled images on disk or in memory; picklable, for worker processes.

    flag: the setting that names the data, for messages.
    labels: int64 [N]. class_names: None if the format has no names. has_columns: True if `Columns`
    apply. has_text_labels: True if class names were read as labels. has_labels: False for images
    without labels, which are 0 then.
    """

    has_columns = False
    has_text_labels = False
    has_labels = True
    flag: str
    labels: NDArray[np.int64]
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.labels)

    def leave_out_labels(self) -> None:
        """Take all labels and class names away."""
        self.labels, self.class_names = np.zeros(len(self), dtype=np.int64), None
        self.has_labels = self.has_text_labels = False

    def adopt(self, class_names: list[str]) -> None:
        """Renumber labels that are texts by `class_names`, if these contain all of them.

        Labels that are numbers stay as they are.
        """
        names = self.class_names
        if self.has_text_labels and names is not None and set(names) <= set(class_names):
            self.labels, self.class_names = renumbered(self.labels, names, class_names), class_names

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Open the image of a row, not necessarily decoded; raises any exception if damaged."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Origin of a row for messages: its file, or its row number (from 0) and file."""


class EncodedSource(Source):
    """A source of encoded images, each in one of `IMAGE_FORMATS`."""

    @abstractmethod
    def encoded(self, index: int) -> NDArray[np.uint8]:
        """Bytes of a row's encoded image, [num_bytes], read-only; a view if they are in memory.

        Raises any exception if they cannot be read.
        """

    def read(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.encoded(index).data), formats=IMAGE_FORMATS)


@functools.cache
def image_endings() -> frozenset[str]:
    """File name endings of `IMAGE_FORMATS`: .jpg, .png and so on."""
    endings = Image.registered_extensions()
    return frozenset(ending for ending, name in endings.items() if name in IMAGE_FORMATS)


def is_image(file: str) -> bool:
    """True if a file begins like an image of `IMAGE_FORMATS`; raises OSError as `open` does."""
    try:
        Image.open(file, formats=IMAGE_FORMATS).close()
    except UnidentifiedImageError:
        return False
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it cannot be opened
        # PIL cannot parse it: decoding will report the file and the reason
    return True


def renumbered(labels: NDArray[np.int64], names: list[str], wanted: list[str]) -> NDArray[np.int64]:
    """Labels that index `names`, changed to index `wanted`, which contains all of `names`."""
    places = {name: place for place, name in enumerate(wanted)}
    return np.array([places[name] for name in names], dtype=np.int64)[labels]


def check_labels(source: Source, num_classes: int) -> None:
    """Raise ValueError naming the first row whose label is not in 0..num_classes-1."""
    bad = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
    if len(bad):
        raise ValueError(
            f"{source.flag}: expected labels in 0..{num_classes - 1}, "
            f"got {source.labels[bad[0]]}: {source.describe(int(bad[0]))}"
            + (" (all labels are -1, as where they are hidden)" if hides_labels(source) else "")
        )


def hides_labels(source: Source) -> bool:
    """True if every label is -1, as test splits of the hub have them."""
    return bool(len(source)) and bool((source.labels == -1).all())


def empty_classes(labels: NDArray[np.int64], num_classes: int) -> list[int]:
    """Class numbers without any row; labels must be in 0..num_classes-1."""
    counts = np.bincount(labels, minlength=num_classes)
    return [int(number) for number in np.flatnonzero(counts == 0)]
