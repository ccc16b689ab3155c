"""Encoded images of parquet files, held in memory, and files that rows name instead."""

from __future__ import annotations

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

Array: TypeAlias = "pa.Array[Any] | pa.ChunkedArray[Any]"


class Images(Protocol):
    """The image column of several files."""

    def read(self, file: int, row: int) -> tuple[NDArray[np.uint8], bool]:
        """What a row of a file has: an image file, [num_bytes], or, if true, the path of one."""


class HeldImages:
    """Images in memory; forked worker processes share them, spawned ones read them again."""

    def __init__(self, files: Sequence[Path], columns: Sequence[str], flag: str) -> None:
        self.files, self.columns, self.flag = files, columns, flag
        pairs = [
            split_column(_read(file, column, flag), 0, file, flag)
            for file, column in zip(files, columns, strict=True)
        ]
        self.encoded = [encoded for encoded, _ in pairs]
        self.paths = [paths for _, paths in pairs]

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldImages, (self.files, self.columns, self.flag)

    def read(self, file: int, row: int) -> tuple[NDArray[np.uint8], bool]:
        """See `Images.read`."""
        return one_of(self.encoded[file], self.paths[file], row)


def split_column(column: Array, first: int, file: Path, flag: str) -> tuple[Array, Array | None]:
    """Images (large_binary) and, where images are missing, paths (large_binary) of image files.

    Raises ValueError for a path that leads out of the folder of the file. first: the row in the
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
    """The image of a row, or the path of one; nothing where there is neither."""
    if encoded[row].is_valid:
        return np.frombuffer(encoded[row].as_buffer(), dtype=np.uint8), False
    if paths is not None and paths[row].is_valid:
        return np.frombuffer(paths[row].as_buffer(), dtype=np.uint8), True
    return np.empty(0, dtype=np.uint8), False


def read_beside(file: Path, name: NDArray[np.uint8], flag: str) -> NDArray[np.uint8]:
    """The image file that a row names, below the folder that the parquet file is in."""
    path = file.parent / name.tobytes().decode()
    if not path.is_file():  # nor a pipe, which would be read for ever
        raise FileNotFoundError(path)
    return np.frombuffer(path.read_bytes(), dtype=np.uint8)


@contextmanager
def one_line_errors(file: Path, flag: str) -> Iterator[None]:
    """Whatever is wrong with the file becomes ValueError that names it."""
    try:
        yield
    except Exception as error:
        # Crafted bytes make pyarrow raise whatever it stumbles over.
        raise machine_error(error, flag, str(file)) or ValueError(
            f"{flag}: expected a readable parquet file, got {file}"
        ) from error


def _check_path(name: str, row: int, file: Path, flag: str) -> None:
    """A data set from elsewhere reads no file of this machine that is not its own."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise ValueError(
            f"{flag}: expected images as bytes, or paths below the folder of the file, "
            f"got {printable(name)[:80]}: row {row} of {file}"
        )


def _read(file: Path, column: str, flag: str) -> Array:
    with one_line_errors(file, flag):
        return pq.read_table(file, columns=[column])[column]
