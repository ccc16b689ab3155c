"""Small files that stand for gigabytes end in one line, or are left out, with little memory."""

from __future__ import annotations

import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from safer_fast import evaluate, report
from tests.support.commands import last_line
from tests.support.kills import Moment, Server, Setting, flags_for
from tests.support.pictures import encode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

EDGE = 60_000
HUGE = 10**9
MOST_MIB = 300  # that a run of a very small model takes, and some room


def peak_mib() -> float:
    """The most memory that this process has had since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


@dataclass(frozen=True)
class Measured:
    """By how many MiB the process of a run grows at most, is in a file at its end."""

    file: Path

    def arm(self) -> None:
        Finalize(None, self._write, (forget_peak(),), exitpriority=1)

    def _write(self, before: float) -> None:
        self.file.write_text(str(peak_mib() - before))

    def assert_little(self) -> None:
        assert float(self.file.read_text()) < MOST_MIB


# images


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(edge: int, extra: bytes = b"") -> bytes:
    """A PNG of 8x8 black pixels that says it has another edge."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(8 * 25))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + extra + pixels


def red(kind: str, **settings: bool) -> bytearray:
    return bytearray(encode(Image.new("RGB", (8, 8), "red"), kind, **settings))


def jpeg() -> bytes:
    content = red("jpeg")
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", EDGE, EDGE)
    return bytes(content)


def tiff() -> bytes:
    content = bytes(red("tiff"))
    for tag in (256, 257):
        entry = struct.pack("<HHI", tag, 4, 1)
        assert entry + struct.pack("<I", 8) in content
        content = content.replace(entry + struct.pack("<I", 8), entry + struct.pack("<I", EDGE))
    return content


def gif() -> bytes:
    content = red("gif")
    content[6:10] = struct.pack("<HH", EDGE, EDGE)
    start = content.index(b"\x2c", 13) + 5
    content[start : start + 4] = struct.pack("<HH", EDGE, EDGE)
    return bytes(content)


def webp() -> bytes:
    content = red("webp", lossless=True)
    start = content.index(b"VP8L") + 9
    content[start : start + 4] = struct.pack("<I", 2**14 - 1 | (2**14 - 1) << 14)
    return bytes(content)


def bmp() -> bytes:
    content = red("bmp")
    content[18:26] = struct.pack("<ii", EDGE, EDGE)
    return bytes(content)


def text_chunk(name: bytes) -> bytes:
    return chunk(name, b"x\0\0" + zlib.compress(bytes(HUGE // 2), 1))


IMAGES: dict[str, Callable[[], bytes]] = {
    "head.png": lambda: png(EDGE),
    "head.jpg": jpeg,
    "head.tif": tiff,
    "head.gif": gif,
    "head.webp": webp,
    "head.bmp": bmp,
    "profile.png": lambda: png(8, text_chunk(b"iCCP")),
    "text.png": lambda: png(8, text_chunk(b"zTXt")),
}


@pytest.fixture(scope="module")
def with_bombs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos, and all these images."""
    folder = shutil.copytree(photos, tmp_path_factory.mktemp("bombs") / "photos")
    for name, make in IMAGES.items():
        (folder / "train" / "b" / name).write_bytes(make())
    return folder


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_images_that_claim_to_be_gigantic_are_left_out_and_named(
    backend: str, server: Server, with_bombs: Path, tmp_path: Path
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    peak, run = Measured(tmp_path / "peak"), tmp_path / "run"
    flags = [*flags_for(with_bombs, backend), "--data.num_workers=0"]
    status, output, errors = server.train(run, flags, peak)
    assert (status, errors) == (0, ""), output
    for name in IMAGES:
        assert f"got an unreadable one: {with_bombs / 'train' / 'b' / name}" in output
    peak.assert_little()


# files of a run


@pytest.fixture(scope="module")
def stopped(server: Server, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed when all but its report was there."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    late = Moment("safer_fast.training.results.write_report")
    assert server.train(folder, flags_for(photos, "device"), late).status < 0
    return folder


def grow(file: Path) -> None:
    """The file is gigantic, without a line break; it takes no room on the disk."""
    file.write_bytes(b'{"a": 1')
    with file.open("r+b") as opened:
        opened.truncate(HUGE)


@pytest.mark.parametrize("name", ["config.json", "run.yaml", "metrics.jsonl"])
def test_gigantic_files_of_a_run_are_refused_in_one_line(
    name: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    grow(run / name)
    before = forget_peak()
    for main in (report.main, evaluate.main):
        assert str(run / name) in last_line(capsys, main, str(run))
    assert peak_mib() - before < MOST_MIB


def test_a_run_whose_log_became_gigantic_goes_on_with_what_is_whole(
    server: Server, photos: Path, stopped: Path, tmp_path: Path
) -> None:
    run, peak = shutil.copytree(stopped, tmp_path / "run"), Measured(tmp_path / "peak")
    grow(run / "metrics.jsonl")
    status, output, errors = server.train(run, flags_for(photos, "device"), peak)
    assert (status, errors) == (0, ""), output
    assert f" bytes expected, {HUGE} found)" in output
    assert (run / "metrics.jsonl").stat().st_size < 2**20
    peak.assert_little()


# parquet


def write_rows(file: Path, count: int, image: bytes | None, labels: np.ndarray) -> Path:
    """Rows that share one image, which the file has once; None for rows without any."""
    places = pa.array(np.zeros(count, np.int32), mask=np.full(count, image is None))
    images = pa.DictionaryArray.from_arrays(places, pa.array([image or b""], pa.binary()))
    table = pa.table({"image": images, "label": labels})
    pq.write_table(
        table, file, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False
    )
    assert file.stat().st_size < 2**20
    return file


BOMBS: dict[str, tuple[int, bytes | None, str]] = {
    "images": (1000, bytes(10**7), "expected a column image that fits in memory (at most 0.1 GiB)"),
    "labels": (2**22, None, "expected a column label that fits in memory (at most 0.0 GiB)"),
}


@pytest.mark.parametrize(("count", "image", "expected"), BOMBS.values(), ids=BOMBS.keys())
def test_parquet_files_that_stand_for_gigabytes_are_refused_in_one_line(
    count: int, image: bytes | None, expected: str, server: Server, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "a.parquet", count, image, np.arange(count) % 2)
    peak, module = Measured(tmp_path / "peak"), "safer_fast.data.formats.parquet"
    most = Setting(module, "LARGEST_IN_MEMORY", 2**26), Setting(module, "SHARE_OF_LABELS", 2**12)
    flags = [*flags_for(file, "torch"), "--data.num_workers=0"]
    status, output, errors = server.train(tmp_path / "run", flags, peak, *most)
    assert status == 2, output
    assert errors == f"error: --data.path: {expected}, got a larger one: {file}\n"
    peak.assert_little()
