"""Images in arrays: scikit-learn's digits, and .npz files."""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple
from zipfile import ZIP_STORED

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image

from safer_fast.config.messages import printable
from safer_fast.data.formats.source import OpenRequest, Source
from safer_fast.data.formats.splits import names_split, split_of
from safer_fast.runtime.machine_errors import machine_error, physical_memory

NUM_TRAINING_DIGITS = 1000
# Arrays of images from this many bytes on stay on disk, if they are stored as they are.
MAPPED_FROM = 2**28
ZIP_HEADER = 30
# Names of arrays, in any case, alone or with a word for a split: x_train, val_labels.
PAIRS = (("images", "labels"), ("image", "label"), ("x", "y"))


class ArraySource(Source):
    """Rows of one array. images: uint8 [N, H, W] or [N, H, W, C] with C = 3 or 4."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        flag: str,
        name: str,
        class_names: list[str] | None = None,
    ) -> None:
        self.images, self.labels = images, labels
        self.flag, self.name, self.class_names = flag, name, class_names

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def describe(self, index: int) -> str:
        return f"row {index} of {self.name}"


class MappedSource(ArraySource):
    """Rows of an uncompressed array of an .npz file, which stays on disk.

    Worker processes map the file anew: its pages are in memory once, for all of them.
    """

    def __init__(self, array: StoredArray, labels: NDArray[np.int64], flag: str) -> None:
        images = channels_last(array.map(), array.path, flag)
        super().__init__(images, labels, flag, str(array.path))
        self.array = array

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.images = channels_last(self.array.map(), self.array.path, self.flag)


class StoredArray(NamedTuple):
    """The place of an array in a file: offset in bytes, and its layout."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool

    def map(self) -> NDArray[Any]:
        """Map the array, read-only."""
        order: Literal["F", "C"] = "F" if self.is_fortran else "C"
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)


