"""Outcomes that an evaluation has measured so far: files of a line a batch in the run folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from torch import Tensor

from safer_fast.runs.layout import RunFolder
from safer_fast.runtime.files import check_no_link, open_plain
from safer_fast.runtime.turns import turn_at

FORMAT = 4
"""To be raised where an attack computes something else under the same name, or a line changes.

What was stored in another format is measured again.
"""
NAME_BYTES = 8
FLAGS = {
    "right": "is_right",
    "finite": "is_finite",
    "gradient": "has_gradient",
    "start": "starts_right",
}
"""Keys of a line whose text has a 0 or a 1 for each image, and what they are of an outcome."""
CHECK = "check"
SCALE = 1_000_000
"""Losses are kept in millionths: sums of whole numbers are the same in any order."""


class Outcome(NamedTuple):
    """Outcome of one image under an attack.

    loss: in millionths, None where it is not finite. seconds: its share of those that its batch
    took. is_finite: its logits. has_gradient: each that the attack asked for was of use,
    neither zero nor infinite. starts_right: all random starts alone leave it right.
    """

    is_right: bool
    loss: int | None
    seconds: float
    is_finite: bool = True
    has_gradient: bool = True
    starts_right: bool = True


class _Place(NamedTuple):
    """Position up to which a file was read: bytes, lines, and the last line as a check."""

    offset: int = 0
    num_lines: int = 0
    last: bytes = b""


class Store:
    """Outcomes of images under one attack, by the names of `names_of`.

    `facts`, values for JSON, decide the outcomes together with the images; each rank appends to a
    file of its own, and reads those of all. Several evaluations may use one store at once: they
    take turns, and see what the others added. Every line ends with a checksum of itself. Raises
    ValueError, one line, for a damaged file; the last line that a killed evaluation left
    half-written counts for nothing.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any], rank: int = 0) -> None:
        self._header = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
        self.key = hashlib.blake2b(self._header.encode(), digest_size=8).hexdigest()
        self._folder = RunFolder(run).evaluation
        check_no_link(self._folder)
        self._own = self._folder / f"{self.key}-{rank}.jsonl"
        self._first = self._folder / f"{self.key}-0.jsonl"  # all ranks take turns at this one
        self._pattern = f"{self.key}-*.jsonl"
        self._outcomes: dict[str, Outcome] = {}
        self._places: dict[Path, _Place] = {}

    @property
    def files(self) -> list[Path]:
        """The files of all ranks."""
        return sorted(self._folder.glob(self._pattern))

    def load(self) -> None:
        """Read what was added to the files since the last call."""
        places = self._places
        self._places = {}
        for file in self.files:
            self._places[file] = self._read(file, places.get(file, _Place()))

    def forget(self) -> None:
        """Delete all files."""
        if not self.files:
            return
        with turn_at(self._first):
            for file in self.files:
                file.unlink(missing_ok=True)

    def get(self, names: Sequence[str]) -> list[Outcome] | None:
        """The outcomes of these images, also those of others so far; None unless all are known."""
        if not self._knows(names):
            self.load()
        return [self._outcomes[name] for name in names] if self._knows(names) else None

    def add(self, names: Sequence[str], outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Write the outcomes of a batch to the file and return them.

        Outcomes that another evaluation added meanwhile stay as they are and are returned.
        """
        check_no_link(self._folder)
        self._folder.mkdir(exist_ok=True)
        with turn_at(self._first):
            self.load()
            found = dict(zip(names, outcomes, strict=True))
            new = {name: found[name] for name in found if name not in self._outcomes}
            if new:
                self._append(_line_of(new))
            self._outcomes |= new
        return [self._outcomes[name] for name in names]

    def _knows(self, names: Iterable[str]) -> bool:
        return all(name in self._outcomes for name in names)

    def _append(self, line: bytes) -> None:
        """Write the line behind the last whole one of this rank's file."""
        end = self._places.get(self._own, _Place()).offset
        header = b"" if end else self._header.encode() + b"\n"
        with open_plain(self._own, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
            file.truncate(end)
            file.write(header + line + b"\n")

    def _read(self, file: Path, place: _Place) -> _Place:
        """Read the lines behind the place; return the place behind them."""
        content = _read_from(file, place.offset - len(place.last))
        if not content.startswith(place.last):  # another file of that name
            place, content = _Place(), _read_from(file, 0)
        *lines, _ = content[len(place.last) :].split(b"\n")
        for number, line in enumerate(lines, start=place.num_lines + 1):
            self._take(line, f"{file}, line {number}")
        if not lines:
            return place
        size = sum(len(line) + 1 for line in lines)
        return _Place(place.offset + size, place.num_lines + len(lines), lines[-1] + b"\n")

    def _take(self, line: bytes, place: str) -> None:
        if line == self._header.encode():
            return
        content = _content_of(line)
        names, losses, seconds = (content.get(name) for name in ("names", "loss", "seconds"))
        flags = [content.get(key) for key in FLAGS]
        num_images = len(losses) if isinstance(losses, list) else 0
        if not (
            num_images
            and isinstance(losses, list)
            and all(_is_flags(values, num_images) for values in flags)
            and isinstance(names, str)
            and len(names) == 2 * NAME_BYTES * num_images
            and all(loss is None or _is_count(loss) for loss in losses)
            and isinstance(seconds, float)
        ):
            raise ValueError(
                f"{place}: expected what was measured on a batch, with its checksum, got "
                f"{line[:40]!r}; without that line its images are measured again, with --fresh all"
            )
        size = 2 * NAME_BYTES
        columns = [[flag == "1" for flag in str(values)] for values in flags]
        for index, (loss, *own) in enumerate(zip(losses, *columns, strict=True)):
            name = names[index * size : (index + 1) * size]
            are_set = dict(zip(FLAGS.values(), own, strict=True))
            self._outcomes[name] = Outcome(loss=loss, seconds=seconds / num_images, **are_set)


def names_of(images: Tensor, labels: Tensor, position: int, is_joint: bool) -> list[str]:
    """Names of images [B, ...]: hexadecimal digests of pixels, label and position.

    is_joint: digests of all of them together, for outcomes that depend on all.
    """
    rows = images.cpu().contiguous().numpy().reshape(len(images), -1)
    rows = np.ascontiguousarray(rows).view(np.uint8)
    salt = hashlib.blake2b(rows.data if is_joint else b"", digest_size=NAME_BYTES)
    if is_joint:
        salt.update(json.dumps([position, labels.tolist()]).encode())
    names = []
    for index, label in enumerate(labels.tolist()):
        name = salt.copy()
        name.update(rows[index].data)
        name.update(f"{position + index} {label}".encode())
        names.append(name.hexdigest())
    return names


def to_millionths(losses: Tensor) -> list[int | None]:
    """Losses [B] as `Outcome` has them."""
    values = losses.double().tolist()
    return [round(value * SCALE) if math.isfinite(value) else None for value in values]


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, sixteen hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def _read_from(file: Path, offset: int) -> bytes:
    """The bytes of a file from `offset` on; raises ValueError unless it is a plain file."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"{file}: expected a file, got {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{file}: expected a plain file")
        opened.seek(offset)
        return opened.read()


def _line_of(outcomes: Mapping[str, Outcome]) -> bytes:
    """The line that holds outcomes of images by their names."""
    values = outcomes.values()
    flags = {key: "".join("01"[getattr(o, name)] for o in values) for key, name in FLAGS.items()}
    return sealed(
        {
            "names": "".join(outcomes),
            **flags,
            "loss": [outcome.loss for outcome in values],
            "seconds": round(sum(outcome.seconds for outcome in values), 6),
        }
    )


def sealed(content: Mapping[str, Any]) -> bytes:
    """The JSON object on one line, behind its last value the checksum of its text."""
    text = json.dumps(content)
    check = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f'{text[:-1]}, "{CHECK}": "{check}"}}'.encode()


def _content_of(line: bytes) -> dict[str, Any]:
    """The JSON object in the line; empty where there is none, or a bit of the line has changed."""
    try:
        content = json.loads(line, parse_constant=_refuse)
        content.pop(CHECK)
        return content if sealed(content) == line else {}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return {}


def _is_flags(value: object, count: int) -> bool:
    """True for a text of `count` zeros and ones."""
    return isinstance(value, str) and len(value) == count and set(value) <= {"0", "1"}


def _is_count(value: object) -> bool:
    return type(value) is int and abs(value) < 2**53


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
