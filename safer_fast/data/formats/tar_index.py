"""Index of a webdataset shard: offsets and labels of its samples, without extracting any."""

from __future__ import annotations

import json
import os
import re
import reprlib
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from safer_fast.config.messages import printable
from safer_fast.data.formats.skipped import SkippedFiles, is_hidden
from safer_fast.data.formats.source import image_endings
from safer_fast.runtime.machine_errors import machine_error

LABEL_EXTENSIONS = {"cls", "json"}
INTEGER = re.compile(r"-?[0-9]{1,18}")
# Keys are only for messages; a single long one would widen the whole array.
LONGEST_KEY = 200
LARGEST_LABEL = 2**20
Extent: TypeAlias = tuple[int, int]


@dataclass
class ShardIndex:
    """The usable samples of a shard, in its order.

    offsets, sizes: of the image files, in bytes. refused: a line for each sample without exactly
    one image, and one for the shard if it is damaged. skipped: counts members of no sample.
    has_labels: false if a sample has none; its label is 0 then.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    keys: NDArray[np.bytes_]
    refused: list[str]
    skipped: SkippedFiles
    has_labels: bool = True


@dataclass(slots=True)
class _Sample:
    """Members that share a key: extents of image files, and of labels by extension."""

    key: str
    images: list[Extent] = field(default_factory=list)
    labels: dict[str, Extent] = field(default_factory=dict)


def index_shard(shard: Path, flag: str, needs_labels: bool = True) -> ShardIndex:
    """Read the headers and labels of a shard; of a damaged one, those before the damage.

    Raises ValueError naming the first sample whose label is missing or no integer, unless labels
    are not needed, and OSError if the file cannot be opened.
    """
    has_labels = True
    rows: list[tuple[int, int, int]] = []
    keys: list[bytes] = []
    refused: list[str] = []
    skipped = SkippedFiles()
    with shard.open("rb") as file:
        samples, damaged_at = _walk(file, flag, skipped)
        for sample in samples:
            label = _find_label(sample, file)
            if not isinstance(label, int) and not needs_labels:
                has_labels, label = False, 0
            if isinstance(label, int) and _json_label(sample, file) not in (None, label):
                skipped.contradict(f"sample {sample.key} of {shard}")
            if len(sample.images) == 1 and isinstance(label, int):
                rows.append((*sample.images[0], label))
                keys.append(sample.key.encode()[:LONGEST_KEY])
            elif damaged_at is not None and sample is samples[-1]:
                continue  # the rest of it is behind the damage, which is reported below
            elif len(sample.images) != 1:
                refused.append(_describe_images(sample, shard, flag))
            else:
                raise ValueError(
                    f"{flag}: expected an integer as label (cls, or label in json), "
                    f"got {label or 'none'}: sample {sample.key} of {shard}"
                )
    if damaged_at is not None:
        refused.append(_describe_damage(damaged_at, shard, flag))
    offsets, sizes, labels = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
    names = np.array(keys, dtype=np.bytes_)
    return ShardIndex(offsets, sizes, labels, names, refused, skipped, has_labels)


def _walk(file: BinaryIO, flag: str, skipped: SkippedFiles) -> tuple[list[_Sample], int | None]:
    """Return the samples, and the byte at which the file is damaged; None if it is whole.

    Raises MachineError if the machine cannot read it.
    """
    samples: list[_Sample] = []
    num_bytes = os.fstat(file.fileno()).st_size
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                is_whole = 0 <= member.size <= num_bytes - member.offset_data
                # a crafted size may lead back to an earlier member: the loop would never end
                if tar.offset <= member.offset or not (is_whole or member.issparse()):
                    return samples, member.offset_data
                if not _add(member, samples) and not member.isdir():
                    skipped.skip(f"{file.name}/{member.name}")
                end = tar.offset
                # tarfile keeps a kilobyte for each member
                tar.members.clear()  # type: ignore[attr-defined]
    except Exception as error:
        # on a crafted header tarfile raises any exception
        if (stopped := machine_error(error, flag, file.name)) is not None:
            raise stopped from error
        return samples, end
    has_end = os.pread(file.fileno(), tarfile.BLOCKSIZE, end) == bytes(tarfile.BLOCKSIZE)
    return samples, None if has_end else end


def _add(member: tarfile.TarInfo, samples: list[_Sample]) -> bool:
    """Add a member to the last sample or, with another key, to a new one, as webdataset does.

    Returns False for members that are left out: anything but a plain file, sparse files, names
    without key or extension, and hidden names or folders.
    """
    folder, slash, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if not (stem and extension and member.isreg()) or member.issparse():
        return False
    if any(is_hidden(part) for part in folder.split("/") if part not in (".", "..")):
        return False
    key = printable(folder + slash + stem)
    if not samples or samples[-1].key != key:
        samples.append(_Sample(key))
    sample, extent, extension = samples[-1], (member.offset_data, member.size), extension.lower()
    if f".{extension}" in image_endings():
        sample.images.append(extent)
    elif extension in LABEL_EXTENSIONS:
        sample.labels[extension] = extent
    return True


def _find_label(sample: _Sample, file: BinaryIO) -> int | str | None:
    """The class number; a description of any other value, or None if there is no label."""
    if extent := sample.labels.get("cls"):
        text = _read(file, extent).decode("ascii", "replace").strip()
        return int(text) if INTEGER.fullmatch(text) else reprlib.repr(text)
    return _label_in_json(sample, file)


def _json_label(sample: _Sample, file: BinaryIO) -> int | None:
    """The class number in the .json of a sample that has a .cls too; None if there is none."""
    label = _label_in_json(sample, file) if len(sample.labels) > 1 else None
    return label if isinstance(label, int) else None


def _label_in_json(sample: _Sample, file: BinaryIO) -> int | str | None:
    """Like `_find_label`, from the .json of the sample alone."""
    extent = sample.labels.get("json")
    if extent is None:
        return None
    try:
        fields = json.loads(_read(file, extent))
    except (ValueError, RecursionError):
        return "unreadable json"
    if not isinstance(fields, dict):
        return "json without names"
    found = [fields[name] for name in ("label", "cls") if name in fields]
    return next(filter(_is_label, found), reprlib.repr(found[0]) if found else None)


def _read(file: BinaryIO, extent: Extent) -> bytes:
    offset, size = extent
    return os.pread(file.fileno(), min(size, LARGEST_LABEL), offset)


def _is_label(value: object) -> bool:
    """True for an integer of 64 bits; bools are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def _describe_images(sample: _Sample, shard: Path, flag: str) -> str:
    got = "several" if sample.images else "none"
    return f"{flag}: expected one image in each sample, got {got}: sample {sample.key} of {shard}"


def _describe_damage(damaged_at: int, shard: Path, flag: str) -> str:
    if damaged_at == 0:
        return f"{flag}: expected an uncompressed .tar file, got {shard}"
    return (
        f"{flag}: expected a whole .tar file, got {shard}, cut off or damaged at byte {damaged_at}"
    )
