"""Damaged and unusual image files, and folders that hold them among good ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.pictures import (
    SIZES,
    encode,
    photo,
    write,
)

GOOD = encode(photo(80, 90), "jpeg", quality=90)


GOOD_PNG = encode(photo(80, 90), "png")


MIDDLE = len(GOOD) // 2


SIXTEEN_BITS = np.arange(80 * 90, dtype=np.uint16).reshape(80, 90)


def changed(file: bytes, at: int) -> bytes:
    """The file with other bits at one place."""
    return file[:at] + bytes([file[at] ^ 0x55]) + file[at + 1 :]


BAD = {
    "half a JPEG": GOOD[:MIDDLE],
    "nearly all of a JPEG": GOOD[: len(GOOD) * 98 // 100],
    "all but a byte of a JPEG": GOOD[:-1],
    "a JPEG without a scan": GOOD[: GOOD.index(b"\xff\xda")] + b"\xff\xd9",
    "nothing": b"",
    "text": b"hello",
    "half a PNG": GOOD_PNG[: len(GOOD_PNG) // 2],
    "nearly all of a PNG": GOOD_PNG[: len(GOOD_PNG) * 98 // 100],
    "a PNG that was changed": changed(GOOD_PNG, len(GOOD_PNG) // 2),
    "half a WEBP": encode(photo(80, 90), "webp")[:500],
    "half a BMP": encode(photo(80, 90), "bmp")[:9000],
    "half a GIF": encode(photo(80, 90), "gif")[:3000],
    "sixteen bits": encode(Image.fromarray(SIXTEEN_BITS), "png"),
}


REFUSED_BY_DALI = {
    "a PNG without its end": GOOD_PNG[:-12],
    "a PNG with a wrong check sum": changed(GOOD_PNG, -13 - 3),
}


def write_around(path: Path, *files: bytes) -> Path:
    """The files among good ones: one after every third."""
    good = [encode(photo(*size, 1), "jpeg") for size in SIZES]
    mixed = good[:]
    for number, file in enumerate(files):
        mixed.insert(3 + 4 * number, file)
    return write(path, mixed)
