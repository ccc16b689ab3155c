"""Data sets of images as people store them: archives and tables."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

Member = tuple[str, bytes]


def write_tar(file: Path, members: Sequence[Member]) -> Path:
    """A shard with these members, in this order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def encode(image: NDArray[Any]) -> bytes:
    """The array as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(
    file: Path,
    images: Sequence[NDArray[Any] | bytes],
    labels: Any,
    names: list[str] | None = None,
    column: str = "image",
    plain: bool = False,
) -> Path:
    """A table as `datasets` writes it: structs of bytes and path, or plain bytes."""
    encoded = [image if isinstance(image, bytes) else encode(image) for image in images]
    values: pa.Array[Any] = pa.array(encoded, pa.binary())
    if not plain:
        paths = pa.nulls(len(encoded), pa.string())
        values = pa.StructArray.from_arrays([values, paths], ["bytes", "path"])
    table = pa.table({column: values, "label": pa.array(labels)})
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, file, row_group_size=7)
    return file
