"""The columns of images and labels in a parquet file, and the class names of the labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from safer_fast.config.messages import meant, printable
from safer_fast.data.formats.source import Columns

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
# Words in names of label columns, if none is named label and the metadata name none.
LABEL_WORDS = ("label", "class", "target", "category")
Column: TypeAlias = "pa.ChunkedArray[Any]"


@dataclass(frozen=True)
class Found:
    """Names of both columns, and of the classes if the metadata have them.

    label: None for images without labels.
    """

    image: str
    label: str | None
    class_names: list[str] | None


def find_columns(
    schema: pa.Schema, wanted: Columns, file: Path, flag: str, needs_labels: bool = True
) -> Found:
    """Find the columns that `wanted` names, or else the only ones with a fitting name and type.

    Without needs_labels the column of labels is None unless there is one.
    Raises ValueError listing the columns if one is missing, ambiguous, or of another type than
    images or labels.
    """
    features = _features(schema)
    image = _named(wanted.image, "image", schema, file) or _one(
        _image_candidates(schema, features), "image (or img)", "image", schema, file, flag
    )
    label = _named(wanted.label, "label", schema, file)
    candidates = label_candidates(schema, image)
    if label is None and (needs_labels or len(candidates) == 1):
        label = _one(candidates, LABEL_COLUMN, "label", schema, file, flag)
    if not is_image(kind := schema.field(image).type):
        raise ValueError(
            f"{_flag(wanted.image, 'image', flag)}: expected encoded images as bytes or "
            f"struct{{bytes, path}}, got {kind} in column {printable(image)} of {file}"
        )
    if label is None:
        return Found(image, None, None)
    if not (pa.types.is_integer(kind := schema.field(label).type) or is_text(kind)):
        raise ValueError(
            f"{_flag(wanted.label, 'label', flag)}: expected integers or text as labels, "
            f"got {kind} in column {printable(label)} of {file}"
        )
    names = features.get(label, {}).get("names") if pa.types.is_integer(kind) else None
    known = [str(name) for name in names] if isinstance(names, list) else []
    return Found(image, label, known or None)


def is_image(kind: pa.DataType) -> bool:
    """True for a type of encoded images: bytes, or a struct of bytes and path."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and is_image(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_text(kind: pa.DataType) -> bool:
    """True for a type of texts, dictionary-encoded or not."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def read_labels(
    column: Column, name: str, file: Path, flag: str
) -> tuple[NDArray[np.int64], list[str] | None]:
    """Read labels [N]; for texts, their indices in the sorted texts, and the sorted texts.

    Raises ValueError for a row without a label.
    """
    if column.null_count:
        row = int(np.flatnonzero(column.is_null())[0])
        raise ValueError(
            f"{flag}: expected a label in every row of column {printable(name)}, "
            f"got none: row {row} of {file}"
        )
    if not is_text(column.type):
        return column.to_numpy().astype(np.int64), None
    column = column.cast(pa.large_string())
    names = sorted(str(name) for name in pc.unique(column).to_pylist())
    places = pc.index_in(column, value_set=pa.array(names, pa.large_string()))
    return places.to_numpy().astype(np.int64), names


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Features of the columns according to the metadata key `huggingface`."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: item for name, item in features.items() if isinstance(item, dict)}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return {}


def _image_candidates(schema: pa.Schema, features: dict[str, dict[str, Any]]) -> list[str]:
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            return [name]
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    return declared or [field.name for field in schema if is_image(field.type)]


def label_candidates(schema: pa.Schema, image: str) -> list[str]:
    """Columns that may be labels: `label`, those of class labels, those whose name and type fit."""
    features = _features(schema)
    if LABEL_COLUMN in schema.names:
        return [LABEL_COLUMN]
    declared = [
        name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"
    ]
    return declared or [
        field.name
        for field in schema
        if (pa.types.is_integer(field.type) or is_text(field.type))
        and any(word in field.name.lower() for word in LABEL_WORDS)
        and field.name != image
    ]


def _named(name: str | None, role: str, schema: pa.Schema, file: Path) -> str | None:
    """Check the column that the setting names; None if it names none."""
    if name is not None and schema.names.count(name) != 1:
        raise ValueError(
            f"data.{role}_column: expected one column of {file} ({_list(schema.names)}), "
            f"got {printable(name) or 'an empty name'}{meant(name, schema.names)}"
        )
    return name


def _one(
    candidates: list[str], usual: str, role: str, schema: pa.Schema, file: Path, flag: str
) -> str:
    """The only candidate; raises ValueError if there is not exactly one."""
    if len(candidates) == 1 and schema.names.count(candidates[0]) == 1:
        return candidates[0]
    shown = [name for name in schema.names if name in candidates] or schema.names
    raise ValueError(
        f"{flag}: expected one column {usual}, or --data.{role}_column, "
        f"got {_list(shown)} in {file}"
    )


def _list(names: list[str]) -> str:
    return printable(", ".join(names)) or "none"


def _flag(name: str | None, role: str, flag: str) -> str:
    """The setting that determined a column."""
    return flag if name is None else f"data.{role}_column"
