"""Datasets of Hugging Face: of its hub, saved to disk, or given in Python; read by its library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safer_fast.config.messages import first_line, meant, printable
from safer_fast.data.formats.parquet_columns import label_candidates
from safer_fast.data.formats.source import (
    Columns,
    EncodedSource,
    OpenRequest,
    Source,
    hides_labels,
)
from safer_fast.data.formats.splits import split_of

PREFIX = "hf:"
"""Beginning of a data path that names a dataset of the hub, hf:NAME or hf:NAME:CONFIG."""


class EncodedRows(EncodedSource):
    """Rows of a Hugging Face dataset whose images are not decoded: bytes, or paths of files.

    dataset: with columns of images, `{"bytes": ..., "path": ...}`, and labels.
    """

    has_columns = True

    def __init__(
        self, dataset: Any, name: str, image_column: str, label_column: str | None
    ) -> None:
        self.flag = self.name = name
        self.images = dataset.select_columns([image_column])
        self.column = image_column
        if label_column is None:
            self.labels = np.zeros(len(dataset), dtype=np.int64)
            self.leave_out_labels()
            return
        labels, self.class_names = _column_of_labels(dataset, label_column, name)
        self.labels, self.has_text_labels = labels, self.class_names is not None
        names = getattr(dataset.features[label_column], "names", None)
        if names is not None:
            self.class_names, self.has_text_labels = [str(item) for item in names], False

    def encoded(self, index: int) -> NDArray[np.uint8]:
        image = self.images[index][self.column]
        content = image["bytes"]
        if content is None:
            content = Path(image["path"]).read_bytes()
        return np.frombuffer(content, dtype=np.uint8)

    def describe(self, index: int) -> str:
        return f"row {index} of {self.name}"


def open_hub(paths: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """Open hf:NAME or hf:NAME:CONFIG: fetched once, then memory-mapped from the library's cache."""
    datasets = _library(request.flag)
    (path,) = paths["all"]
    name, _, config = str(path).removeprefix(PREFIX).partition(":")
    if not name:
        raise ValueError(
            f"{request.flag}: expected the name of a dataset, hf:NAME or hf:NAME:CONFIG, got {path}"
        )
    try:
        data = datasets.load_dataset(name, config or None)
    except Exception as error:  # of the library, the network or the hub
        raise ValueError(
            f"{request.flag}: expected a dataset that Hugging Face's datasets can load, "
            f"got {path}: {printable(first_line(error))}"
        ) from error
    return _sources(data, str(path), request)


def open_saved(paths: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """Open a folder that `save_to_disk` has written, memory-mapped."""
    datasets = _library(request.flag)
    (path,) = paths["all"]
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files make it raise anything
        raise ValueError(
            f"{request.flag}: expected a folder that save_to_disk of Hugging Face's datasets has "
            f"written, got {path}: {printable(first_line(error))}"
        ) from error
    return _sources(data, str(path), request)


def source_of_dataset(
    data: Any, name: str, columns: Columns, needs_labels: bool = True
) -> EncodedSource | None:
    """The source of a `datasets.Dataset`, whose images stay encoded; None with a transform set.

    Without needs_labels no column of labels has to be there.
    Raises ValueError for a streamed or empty one, and for columns that are no images or labels.
    """
    import datasets

    if isinstance(data, datasets.IterableDataset):
        raise ValueError(
            f"{name}: expected a dataset with items by number, got a streamed one: load it with "
            "streaming=False"
        )
    if not len(data):
        raise ValueError(f"{name}: expected at least one image, got none")
    if data.format["type"] == "custom":  # set_transform: images are what it returns
        return None
    data = data.with_format(None)
    features = data.features
    images = [item for item in features if isinstance(features[item], datasets.Image)]
    usual = [item for item in ("image", "img") if item in features][:1]
    image = _column(columns.image, "image", name, data, "image or img", usual or images)
    label: str | None = None
    candidates = label_candidates(features.arrow_schema, image)
    if needs_labels or len(candidates) == 1 or columns.label is not None:
        label = _column(columns.label, "label", name, data, "label", candidates)
    if not isinstance(features[image], datasets.Image):
        raise ValueError(
            f"{name}: expected a column of images, got {type(features[image]).__name__} in column "
            f"{image}"
        )
    return EncodedRows(_undecoded(data, image, datasets), name, image, label)


def _library(flag: str) -> Any:
    """The library; raises ValueError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{flag}: expected Hugging Face's datasets to be installed (pip install datasets), "
            "got none"
        ) from None
    return datasets


def _undecoded(data: Any, image: str, datasets: Any) -> Any:
    """The dataset with its images as bytes or paths; the features alone change."""
    was_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return data.cast_column(image, datasets.Image(decode=False))
    finally:
        if was_shown:
            datasets.enable_progress_bars()


def _sources(data: Any, path: str, request: OpenRequest) -> dict[str, Source]:
    """A source of each split; splits of other names, and those without labels, are passed over."""
    if not hasattr(data, "items"):
        data = {"all": data}
    found: dict[str, Source] = {}
    for word, part in data.items():
        split = "all" if word == "all" else split_of(word)
        if split is None or split in found:
            request.skipped.skip(f"{path}/{word}")
            continue
        name = f"{path} ({word})"
        source = source_of_dataset(part, name, request.columns, request.needs_labels)
        assert source is not None, "nobody has set a transform"
        source.flag = request.flag
        is_wanted = split in ("train", "all") and not request.needs_labels
        if hides_labels(source) and not is_wanted:  # as test splits of the hub do
            request.skipped.skip(f"{path}/{word}")
        else:
            found[split] = source
    if not found:
        raise ValueError(
            f"{request.flag}: expected splits train, validation or test, got "
            f"{printable(', '.join(data))} in {path}"
        )
    return found


def _column(
    wanted: str | None, role: str, name: str, data: Any, usual: str, found: Sequence[str]
) -> str:
    """The column that the setting names, else the only one found; usual: its name, for messages."""
    names = list(data.column_names)
    if wanted is not None:
        if wanted not in names:
            raise ValueError(
                f"data.{role}_column: expected a column of {name} ({', '.join(names)}), "
                f"got {wanted}{meant(wanted, names)}"
            )
        return wanted
    if len(found) != 1:
        raise ValueError(
            f"{name}: expected one column {usual}, or data.{role}_column, got "
            f"{', '.join(found or names)}"
        )
    return found[0]


def _column_of_labels(
    data: Any, column: str, name: str
) -> tuple[NDArray[np.int64], list[str] | None]:
    """Labels [N] of a column of integers or texts; for texts the sorted texts too."""
    values = np.asarray(data.select_columns([column])[:][column])
    if np.issubdtype(values.dtype, np.integer) and values.ndim == 1:
        return values.astype(np.int64), None
    if values.dtype.kind == "U":
        names, places = np.unique(values, return_inverse=True)
        return places.astype(np.int64), [str(item) for item in names]
    raise ValueError(
        f"{name}: expected integers or texts without gaps as labels, got {values.dtype} in column "
        f"{column}"
    )
