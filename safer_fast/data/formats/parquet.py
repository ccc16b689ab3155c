"""Parquet files in the Hugging Face image schema."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from safer_fast.data.formats.source import Source

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train(ing)?|val(id|idation)?|test(ing)?)(?![a-z])")
Column: TypeAlias = "pa.ChunkedArray[Any]"

SPLITS = {"tr": "train", "va": "validation", "te": "test"}


class ParquetSource(Source):
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

    def read(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.images[index].as_buffer()))

    def describe(self, index: int) -> str:
        file = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[file - 1]) if file else 0)
        return f"row {row} of {self.files[file]}"


def open_parquet_folder(files: list[Path], flag: str) -> dict[str, Source]:
    """The splits that the file names tell, or all of it where no name tells one."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        match = SPLIT_IN_NAME.search(file.stem.lower())
        groups[SPLITS[match[0][:2]] if match else "all"].append(file)
    if "all" in groups and len(groups) > 1:
        raise ValueError(
            f"{flag}: expected train, val or test in the name of every file or of none, "
            f"got {groups['all'][0]}"
        )
    return {split: ParquetSource(group, flag) for split, group in groups.items()}


def _read(file: Path, flag: str) -> tuple[Column, NDArray[np.int64], list[str] | None]:
    """Encoded images (large_binary, null where there are none), labels and class names."""
    try:
        schema = pq.read_schema(file)
        column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
        if column is None or LABEL_COLUMN not in schema.names:
            raise ValueError(
                f"{flag}: expected columns image (or img) and label, "
                f"got {', '.join(schema.names) or 'none'} in {file}"
            )
        table = pq.read_table(file, columns=[column, LABEL_COLUMN], memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{flag}: expected a readable parquet file, got {file}") from error
    images = _encoded(table[column], file, flag)
    return images, _labels(table[LABEL_COLUMN], file, flag), _class_names(schema)


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
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None
