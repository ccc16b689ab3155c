"""The data formats: one function that opens a path, and one module per format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from safer_fast.data.formats.source import Source, check_labels

__all__ = ["Source", "check_labels", "open_splits"]

EXPECTED = (
    "a .parquet file or a folder of them, a folder of images (train/CLASS/*.jpg) or an .npz file"
)
# A larger label is no class but a number of another kind.
MOST_UNNAMED_CLASSES = 2**20


def open_splits(path: str | None, flag: str) -> dict[str, Source]:
    """The splits that a path holds: train, validation and test, or `all` where it names none.

    path: None is the built-in digits. flag: the setting named in errors.
    Raises ValueError when the path, its format, columns, arrays, classes or labels are not usable.
    """
    if path is None:
        from safer_fast.data.formats.arrays import open_digits

        return open_digits()
    location = Path(path).expanduser()
    try:
        splits = _open(location, flag)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{flag}: expected {EXPECTED}, got {path} ({reason})") from error
    for source in splits.values():
        _check(source, location)
    return splits


def _open(path: Path, flag: str) -> dict[str, Source]:
    """Format by what is there; each format's libraries are imported only when it is used."""
    if path.is_dir():
        if files := sorted(path.glob("*.parquet")):
            from safer_fast.data.formats.parquet import open_parquet_folder

            return open_parquet_folder(files, flag)
        from safer_fast.data.formats.folder import open_folder

        return open_folder(path, flag)
    path.stat()  # raises OSError that says why: not there, or no permission
    if path.suffix == ".parquet":
        from safer_fast.data.formats.parquet import ParquetSource

        return {"all": ParquetSource([path], flag)}
    if path.suffix == ".npz":
        from safer_fast.data.formats.arrays import open_npz

        return open_npz(path, flag)
    raise ValueError(f"{flag}: expected {EXPECTED}, got {path}")


def _check(source: Source, path: Path) -> None:
    if not len(source):
        raise ValueError(f"{source.flag}: expected at least one image, got none in {path}")
    names = source.class_names
    num_labels = int(np.clip(source.labels.max() + 1, 1, MOST_UNNAMED_CLASSES))
    check_labels(source, num_labels if names is None else len(names))
