"""Small sets of noise in several formats, and the error that reading a set ends with."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from safer_fast.config.schema import DataConfig
from safer_fast.data import load_data

RNG = np.random.default_rng(0)


COLOUR = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


GREY = RNG.integers(0, 256, (20, 8, 8), dtype=np.uint8)


LABELS = np.arange(20) % 4


def fail(path: Path | None, batch_size: int = 2, **settings: Any) -> str:
    """The error that loading and reading the data ends with."""
    config = DataConfig(path=None if path is None else str(path), **settings)
    with pytest.raises(ValueError, match=r"^[a-z_.]+: expected [^\n]+, got [^\n]+$") as caught:
        list(load_data(config, batch_size=batch_size, seed=0).train.epoch(1))
    return str(caught.value)


def png(image: Any) -> bytes:
    """The array as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(file: Path, images: Any, labels: Any, names: Any = None) -> Path:
    """A table of encoded images and labels, as users write it by hand."""
    table = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels)})
    if names is not None:
        info = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, file)
    return file


def write_npz(file: Path, images: Any = COLOUR, labels: Any = LABELS) -> Path:
    """An archive of two arrays."""
    np.savez(file, images=images, labels=labels)
    return file


def write_tar(file: Path, images: Any, label: bytes | None = None) -> Path:
    """A shard of encoded images; labels alternate unless one is given."""
    with tarfile.open(file, "w") as archive:
        for number, image in enumerate(images):
            own_label = label or b"%d" % (number % 2)
            for extension, content in (("png", image), ("cls", own_label)):
                info = tarfile.TarInfo(f"{number:03}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file
