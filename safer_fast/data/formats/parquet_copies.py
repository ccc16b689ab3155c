"""Images of parquet files too large for memory, copied once to a file with random access.

Parquet files compress images in groups of a hundred and more, and a shuffled epoch would decompress
each group a hundred times.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from safer_fast.data.formats.parquet_images import (
    one_line_errors,
    one_of,
    rows_at_once,
    split_column,
)
from safer_fast.data.formats.parts import FileParts
from safer_fast.runtime.machine_errors import machine_error
from safer_fast.runtime.ranks import is_quiet
from safer_fast.runtime.terminal import progress_bar
from safer_fast.runtime.timing_cache import cache_file

FOLDER = "parquet"
VERSION = 1
# Bytes of images decompressed at a time; pyarrow also holds their page, usually up to 1,024 rows.
BATCH_BYTES = 2**23
BUFFER_BYTES = 2**20


class CopiedImages:
    """Images in files of the user's cache, one for each parquet file.

    indices: for each file, int64 [N, 3]: offset, size, and 1 for the path of an image, else 0.
    """

    def __init__(self, copies: list[Path], indices: list[NDArray[np.int64]], flag: str) -> None:
        self.parts, self.indices = FileParts(copies, flag), indices

    def read(self, file: int, row: int) -> tuple[NDArray[np.uint8], bool]:
        """See `Images.read`."""
        offset, size, is_path = self.indices[file][row].tolist()
        return self.parts.read(file, offset, size), bool(is_path)


def copy_images(
    files: Sequence[Path],
    columns: Sequence[str],
    sizes: Sequence[int],
    flag: str,
) -> CopiedImages:
    """Open the images of the files; those that are not in the cache yet are copied to it.

    sizes: bytes of each file's images. A line on standard error names the number of files and the
    folder. Other processes wait for the one that copies. Raises ValueError if there is no room.
    """
    copies = [_copy_of(file, column) for file, column in zip(files, columns, strict=True)]
    try:
        if any(_index(copy) is None for copy in copies):
            with _alone(copies[0].parent):
                _copy_missing(files, columns, sizes, copies, flag)
        indices = [_index(copy) for copy in copies]
    except OSError as error:
        where = f"copying images to {copies[0].parent}"
        raise machine_error(error, flag, where) or ValueError(
            f"{flag}: expected a cache folder that can be written to, got {error.strerror}: "
            f"{copies[0].parent}; XDG_CACHE_HOME names another"
        ) from error
    found = [index for index in indices if index is not None]
    assert len(found) == len(copies), "a copy was removed while it was opened"
    return CopiedImages(copies, found, flag)


def _copy_of(file: Path, column: str) -> Path:
    """Path of the copy of a file's images; its name depends on the file's path and state."""
    state, place = file.stat(), f"{file.absolute()}\0{column}"
    words = place, f"{VERSION} {state.st_size} {state.st_mtime_ns}"
    names = [hashlib.blake2b(os.fsencode(word), digest_size=8).hexdigest() for word in words]
    return cache_file(FOLDER) / f"{names[0]}-{names[1]}.images"


def _index(copy: Path) -> NDArray[np.int64] | None:
    """Index of a copy; None if the copy is missing or incomplete."""
    try:
        index: NDArray[np.int64] = np.load(_index_file(copy), allow_pickle=False)
        end = int(index[-1, :2].sum()) if len(index) else 0
        return index if copy.stat().st_size == end else None
    except (FileNotFoundError, ValueError, IndexError, EOFError):
        return None


def _index_file(copy: Path) -> Path:
    return copy.with_suffix(".npy")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process copy at a time, if the file system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not is_quiet():
                _say(f"waiting for another process that copies images to {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # copies are complete or missing: at worst one is made twice
        yield


def _copy_missing(
    files: Sequence[Path],
    columns: Sequence[str],
    sizes: Sequence[int],
    copies: Sequence[Path],
    flag: str,
) -> None:
    every = zip(files, columns, sizes, copies, strict=True)
    wanted = [task for task in every if _index(task[3]) is None]
    if not wanted:
        return
    folder, num_bytes = copies[0].parent, sum(size for _, _, size, _ in wanted)
    if num_bytes > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"{flag}: expected {num_bytes / 2**30:.1f} GiB free in {folder} for images of parquet "
            f"files that do not fit in memory, got {free / 2**30:.1f} GiB; XDG_CACHE_HOME names "
            "another folder, and tar shards or image folders need none"
        )
    _say(
        f"copying the images of {len(wanted)} parquet files ({num_bytes / 2**30:.1f} GiB) to "
        f"{folder}, once"
    )
    for task in progress_bar(wanted, desc="copying images"):
        _copy(*task, flag)


def _say(line: str) -> None:
    """Print a line on standard error: filling a disk is never silent."""
    tqdm.write(line, file=sys.stderr)


def _copy(file: Path, column: str, num_bytes: int, copy: Path, flag: str) -> None:
    """Make the copy, and remove those of earlier states of the file."""
    part, index_part = (copy.with_suffix(f".{os.getpid()}.{n}.tmp") for n in range(2))
    try:
        with part.open("wb") as images:
            rows, end = [], 0
            for content, is_path in _contents(file, column, num_bytes, flag):
                images.write(content.data)
                rows.append((end, len(content), int(is_path)))
                end += len(content)
            images.flush()
            os.fsync(images.fileno())
        with index_part.open("wb") as index:
            np.save(index, np.array(rows, dtype=np.int64).reshape(-1, 3))
            os.fsync(index.fileno())
        part.replace(copy)
        index_part.replace(_index_file(copy))
    finally:
        for left in (part, index_part):
            left.unlink(missing_ok=True)
    for old in copy.parent.glob(f"{copy.name.split('-')[0]}-*"):
        if old.stem != copy.stem:
            with suppress(OSError):
                old.unlink()


def _contents(
    file: Path, column: str, num_bytes: int, flag: str
) -> Iterator[tuple[NDArray[np.uint8], bool]]:
    """Yield the images or paths of all rows, using little memory; see `Images.read`."""
    with one_line_errors(file, flag):
        parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        rows = max(1, parquet.metadata.num_rows * BATCH_BYTES // max(num_bytes, 1))
        rows = min(rows, rows_at_once(parquet.metadata, file, column))
        batches = parquet.iter_batches(rows, columns=[column], use_threads=False)
    first = 0
    with parquet:
        while True:
            with one_line_errors(file, flag):
                batch = next(batches, None)
            if batch is None:
                break
            encoded, paths = split_column(batch.column(0), first, file, flag)
            for row in range(len(batch)):
                yield one_of(encoded, paths, row)
            first += len(batch)
    pa.default_memory_pool().release_unused()
