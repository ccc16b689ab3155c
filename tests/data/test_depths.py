"""Every format and depth comes out as PIL's pixels, whichever backend decodes."""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.pictures import encode, load, photo, whole, write

EDGE = 24
RGB = photo(EDGE, EDGE)
GREY = RGB.convert("L")
PALETTE = RGB.quantize(16)
RNG = np.random.default_rng(0)


def pnm(kind: int, most: int, channels: int) -> bytes:
    """A binary PGM or PPM, or a plain one, of random values up to `most`."""
    values = RNG.integers(0, most + 1, EDGE * EDGE * channels)
    head = f"P{kind}\n{EDGE} {EDGE}\n{most}\n".encode()
    if kind < 4:
        return head + b" ".join(b"%d" % value for value in values) + b"\n"
    return head + values.astype(">u2" if most > 255 else "u1").tobytes()


def bits(plain: bool) -> bytes:
    values = RNG.integers(0, 2, (EDGE, EDGE)).astype(np.uint8)
    if plain:
        return f"P1\n{EDGE} {EDGE}\n".encode() + b" ".join(b"%d" % v for v in values.flat)
    return f"P4\n{EDGE} {EDGE}\n".encode() + np.packbits(values, axis=1).tobytes()


def png(depth: int, colour: int) -> bytes:
    """A PNG of random samples. colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = -(-EDGE * channels * depth // 8)
    head = struct.pack(">IIBBBBB", EDGE, EDGE, depth, colour, 0, 0, 0)
    palette = [(b"PLTE", RNG.bytes(3 * 2**depth))] if colour == 3 else []
    lines = zlib.compress(b"".join(b"\0" + RNG.bytes(row) for _ in range(EDGE)))
    chunks = [(b"IHDR", head), *palette, (b"IDAT", lines), (b"IEND", b"")]
    blocks = [
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks)


def bmp(depth: int, compression: int = 0, masks: bytes = b"", pixels: bytes | None = None) -> bytes:
    """A BMP of random samples."""
    colours = 2**depth if depth <= 8 else 0
    palette = b"".join(RNG.bytes(3) + b"\0" for _ in range(colours))
    row = -(-EDGE * depth // 32) * 4
    content = RNG.bytes(row * EDGE) if pixels is None else pixels
    start = 14 + 40 + len(masks) + len(palette)
    info = struct.pack(
        "<IiiHHIIiiII", 40, EDGE, EDGE, 1, depth, compression, len(content), 2835, 2835, colours, 0
    )
    head = struct.pack("<2sIHHI", b"BM", start + len(content), 0, 0, start)
    return head + info + masks + palette + content


RLE = b"".join(bytes([EDGE - 4, 3, 0, 4, 1, 2, 5, 7, 0, 0]) for _ in range(EDGE)) + b"\0\1"
MASKS_565 = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
MASKS_8888 = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)

FILES = {
    **{f"PPM up to {most}": pnm(6, most, 3) for most in (1, 15, 100, 254, 255, 256, 1023, 65535)},
    **{f"PGM up to {most}": pnm(5, most, 1) for most in (1, 15, 100, 254, 255)},
    **{f"plain PPM up to {most}": pnm(3, most, 3) for most in (1, 100, 255, 1023)},
    **{f"plain PGM up to {most}": pnm(2, most, 1) for most in (100, 255)},
    "PBM": bits(False),
    "plain PBM": bits(True),
    **{f"grey PNG of {depth} bits": png(depth, 0) for depth in (1, 2, 4, 8)},
    **{f"palette PNG of {depth} bits": png(depth, 3) for depth in (1, 2, 4, 8)},
    **{f"RGB PNG of {depth} bits": png(depth, 2) for depth in (8, 16)},
    **{f"RGBA PNG of {depth} bits": png(depth, 6) for depth in (8, 16)},
    **{f"grey PNG with alpha of {depth} bits": png(depth, 4) for depth in (8, 16)},
    **{f"BMP of {depth} bits": bmp(depth) for depth in (1, 4, 8, 16, 24, 32)},
    "BMP of 8 bits, run lengths": bmp(8, 1, pixels=RLE),
    "BMP of 16 bits, 565": bmp(16, 3, MASKS_565),
    "BMP of 32 bits with masks": bmp(32, 3, MASKS_8888),
    "TIFF": encode(RGB, "tiff"),
    "TIFF, LZW": encode(RGB, "tiff", compression="tiff_lzw"),
    "black and white TIFF": encode(GREY.convert("1"), "tiff", compression="group4"),
    "GIF": encode(PALETTE, "gif"),
    "lossless WEBP": encode(RGB, "webp", lossless=True),
    "WEBP": encode(RGB, "webp"),
    "JPEG": encode(RGB, "jpeg"),
    "grey JPEG": encode(GREY, "jpeg"),
    "JPEG of RGB": encode(RGB, "jpeg", keep_rgb=True),
    "CMYK JPEG": encode(RGB.convert("CMYK"), "jpeg"),
    "JPEG 2000": encode(RGB, "jpeg2000"),
    "AVIF": encode(RGB, "avif"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["device", "torch", "dali"])
def test_every_format_and_depth_has_the_pixels_of_pil(tmp_path: Path, backend: str) -> None:
    if backend == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    colour = encode(photo(EDGE, EDGE, 1), "png")
    path = write(tmp_path, [*FILES.values(), colour])
    notes: list[str] = []
    data = load(path, backend, 8, reported=notes, augmentation="none", validation_fraction=0.1)
    assert whole(data).backend == backend
    batches = list(whole(data).epoch(1))
    images = torch.cat([batch.images[: batch.num_images] for batch in batches])
    wrong = [
        (name, int((image.int() - pixels_of(file).int()).abs().max()))
        for (name, file), image in zip(FILES.items(), images, strict=False)
        if not torch.equal(image, pixels_of(file))
    ]
    assert (wrong, notes) == ([], [])


def pixels_of(file: bytes) -> torch.Tensor:
    """The pixels decoded by PIL, [3, H, W]."""
    image = Image.open(io.BytesIO(file))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("file", [pnm(5, 1023, 1), pnm(2, 65535, 1), png(16, 0)])
def test_grey_of_more_than_eight_bits_is_refused_by_every_backend(
    tmp_path: Path, file: bytes
) -> None:
    path = write(tmp_path, [file, *[encode(RGB, "png")] * 5])
    for backend in ("device", "torch", "dali"):
        if backend == "dali" and importlib.util.find_spec("nvidia.dali") is None:
            continue
        with pytest.raises(ValueError, match="expected an image of 8 bits per channel, got mode I"):
            list(whole(load(path, backend, 2)).epoch(1))
