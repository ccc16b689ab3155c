"""Webdataset shards: uncompressed .tar files whose members are samples."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats.parts import FileParts
from safer_fast.data.formats.skipped import CLASS_NAMES, SkippedFiles
from safer_fast.data.formats.source import EncodedSource, OpenRequest, Source
from safer_fast.data.formats.tar_index import ShardIndex, index_shard
from safer_fast.runtime.machine_errors import MachineError
from safer_fast.runtime.terminal import progress_bar

# Larger sets are indexed by several processes.
LARGEST_ALONE = 2**30


class TarSource(EncodedSource):
    """Samples of one or more webdataset shards, read in place without extracting them.

    Members of a sample are KEY.jpg (or another image) and KEY.cls (an integer) or KEY.json (with
    label or cls); class names are the lines of classnames.txt beside the shards.
    """

    def __init__(
        self,
        shards: list[Path],
        flag: str,
        bad: BadImages,
        skipped: SkippedFiles,
        needs_labels: bool = True,
    ) -> None:
        self.shards, self.flag = shards, flag
        self.parts = FileParts(shards, flag)
        found = []
        for index in _index_all(shards, flag, needs_labels):
            for message in index.refused:
                bad.refuse(message)
            skipped.add(index.skipped)
            found.append(index)
        # arrays: counting references, worker processes would copy lists page by page
        self.offsets = np.concatenate([index.offsets for index in found])
        self.sizes = np.concatenate([index.sizes for index in found])
        self.labels = np.concatenate([index.labels for index in found])
        self.keys = np.concatenate([index.keys for index in found])
        nums_samples = [len(index.labels) for index in found]
        self.shard_numbers = np.repeat(np.arange(len(shards), dtype=np.int32), nums_samples)
        if not len(self.labels):
            where = shards[0] if len(shards) == 1 else f"{shards[0]} to {shards[-1]}"
            raise ValueError(f"{flag}: expected at least one sample, got none in {where}")
        self.class_names = _read_class_names(shards[0].parent / CLASS_NAMES, flag)
        if not all(index.has_labels for index in found):
            self.leave_out_labels()

    def encoded(self, index: int) -> NDArray[np.uint8]:
        place = int(self.offsets[index]), int(self.sizes[index])
        return self.parts.read(int(self.shard_numbers[index]), *place)

    def describe(self, index: int) -> str:
        key = self.keys[index].decode(errors="replace")
        return f"sample {key} of {self.shards[self.shard_numbers[index]]}"


def open_tar(groups: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """Open the shards of each split; samples without image are bad images.

    Raises ValueError for labels that are missing or no integers, and if there are no samples.
    """
    return {
        split: TarSource(shards, request.flag, request.bad, request.skipped, request.needs_labels)
        for split, shards in groups.items()
    }


def _index_all(shards: list[Path], flag: str, needs_labels: bool) -> Iterator[ShardIndex]:
    """Yield the index of each shard, in order."""
    index = functools.partial(index_shard, flag=flag, needs_labels=needs_labels)
    num_bytes = sum(shard.stat().st_size for shard in shards)
    if len(shards) == 1 or num_bytes <= LARGEST_ALONE:
        yield from map(index, shards)
        return
    pool = ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1))
    try:
        found = pool.map(index, shards)
        yield from progress_bar(found, desc="reading shards", total=len(shards))
    except BrokenProcessPool as error:
        raise MachineError(
            f"{flag}: expected processes that read shards and live, got: {error} "
            "(is there enough memory?)"
        ) from error
    finally:
        # an error in one shard must not wait for the others
        pool.shutdown(cancel_futures=True)


def _read_class_names(file: Path, flag: str) -> list[str] | None:
    if not file.is_file():
        return None
    try:
        lines = file.read_text(encoding="utf-8").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag}: expected class names in UTF-8, got {file}") from error
    names = [line.strip() for line in lines]
    return names if any(names) else None