def open_digits(_: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """scikit-learn's 1797 grey 8x8 digits, values 0..16 scaled to 0..255, in a fixed split.

    train: the first 1000 rows of a fixed permutation; test: the other 797.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = np.round(digits.images[order] * 255 / 16).astype(np.uint8)
    labels = digits.target[order].astype(np.int64)
    names = [str(name) for name in digits.target_names]
    halves = {"train": slice(NUM_TRAINING_DIGITS), "test": slice(NUM_TRAINING_DIGITS, None)}
    return {
        split: ArraySource(images[rows], labels[rows], request.flag, f"digits ({split})", names)
        for split, rows in halves.items()
    }


def open_npz(paths: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """Open one .npz file with arrays of images and labels, of all data or of each split."""
    (path,), flag, skipped = paths["all"], request.flag, request.skipped
    # opened here, because numpy does not close a file that is damaged
    with path.open("rb") as file, open_archive(file, path, flag) as archive:
        found = _find_arrays(archive.files, path, flag, request.needs_labels)
        wanted = [key for keys in found.values() for key in keys if key is not None]
        stored = {images: _find_stored(archive, file, images, path) for images, _ in found.values()}
        mapped = {key: array for key, array in stored.items() if array is not None}
        loaded = [key for key in wanted if key not in mapped]
        check_memory(archive, loaded, path, flag)
        arrays = {key: load_array(archive, key, path, flag) for key in loaded}
        for key in archive.files:
            if key not in wanted:
                skipped.skip(f"{path}/{key}")
    sources: dict[str, Source] = {}
    for split, (images, labels) in found.items():
        own = None if labels is None else arrays[labels]
        if images not in mapped:
            sources[split] = source_of_arrays(arrays[images], own, path, flag)
            continue
        # checked on one image, whose dtype and number of dimensions are those of all
        array, first = mapped[images], mapped[images].map()[:1]
        numbers = np.zeros(array.shape[0], dtype=np.int64)
        if own is not None:
            numbers = _class_numbers(own, path, flag)
        source_of_arrays(first, numbers[:1], path, flag)
        _check_lengths(array.shape[0], numbers, path, flag)
        sources[split] = MappedSource(array, numbers, flag)
        sources[split].has_labels = own is not None
    return sources


def _find_stored(archive: NpzFile, file: BinaryIO, key: str, path: Path) -> StoredArray | None:
    """The place of a large array of bytes that is stored without compression; else None.

    Arrays that are anything else, and all that looks damaged, are left to numpy, which reads them
    whole and says what is wrong.
    """
    if archive.zip is None:
        return None
    try:
        member = archive.zip.getinfo(f"{key}.npy")
        if member.compress_type != ZIP_STORED or member.file_size < MAPPED_FROM:
            return None
        with archive.zip.open(member) as content:
            version = np.lib.format.read_magic(content)
            read = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}[version]
            shape, is_fortran, dtype = getattr(np.lib.format, read)(content)
            num_header_bytes = content.tell()
        # the header of a member in a zip file: its name and extra field have lengths of two bytes
        file.seek(member.header_offset)
        header = file.read(ZIP_HEADER)
        lengths = struct.unpack("<HH", header[ZIP_HEADER - 4 :])
    except Exception:
        return None
    num_bytes = math.prod(shape) * dtype.itemsize
    offset = member.header_offset + ZIP_HEADER + sum(lengths) + num_header_bytes
    is_whole = num_header_bytes + num_bytes == member.file_size
    if dtype != np.uint8 or not is_whole or offset + num_bytes > path.stat().st_size:
        return None
    return StoredArray(path, offset, dtype, shape, is_fortran)


def _find_arrays(
    names: list[str], path: Path, flag: str, needs_labels: bool
) -> dict[str, tuple[str, str | None]]:
    """Find the names of the arrays of images and of labels, by split.

    Raises ValueError unless both exist, for all data or for every split that is named; without
    needs_labels those of labels, None then, may be missing.
    """
    by_split: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if word := _word_of(name):
            by_split[split_of(name) or "all"].setdefault(word, name)
    found: dict[str, tuple[str, str | None] | None] = {}
    for split, by_word in by_split.items():
        pair = next((pair for pair in PAIRS if set(pair) <= set(by_word)), None)
        found[split] = (by_word[pair[0]], by_word[pair[1]]) if pair else None
        alone = next((word for word, _ in PAIRS if word in by_word), None)
        if pair is None and alone is not None and not needs_labels:
            found[split] = by_word[alone], None
    whole = {split: pair for split, pair in found.items() if pair is not None}
    if not whole or len(whole) < len(found) or ("all" in whole and len(whole) > 1):
        raise ValueError(
            f"{flag}: expected arrays images and labels, x and y, or x_train and y_train "
            f"(and of val and test), got {printable(', '.join(names)) or 'none'} in {path}"
        )
    return whole


def _word_of(name: str) -> str | None:
    """The word for images or labels in a name with no other word except one for a split."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    known = words.intersection(word for pair in PAIRS for word in pair)
    is_alone = len(words) == 1 or (len(words) == 2 and names_split(name))
    return known.pop() if known and is_alone else None


def open_archive(file: BinaryIO, path: Path, flag: str) -> NpzFile:
    """Open an .npz file of named arrays, which are not unpickled; raises ValueError for others."""
    try:
        archive = np.load(file, allow_pickle=False)
    except Exception as error:
        # on crafted bytes numpy and zipfile raise any exception
        raise machine_error(error, flag, str(path)) or ValueError(
            f"{flag}: expected a readable .npz file, got {path}"
        ) from error
    if not isinstance(archive, NpzFile):
        raise ValueError(f"{flag}: expected an .npz file of named arrays, got one array in {path}")
    return archive


def check_memory(archive: NpzFile, wanted: list[str], path: Path, flag: str) -> None:
    """Raise ValueError, before reading, if arrays do not fit in memory: zeros compress well."""
    members = archive.zip.infolist() if archive.zip is not None else []
    num_bytes = sum(
        member.file_size for member in members if member.filename.removesuffix(".npy") in wanted
    )
    if num_bytes > (memory := physical_memory()):
        raise ValueError(
            f"{flag}: expected arrays that fit in memory ({memory / 2**30:.1f} GiB), "
            f"got {num_bytes / 2**30:.1f} GiB in {path}; uint8 images that numpy.savez stores, "
            "without compression, are read from the disk"
        )


def load_array(archive: NpzFile, key: str, path: Path, flag: str) -> NDArray[Any]:
    """Read one array; numpy refuses arrays that it would have to unpickle."""
    try:
        array = archive[key]
        if not isinstance(array, np.ndarray):
            raise TypeError("numpy gives the bytes of what is no array")
    except Exception as error:
        raise _machine_error(error, archive, key, path, flag) or ValueError(
            f"{flag}: expected a readable array without Python objects, got {key} in {path}"
        ) from error
    return array


def _machine_error(
    error: Exception, archive: NpzFile, key: str, path: Path, flag: str
) -> ValueError | None:
    """The error for a failure of the machine; None if the array is damaged.

    A damaged header asks for more memory than its array has bytes: whether those fit is tried.
    """
    if isinstance(error, MemoryError) and archive.zip is not None:
        try:
            np.empty(archive.zip.getinfo(f"{key}.npy").file_size, dtype=np.uint8)
            return None
        except (MemoryError, KeyError):
            pass
    return machine_error(error, flag, str(path))


def source_of_arrays(
    images: NDArray[Any], labels: NDArray[Any] | None, path: Path | str, flag: str
) -> ArraySource:
    """Check arrays and make a source of them; path: their origin, for messages."""
    numbers = None if labels is None else _class_numbers(labels, path, flag)
    rows = as_bytes(channels_last(images, path, flag), path, flag)
    if numbers is None:
        numbers = np.zeros(len(rows), dtype=np.int64)
    _check_lengths(len(rows), numbers, path, flag)
    source = ArraySource(rows, numbers, flag, str(path))
    source.has_labels = labels is not None
    return source


def _class_numbers(labels: NDArray[Any], path: Path | str, flag: str) -> NDArray[np.int64]:
    """Labels as int64 [N]; some sets store them as a column, [N, 1]."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape[1:] not in ((), (1,)):
        raise ValueError(
            f"{flag}: expected integer labels [N], got {labels.dtype} "
            f"{list(labels.shape)} in {path}"
        )
    return labels.reshape(-1).astype(np.int64)


def _check_lengths(num_images: int, labels: NDArray[np.int64], path: Path | str, flag: str) -> None:
    if num_images != len(labels):
        raise ValueError(
            f"{flag}: expected as many images as labels, "
            f"got {num_images} and {len(labels)} in {path}"
        )


def channels_last(images: NDArray[Any], path: Path | str, flag: str) -> NDArray[Any]:
    """Images as [N, H, W] if they are grey, else as [N, H, W, C]."""
    shape = list(images.shape)
    if images.ndim == 4 and images.shape[3] not in (1, 3, 4):
        images = np.moveaxis(images, 1, 3)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    is_colour = images.ndim == 4 and images.shape[3] in (3, 4)
    if not (images.ndim == 3 or is_colour) or 0 in images.shape[1:]:
        raise ValueError(
            f"{flag}: expected images [N, H, W], [N, H, W, C] or [N, C, H, W] with 1, 3 or 4 "
            f"channels, got {shape} in {path}"
        )
    return images


def as_bytes(images: NDArray[Any], path: Path | str, flag: str) -> NDArray[np.uint8]:
    """Images as uint8; floats in [0, 1] are rounded to the 256 levels of a byte."""
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{flag}: expected uint8 images or floats in [0, 1], got {images.dtype} in {path}"
        )
    # NaN fails this comparison too
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"{flag}: expected float images in [0, 1], "
            f"got {images.min():g} to {images.max():g} in {path}"
        )
    return np.round(images * 255).astype(np.uint8)
