"""Parquet files in the Hugging Face image schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from safer_fast.command_line import printable
from safer_fast.data.formats.source import EncodedSource, Source
from safer_fast.data.machine import machine_error, physical_memory

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
Column: TypeAlias = "pa.ChunkedArray[Any]"


class ParquetSource(EncodedSource):
    """Rows of one or more files: column image (or img), encoded images as bytes or as
    struct{bytes, path}, and column label, integers; class names from the schema metadata.

    The encoded images are held in memory; forked worker processes share them.
    """

    def __init__(self, files: list[Path], flag: str) -> None:
        self.files, self.flag = files, flag
        images, labels, names = zip(*(_read(file, flag) for file in files), strict=True)
        chunks = [chunk for column in images for chunk in column.chunks]
        self.images = pa.chunked_array(chunks, type=pa.large_binary())
        self.labels = np.concatenate(labels)
        self.class_names = names[0]
        self.ends = np.cumsum([len(rows) for rows in labels])
        for file, others in zip(files, names, strict=True):
            if others != names[0]:
                raise ValueError(
                    f"{flag}: expected the class names of {files[0]}, got other ones in {file}"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        # A spawned worker process reads the files again instead of being sent the images.
        return ParquetSource, (self.files, self.flag)

    def encoded(self, index: int) -> NDArray[np.uint8]:
        buffer: Any = self.images[index].as_buffer()
        encoded: NDArray[np.uint8] = np.frombuffer(buffer, dtype=np.uint8)
        return encoded

    def describe(self, index: int) -> str:
        file = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[file - 1]) if file else 0)
        return f"row {row} of {self.files[file]}"


def open_parquet(groups: dict[str, list[Path]], flag: str) -> dict[str, Source]:
    """A source for each split's files.

    Raises ValueError for files that are damaged, in another schema, or larger than the memory.
    """
    _check_memory([file for files in groups.values() for file in files], flag)
    return {split: ParquetSource(files, flag) for split, files in groups.items()}


def _check_memory(files: list[Path], flag: str) -> None:
    """Before anything is read: what would not fit would end the process without a message."""
    num_bytes, memory = sum(_count_bytes(file, flag) for file in files), physical_memory()
    if num_bytes > memory:
        raise ValueError(
            f"{flag}: expected parquet files that fit in memory ({memory / 2**30:.1f} GiB), "
            f"got {num_bytes / 2**30:.1f} GiB in {len(files)} files; "
            "tar shards and image folders are read as they are needed"
        )


def _count_bytes(file: Path, flag: str) -> int:
    """Bytes of the two columns once they are read."""
    with _one_line_errors(file, flag):
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        sizes = [(column.path_in_schema, column.total_uncompressed_size) for column in columns]
    wanted = {_image_column(schema, file, flag), LABEL_COLUMN}
    return sum(size for path, size in sizes if path.split(".")[0] in wanted)


def _read(file: Path, flag: str) -> tuple[Column, NDArray[np.int64], list[str] | None]:
    """Encoded images (large_binary, null where there are none), labels and class names."""
    with _one_line_errors(file, flag):
        schema = pq.read_schema(file)
    column = _image_column(schema, file, flag)
    with _one_line_errors(file, flag):
        table = pq.read_table(file, columns=[column, LABEL_COLUMN], memory_map=True)
    images = _encoded(table[column], file, flag)
    return images, _labels(table[LABEL_COLUMN], file, flag), _class_names(schema)


@contextmanager
def _one_line_errors(file: Path, flag: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Crafted bytes make pyarrow raise whatever it stumbles over.
        raise machine_error(error, flag, str(file)) or ValueError(
            f"{flag}: expected a readable parquet file, got {file}"
        ) from error


def _image_column(schema: pa.Schema, file: Path, flag: str) -> str:
    column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if column is None or LABEL_COLUMN not in schema.names:
        raise ValueError(
            f"{flag}: expected columns image (or img) and label, "
            f"got {printable(', '.join(schema.names)) or 'none'} in {file}"
        )
    return column


def _encoded(column: Column, file: Path, flag: str) -> Column:
    encoded = column
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        encoded = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(encoded.type) or pa.types.is_large_binary(encoded.type)):
        raise ValueError(
            f"{flag}: expected encoded images as bytes or struct{{bytes, path}}, "
            f"got {column.type} in {file}"
        )
    return encoded.cast(pa.large_binary())


def _labels(column: Column, file: Path, flag: str) -> NDArray[np.int64]:
    if not pa.types.is_integer(column.type):
        raise ValueError(f"{flag}: expected integers in column label, got {column.type} in {file}")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null())[0])
        raise ValueError(f"{flag}: expected a label in every row, got none: row {row} of {file}")
    return column.to_numpy().astype(np.int64)


def _class_names(schema: pa.Schema) -> list[str] | None:
    """info.features.label.names of the metadata key `huggingface`; None where that is not there."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[LABEL_COLUMN]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None
