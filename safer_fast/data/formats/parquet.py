"""Parquet files in the Hugging Face image schema."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from safer_fast.data.formats.parquet_columns import Found, find_columns, read_labels
from safer_fast.data.formats.parquet_copies import copy_images
from safer_fast.data.formats.parquet_images import (
    HeldImages,
    Images,
    one_line_errors,
    read_beside,
    read_column,
)
from safer_fast.data.formats.source import Columns, EncodedSource, OpenRequest, Source, renumbered
from safer_fast.runtime.machine_errors import memory_limit

# Bytes of encoded images of all splits; larger sets are copied to a file that is read on demand.
LARGEST_IN_MEMORY = 4 * 2**30
# Images may take 1/8 of the memory: the network and other ranks need memory too.
SHARE_OF_MEMORY = 8
# What is known of a row besides takes eight times as much as its label.
SHARE_OF_LABELS = 64


class ParquetSource(EncodedSource):
    """Rows of one or more parquet files with a column of images and a column of labels.

    Images are encoded, as bytes or as struct{bytes, path}. Class names come from the schema
    metadata, or are the sorted texts if labels are texts.
    """

    has_columns = True

    def __init__(
        self,
        files: list[Path],
        columns: list[Found],
        images: Images,
        flag: str,
        needs_labels: bool = True,
    ) -> None:
        self.files, self.images, self.flag = files, images, flag
        with one_line_errors(files[0], flag):
            self.ends = np.cumsum([pq.read_metadata(file).num_rows for file in files])
        read, most_bytes = [], memory_limit() // SHARE_OF_LABELS
        for file, found in zip(files, columns, strict=True):
            column = None
            if found.label is not None:
                column = read_column(file, found.label, most_bytes, flag)
            if column is None or (column.null_count and not needs_labels):
                self.labels = np.zeros(self.ends[-1], dtype=np.int64)
                self.leave_out_labels()
                return
            most_bytes -= column.nbytes
            read.append(read_labels(column, found.label or "", file, flag))
        texts = [names for _, names in read if names is not None]
        self.has_text_labels = bool(texts)
        if self.has_text_labels:
            self.class_names = sorted(set().union(*texts))
        else:
            self.class_names = columns[0].class_names
        self.labels = np.concatenate(
            [
                self._numbers(file, labels, names, found)
                for file, (labels, names), found in zip(files, read, columns, strict=True)
            ]
        )

    def encoded(self, index: int) -> NDArray[np.uint8]:
        file, row = self._place(index)
        content, is_path = self.images.read(file, row)
        return read_beside(self.files[file], content, self.flag) if is_path else content

    def describe(self, index: int) -> str:
        file, row = self._place(index)
        return f"row {row} of {self.files[file]}"

    def _place(self, index: int) -> tuple[int, int]:
        """Index of the file, and the row in it."""
        file = int(np.searchsorted(self.ends, index, side="right"))
        return file, index - (int(self.ends[file - 1]) if file else 0)

    def _numbers(
        self, file: Path, labels: NDArray[np.int64], names: list[str] | None, found: Found
    ) -> NDArray[np.int64]:
        """Labels of a file as class numbers; raises ValueError if its classes differ."""
        if names is not None and self.class_names is not None:
            return renumbered(labels, names, self.class_names)
        if self.has_text_labels:
            raise ValueError(
                f"{self.flag}: expected text as labels in all files, got numbers in {file}"
            )
        if found.class_names != self.class_names:
            raise ValueError(
                f"{self.flag}: expected the class names of {self.files[0]}, "
                f"got other ones in {file}"
            )
        return labels


@dataclass(frozen=True)
class _Facts:
    """Metadata of a file; num_bytes: of the column of images, uncompressed."""

    columns: Found
    num_bytes: int


def open_parquet(groups: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """Open the files of each split; their images are held in memory if they are small.

    Raises ValueError for files that are damaged or have another schema, and if there is no room
    for copies.
    """
    flag, columns = request.flag, request.columns
    look = partial(_look, columns=columns, flag=flag, needs_labels=request.needs_labels)
    facts = {file: look(file) for files in groups.values() for file in files}
    num_bytes = sum(fact.num_bytes for fact in facts.values())
    most_bytes = min(LARGEST_IN_MEMORY, memory_limit() // SHARE_OF_MEMORY)
    is_held = num_bytes <= most_bytes
    splits: dict[str, Source] = {}
    for split, files in groups.items():
        named = [facts[file].columns for file in files]
        names = [found.image for found in named]
        images: Images
        if is_held:
            images = HeldImages(files, names, most_bytes, flag)
        else:
            sizes = [facts[file].num_bytes for file in files]
            images = copy_images(files, names, sizes, flag)
        splits[split] = ParquetSource(files, named, images, flag, request.needs_labels)
    return splits


def _look(file: Path, columns: Columns, flag: str, needs_labels: bool) -> _Facts:
    """Read the metadata at the end of a file."""
    with one_line_errors(file, flag):
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    found = find_columns(schema, columns, file, flag, needs_labels)
    with one_line_errors(file, flag):
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        parts = [group.column(number) for group in groups for number in range(group.num_columns)]
        wanted = {found.image, f"{found.image}.bytes"}
        num_bytes = sum(
            part.total_uncompressed_size for part in parts if part.path_in_schema in wanted
        )
    return _Facts(found, num_bytes)
