"""What an evaluation has measured so far: a line for each batch in files of the run folder."""

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

from safer_fast.whole_file import check_no_link, open_plain

FOLDER = "evaluation"
FORMAT = 3
"""To be raised where an attack computes something else under the same name."""
NAME_BYTES = 8
FLAGS = {
    "right": "is_right",
    "finite": "is_finite",
    "gradient": "has_gradient",
    "start": "starts_right",
}
"""Keys of a line whose text has a 0 or a 1 for each image, and what they are of an outcome."""
SCALE = 1_000_000
"""Losses are kept in millionths: sums of whole numbers are the same in any order."""


class Outcome(NamedTuple):
    """What came of one image.

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


class Store:
    """What is known of images under one attack, by the names of `names_of`.

    `facts`, of what JSON knows, decide the outcomes together with the images; each rank appends to
    a file of its own, and reads those of all. Raises ValueError, one line, for a damaged file; the
    last line that a killed evaluation left half-written counts for nothing.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any], rank: int = 0) -> None:
        self._header = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
        key = hashlib.blake2b(self._header.encode(), digest_size=8).hexdigest()
        self._folder = run / FOLDER
        check_no_link(self._folder)
        self._own = self._folder / f"{key}-{rank}.jsonl"
        self._pattern = f"{key}-*.jsonl"
        self._outcomes: dict[str, Outcome] = {}
        self._is_mended = False

    @property
    def files(self) -> list[Path]:
        """Those of all ranks."""
        return sorted(self._folder.glob(self._pattern))

    def load(self) -> None:
        """Everything that is in the files is known."""
        for file in self.files:
            for number, line in enumerate(_whole_lines(file), start=1):
                self._take(line, f"{file}, line {number}")

    def forget(self) -> None:
        """Nothing is known any more; the files are gone."""
        for file in self.files:
            file.unlink(missing_ok=True)

    def get(self, names: Iterable[str]) -> list[Outcome] | None:
        """The outcomes of these images, None unless all of them are known."""
        try:
            return [self._outcomes[name] for name in names]
        except KeyError:
            return None

    def add(self, names: Sequence[str], outcomes: Sequence[Outcome]) -> None:
        """The outcomes of a batch are known, and in the file before this returns."""
        self._outcomes |= dict(zip(names, outcomes, strict=True))
        line = {
            "names": "".join(names),
            **{
                key: "".join("01"[getattr(outcome, name)] for outcome in outcomes)
                for key, name in FLAGS.items()
            },
            "loss": [outcome.loss for outcome in outcomes],
            "seconds": round(sum(outcome.seconds for outcome in outcomes), 6),
        }
        self._append(json.dumps(line))

    def _append(self, line: str) -> None:
        check_no_link(self._folder)
        self._folder.mkdir(exist_ok=True)
        with open_plain(self._own, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
            if not self._is_mended:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
                line = line if b"\n" in content else f"{self._header}\n{line}"
            file.write(f"{line}\n".encode())
        self._is_mended = True

    def _take(self, line: bytes, place: str) -> None:
        if line == self._header.encode():
            return
        content = _decoded(line)
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
                f"{place}: expected what was measured on a batch, got {line[:40]!r}; --fresh "
                "measures again"
            )
        size = 2 * NAME_BYTES
        columns = [[flag == "1" for flag in str(values)] for values in flags]
        for index, (loss, *own) in enumerate(zip(losses, *columns, strict=True)):
            name = names[index * size : (index + 1) * size]
            are_set = dict(zip(FLAGS.values(), own, strict=True))
            self._outcomes[name] = Outcome(loss=loss, seconds=seconds / num_images, **are_set)


def names_of(images: Tensor, labels: Tensor, position: int, is_joint: bool) -> list[str]:
    """What images [B, ...] are known by: pixels, label and place; hexadecimal digits.

    is_joint: by those of all of them, as outcomes hang on all.
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
    """Sixteen hexadecimal digits that tell files apart by their bytes."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def _whole_lines(file: Path) -> list[bytes]:
    """The lines that are complete; raises ValueError for what is no plain file."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"{file}: expected a file, got {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{file}: expected a plain file")
        return opened.read().split(b"\n")[:-1]


def _decoded(line: bytes) -> dict[str, Any]:
    """The JSON object in the line; empty where there is none."""
    try:
        content = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_flags(value: object, count: int) -> bool:
    """Whether it is a text of so many zeros and ones."""
    return isinstance(value, str) and len(value) == count and set(value) <= {"0", "1"}


def _is_count(value: object) -> bool:
    return type(value) is int and abs(value) < 2**53


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
