"""Data given in Python: arrays, datasets of torch and torchvision, and of Hugging Face."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import IterableDataset

from safer_fast.config.messages import first_line, meant, printable, shortened
from safer_fast.config.settings.data import GIVEN
from safer_fast.data.formats.arrays import as_bytes, channels_last, source_of_arrays
from safer_fast.data.formats.listed import listed_labels, listed_names
from safer_fast.data.formats.source import Columns, OpenRequest, RowError, Source
from safer_fast.data.formats.splits import split_of
from safer_fast.runtime.machine_errors import machine_error
from safer_fast.runtime.terminal import progress_bar

WORD = GIVEN
"""Value of `data.path` in a run that is trained on data given in Python."""
SPLITS = ("train", "validation", "test", "extra")
NUM_CHECKED = 16  # rows whose images are read twice, and whose labels are compared
GivenData: TypeAlias = Any
"""One data set, or a mapping from names of splits to one each."""


@contextmanager
def giving(data: GivenData | None, path: str | None) -> Iterator[str | None]:
    """Let a data path name these data within the block; yields that path, or `path` without data.

    data: as `train_model` takes them. Raises ValueError for names that are no splits, and for data
    beside a path.
    """
    if data is None:
        yield path
        return
    if path not in (None, WORD):
        raise ValueError(f"data.path: expected none beside the data given in Python, got {path}")
    token = _DATA.set(_Given(data))
    try:
        yield WORD
    except ValueError as error:
        if error.args and isinstance(error.args[0], str):  # the user has given no path
            said = re.sub(r"^(--)?data\.path(?=: )", "data", error.args[0])
            error.args = (re.sub(rf" in {WORD}$", "", said), *error.args[1:])
        raise
    finally:
        _DATA.reset(token)


def open_given(_: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """Open the data that `giving` has; raises ValueError outside of it."""
    given = _DATA.get()
    if given is None:
        raise ValueError(
            f"{request.flag}: expected a path, got {WORD!r}: the run was trained on data given in "
            "Python; give them again with data=..., or name a path"
        )
    return given.open(request)


class _Given:
    """The data of a call of `train_model`; labels are read once, however often it is opened."""

    def __init__(self, data: GivenData) -> None:
        if isinstance(data, Mapping):
            names = [split_of(str(key)) or str(key) for key in data]
            if doubled := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"data: expected each split once, got {doubled[0]} twice")
            self._splits = dict(zip(names, data.values(), strict=True))
            others = [name for name in self._splits if name not in SPLITS]
            if others or not self._splits:
                got = ", ".join(others) + meant(others[0], SPLITS) if others else "none"
                raise ValueError(f"data: expected splits {', '.join(SPLITS)}, got {got}")
        else:
            self._splits = {"all": data}
        self._opened: dict[tuple[Columns, bool], dict[str, Source]] = {}

    def open(self, request: OpenRequest) -> dict[str, Source]:
        """Sources of all splits, new ones at each call: their labels may be renumbered."""
        key = request.columns, request.needs_labels
        if key not in self._opened:
            self._opened[key] = {
                split: _source(item, "data" if split == "all" else f"data[{split!r}]", request)
                for split, item in self._splits.items()
            }
        return {split: copy.copy(item) for split, item in self._opened[key].items()}


_DATA: ContextVar[_Given | None] = ContextVar("given data", default=None)


class DatasetSource(Source):
    """Rows of a map-style dataset whose items hold an image and a label.

    dataset: has a length, and items in any form that `_parts` takes.
    """

    def __init__(
        self, dataset: Any, name: str, columns: Columns, needs_labels: bool = True
    ) -> None:
        self.dataset, self.flag, self.name, self.columns = dataset, name, name, columns
        self.needs_labels = needs_labels
        self.class_names = listed_names(dataset)
        self.labels = np.zeros(0, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        return _as_image(self.parts(index)[0], self.describe(index))

    def parts(self, index: int) -> tuple[Any, Any]:
        """Image and label of a row; raises ValueError as `item` does, and for other items."""
        return _parts(self.item(index), index, self)

    def item(self, index: int) -> Any:
        """The item of a row; raises RowError, with the cause, where the dataset raises."""
        try:
            return self.dataset[index]
        except MemoryError:
            raise
        except Exception as error:
            raise machine_error(error, self.name, self.describe(index)) or RowError(
                f"{self.name}: expected an image and a label in row {index}, got "
                f"{type(error).__name__}: {printable(first_line(error))}"
            ) from error

    def describe(self, index: int) -> str:
        return f"row {index} of {self.name}"


def _source(data: Any, name: str, request: OpenRequest) -> Source:
    """The source of one split; raises ValueError for data of another kind."""
    pair = _arrays(data, request.needs_labels)
    if pair is not None:
        return source_of_arrays(*pair, name, name)
    if hasattr(data, "column_names") and hasattr(data, "features"):
        from safer_fast.data.formats.hugging_face import source_of_dataset

        encoded = source_of_dataset(data, name, request.columns, request.needs_labels)
        if encoded is not None:
            return encoded
    if (got := _no_dataset(data)) is not None:
        raise ValueError(
            f"{name}: expected images and labels as two arrays, or a dataset with a length and "
            f"items by number, got {got}"
        )
    if not len(data):
        raise ValueError(f"{name}: expected at least one image, got none")
    source = DatasetSource(data, name, request.columns, request.needs_labels)
    readable = _check_images(source, request.bad.policy == "skip")
    source.has_columns = isinstance(source.item(readable[0]), Mapping)
    if not request.needs_labels and not all(_is_label(source.parts(row)[1]) for row in readable):
        source.labels = np.zeros(len(data), dtype=np.int64)
        source.leave_out_labels()
        return source
    source.labels = _labels(source, readable)
    names = source.class_names or []
    if doubled := [item for item in names if names.count(item) > 1]:
        raise ValueError(f"{name}: expected a name for each class, got {doubled[0]!r} twice")
    return source


def _arrays(data: Any, needs_labels: bool) -> tuple[NDArray[Any], NDArray[Any] | None] | None:
    """Images and labels if the data is a pair of arrays or tensors, else None.

    Labels may be a list of integers, as datasets of torchvision have them. Without needs_labels an
    array of images is enough.
    """
    if isinstance(data, np.ndarray | torch.Tensor) and not needs_labels:
        return _array(data), None
    if not (isinstance(data, tuple | list) and len(data) == 2):
        return None
    if isinstance(data[1], list) and isinstance(data[0], np.ndarray | torch.Tensor):
        data = (data[0], np.asarray(data[1]))
    if not all(isinstance(item, np.ndarray | torch.Tensor) for item in data):
        return None
    images, labels = map(_array, data)
    return images, labels


def _no_dataset(data: Any) -> str | None:
    """The words for data that are no dataset with items by number; None for one."""
    if isinstance(data, str | Path):
        got = shortened(repr(str(data)))
        return f"the text {got}; files are named by data.path"
    if isinstance(data, np.ndarray | torch.Tensor):
        return f"one array {list(data.shape)}"
    if isinstance(data, tuple | list):
        kinds = [type(item).__name__ for item in data[:4]]
        has_arrays = any(isinstance(item, np.ndarray | torch.Tensor) for item in data)
        are_items = isinstance(data, list) or all(isinstance(i, tuple | Mapping) for i in data)
        if has_arrays or not are_items:
            more = ", ..." if len(data) > len(kinds) else ""
            return f"{type(data).__name__} ({', '.join(kinds)}{more})"
        return None
    is_mapped = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return type(data).__name__ if isinstance(data, IterableDataset) or not is_mapped else None


def _labels(source: DatasetSource, rows: Sequence[int]) -> NDArray[np.int64]:
    """Labels [N]: those that the dataset lists if they agree with the items of some rows, else of
    each item."""
    known = listed_labels(source.dataset)
    if known is not None and len(known) == len(source.dataset):
        if all(_label(source, row) == known[row] for row in rows):
            return known
        source.class_names = None  # a target_transform changes labels, not the list of names
    shown = progress_bar(range(len(source.dataset)), desc=f"labels of {source.name}")
    return np.array([_label(source, row) for row in shown], dtype=np.int64)


def _label(source: DatasetSource, row: int) -> int:
    value = _number(source.parts(row)[1])
    if not _is_label(value):
        shape = f" {list(value.shape)}" if hasattr(value, "shape") else ""
        raise ValueError(
            f"{source.name}: expected integers as labels, got {type(value).__name__}{shape} in row "
            f"{row}"
        )
    return int(value)


def _number(label: Any) -> Any:
    """A label; some datasets have arrays of one number."""
    return label.item() if getattr(label, "shape", None) in ((), (1,)) else label


def _is_label(label: Any) -> bool:
    value = _number(label)
    return isinstance(value, int) and not isinstance(value, bool)


def _parts(item: Any, row: int, source: DatasetSource) -> tuple[Any, Any]:
    """Image and label of an item: of a tuple its first two, of a mapping those of its columns.

    Where no labels are needed, the item may be an image, or hold one alone; the label is None.
    """
    if isinstance(item, Mapping):
        columns = source.columns
        image = _key(item, row, columns.image, "image", ("image", "img"), source)
        if not source.needs_labels and columns.label is None and "label" not in item:
            return item[image], None
        return item[image], item[_key(item, row, columns.label, "label", ("label",), source)]
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    if not source.needs_labels:
        return item[0] if isinstance(item, tuple | list) and item else item, None
    raise ValueError(
        f"{source.name}: expected items (image, label) or {{'image': ..., 'label': ...}}, got "
        f"{type(item).__name__} in row {row}"
    )


def _key(
    item: Mapping[Any, Any],
    row: int,
    wanted: str | None,
    role: str,
    usual: Sequence[str],
    source: DatasetSource,
) -> str:
    """The key that the setting names, else the usual one."""
    found = [key for key in (usual if wanted is None else [wanted]) if key in item]
    if found:
        return found[0]
    keys = printable(", ".join(map(str, item))) or "none"
    if wanted is not None:
        raise ValueError(
            f"data.{role}_column: expected a key of the items of {source.name} ({keys}), got "
            f"{wanted}{meant(wanted, map(str, item))}"
        )
    raise ValueError(
        f"{source.name}: expected items (image, label), or with a key {' or '.join(usual)} or the "
        f"one that data.{role}_column names, got keys {keys} in row {row}"
    )


def _check_images(source: DatasetSource, skips: bool) -> list[int]:
    """Read some rows twice; raise ValueError for images that are none, or other ones each time.

    Returns the rows that could be read. skips: that others could not is no error yet; they are left
    out when they are decoded.
    """
    readable, fault = [], None
    for row in _spread(len(source.dataset)):
        try:
            first, second = (np.asarray(source.read(row)) for _ in range(2))
        except RowError as error:
            if not skips:
                raise
            fault = error
            continue
        readable.append(row)
        if first.shape != second.shape or (first != second).any():
            raise ValueError(
                f"{source.name}: expected the same image at each reading, got two of row {row}: "
                "take random transforms out of the dataset; data.augmentation crops and flips"
            )
    if fault is not None and not readable:
        raise fault
    return readable


def _as_image(image: Any, where: str) -> Image.Image:
    """The image as PIL has it; arrays [H, W], [H, W, C] or [C, H, W], uint8 or floats in [0, 1]."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise ValueError(
            f"{where}: expected a PIL image, an array or a tensor, got {type(image).__name__}"
        )
    array = _array(image)
    rows = channels_last(array[None], where, "data")
    return Image.fromarray(as_bytes(rows, where, "data")[0])


def _array(values: Any) -> NDArray[Any]:
    """An array, or a tensor of any device as one."""
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)


def _spread(count: int) -> list[int]:
    return [int(row) for row in np.linspace(0, count - 1, min(NUM_CHECKED, count))]
