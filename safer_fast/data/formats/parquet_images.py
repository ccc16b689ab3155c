"""Encoded images of parquet files, held in memory, and image files that rows refer to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from safer_fast.config.messages import printable
from safer_fast.runtime.machine_errors import machine_error

BYTES_AT_ONCE, MOST_ROWS_AT_ONCE = 2**26, 1024
LEAST_BYTES = 4  # that a row takes in memory, whatever it holds
Array: TypeAlias = "pa.Array[Any] | pa.ChunkedArray[Any]"


class Images(Protocol):
    """The image column of several files."""

    def read(self, file: int, row: int) -> tuple[NDArray[np.uint8], bool]:
        """Bytes of the encoded image of a row, or, with True, of the path of an image file."""


class HeldImages:
    """Images in memory; forked worker processes share them, spawned ones read them again."""

    def __init__(
        self, files: Sequence[Path], columns: Sequence[str], most_bytes: int, flag: str
    ) -> None:
        self.files, self.columns, self.most_bytes, self.flag = files, columns, most_bytes, flag
        pairs = []
        for file, column in zip(files, columns, strict=True):
            read = read_column(file, column, most_bytes, flag)
            most_bytes -= read.nbytes
            pairs.append(split_column(read, 0, file, flag))
        self.encoded = [encoded for encoded, _ in pairs]
        self.paths = [paths for _, paths in pairs]

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldImages, (self.files, self.columns, self.most_bytes, self.flag)

    def read(self, file: int, row: int) -> tuple[NDArray[np.uint8], bool]:
        """See `Images.read`."""
        return one_of(self.encoded[file], self.paths[file], row)


def split_column(column: Array, first: int, file: Path, flag: str) -> tuple[Array, Array | None]:
    """Split a column into images (large_binary) and paths of image files where images are missing.

    Raises ValueError for a path that leads out of the folder of the file. first: row number in the
    file of the first row.
    """
    if not pa.types.is_struct(column.type):
        return column.cast(pa.large_binary()), None
    encoded = pc.struct_field(column, "bytes").cast(pa.large_binary())
    if column.type.get_field_index("path") < 0 or not encoded.null_count:
        return encoded, None
    kind = column.type.field("path").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return encoded, None
    paths = pc.if_else(encoded.is_null(), pc.struct_field(column, "path"), None)
    for row in np.flatnonzero(paths.is_valid()):
        _check_path(paths[int(row)].as_py(), first + int(row), file, flag)
    return encoded, paths.cast(pa.large_string()).cast(pa.large_binary())


def one_of(encoded: Array, paths: Array | None, row: int) -> tuple[NDArray[np.uint8], bool]:
    """The image of a row, or its path and True; an empty array if it has neither."""
    if encoded[row].is_valid:
        return np.frombuffer(encoded[row].as_buffer(), dtype=np.uint8), False
    if paths is not None and paths[row].is_valid:
        return np.frombuffer(paths[row].as_buffer(), dtype=np.uint8), True
    return np.empty(0, dtype=np.uint8), False


def read_beside(file: Path, name: NDArray[np.uint8], flag: str) -> NDArray[np.uint8]:
    """Read the image file that a row refers to, below the folder of the parquet file."""
    path = file.parent / name.tobytes().decode()
    if not path.is_file():  # or is a pipe, from which reading might never end
        raise FileNotFoundError(path)
    return np.frombuffer(path.read_bytes(), dtype=np.uint8)


@contextmanager
def one_line_errors(file: Path, flag: str) -> Iterator[None]:
    """Turn any exception about the file into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        # on crafted bytes pyarrow raises any exception
        raise machine_error(error, flag, str(file)) or ValueError(
            f"{flag}: expected a readable parquet file, got {file}"
        ) from error


def _check_path(name: str, row: int, file: Path, flag: str) -> None:
    """Raise ValueError for a path outside of the data set's folder: data may be untrusted."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise ValueError(
            f"{flag}: expected images as bytes, or paths below the folder of the file, "
            f"got {printable(name)[:80]}: row {row} of {file}"
        )


def read_column(file: Path, column: str, most_bytes: int, flag: str) -> pa.ChunkedArray[Any]:
    """A column in memory; raises ValueError where it takes more than so many bytes there.

    A file of a few kilobytes may stand for gigabytes: one value in its dictionary, and many rows.
    """
    chunks: list[Any] = []
    with one_line_errors(file, flag), pq.ParquetFile(file) as parquet:
        kind = parquet.schema_arrow.field(column).type
        rows, num_bytes = rows_at_once(parquet.metadata, file, column), 0
        is_small = LEAST_BYTES * parquet.metadata.num_rows <= most_bytes
        for batch in parquet.iter_batches(rows, columns=[column], use_threads=False):
            num_bytes += batch.nbytes
            is_small = is_small and num_bytes <= most_bytes
            if not is_small:
                break
            chunks.append(batch.column(0))
    if not is_small:
        raise ValueError(
            f"{flag}: expected a column {printable(column)} that fits in memory (at most "
            f"{most_bytes / 2**30:.1f} GiB), got a larger one: {file}"
        )
    return pa.chunked_array(chunks, kind)


def rows_at_once(metadata: pq.FileMetaData, file: Path, column: str) -> int:
    """The rows to read at a time, so that they fit in memory if each is the largest there is."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    parts = [group.column(number) for group in groups for number in range(group.num_columns)]
    largest = 1
    with file.open("rb") as opened:
        for part in parts:
            is_part = f"{part.path_in_schema}.".startswith(f"{column}.")
            if is_part and (start := part.dictionary_page_offset) is not None:
                opened.seek(start)
                largest = max(largest, _page_size(opened.read(32), part.total_uncompressed_size))
    return min(max(BYTES_AT_ONCE // largest, 1), MOST_ROWS_AT_ONCE)


def _page_size(head: bytes, unknown: int) -> int:
    """The bytes of a page when it is not compressed, from its first bytes; `unknown` by default.

    Two fields of 32 bits in Thrift's compact protocol: the page's type and this size.
    """
    found = re.match(rb"\x15[\x00-\x7f]\x15([\x80-\xff]{0,4}[\x00-\x7f])", head, re.DOTALL)
    if found is None:
        return unknown
    value: int = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(found[1]))
    return value >> 1  # the sign is the last bit
