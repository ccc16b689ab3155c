"""The data formats: one function that opens a path, and one module per format."""

from __future__ import annotations

import stat
from pathlib import Path

from safer_fast.config.messages import printable
from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats.beside import CLASS_NAMES, Beside, visible_folders
from safer_fast.data.formats.source import (
    Columns,
    EncodedSource,
    Source,
    check_labels,
    empty_classes,
)
from safer_fast.data.formats.splits import (
    KINDS,
    expand_pattern,
    files_of,
    find_split_folders,
    group_by_split,
    is_pattern,
)
from safer_fast.runtime.machine_errors import machine_error

__all__ = [
    "Beside",
    "Columns",
    "EncodedSource",
    "Source",
    "check_labels",
    "empty_classes",
    "open_splits",
]

EXPECTED = (
    "a .parquet or .tar file, a folder or pattern (train-{000..099}.tar) of them, "
    "a folder of images (train/CLASS/*.jpg), an .npz file, digits or synthetic"
)
# A larger label is no class but a number of another kind.
MOST_UNNAMED_CLASSES = 2**20


def open_splits(
    path: str | None,
    flag: str,
    bad: BadImages | None = None,
    beside: Beside | None = None,
    columns: Columns | None = None,
) -> dict[str, Source]:
    """The splits that a path holds: train, validation and test, or `all` where it names none.

    path: None and "digits" are the built-in digits, "synthetic" is noise; files of these names are
    reached as ./digits. flag: the setting named in errors. bad: told of damaged shards and of
    samples without image; default: they are errors. beside: told of what is not read.
    columns: of parquet files.
    Raises ValueError when the path, its format, columns, arrays, classes or labels are not usable,
    or the machine cannot read them.
    """
    if path is None or path == "digits":
        from safer_fast.data.formats.arrays import open_digits

        return open_digits(flag)
    if path == "synthetic":
        from safer_fast.data.formats.synthetic import open_synthetic

        return open_synthetic(flag)
    location = Path(path).expanduser()
    try:
        splits = _open(
            location,
            flag,
            bad or BadImages("error"),
            beside or Beside(),
            columns or Columns(),
        )
    except (OSError, MemoryError) as error:
        place = str(getattr(error, "filename", None) or path)
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise machine_error(error, flag, place) or ValueError(
            f"{flag}: expected {EXPECTED}, got {place} ({reason})"
        ) from error
    for source in splits.values():
        _check(source, location)
    return splits


def _open(
    path: Path, flag: str, bad: BadImages, beside: Beside, columns: Columns
) -> dict[str, Source]:
    """Format by what is there; each format's libraries are imported only when it is used."""
    if is_pattern(path):
        return _open_files({"all": expand_pattern(path, flag)}, flag, bad, beside, columns)
    if path.is_dir():
        return _open_folder(path, flag, bad, beside, columns)
    _refuse_special(path, flag)
    if path.suffix.lower() == ".npz":
        from safer_fast.data.formats.arrays import open_npz

        return open_npz(path, flag, beside)
    return _open_files({"all": [path]}, flag, bad, beside, columns)


def _open_folder(
    path: Path, flag: str, bad: BadImages, beside: Beside, columns: Columns
) -> dict[str, Source]:
    from safer_fast.data.formats.folder import open_folders

    splits: dict[str, Path] = {}
    # Image folders often lie beside the .tar files that they were unpacked from.
    if not (files := files_of(path, ".parquet")):
        splits = find_split_folders(path, flag, beside)
        files = [] if splits else files_of(path, ".tar")
    if files:
        beside.pass_over_rest(path, [*files, path / CLASS_NAMES])
        return _open_files(group_by_split(files, flag), flag, bad, beside, columns)
    if groups := _files_of_splits(splits, flag, beside):
        return _open_files(groups, flag, bad, beside, columns)
    return open_folders(splits or {"all": path}, flag, beside)


def _files_of_splits(splits: dict[str, Path], flag: str, beside: Beside) -> dict[str, list[Path]]:
    """The files in the folders of splits; none where these hold folders of classes."""
    if any(map(visible_folders, splits.values())):
        return {}
    for kind in KINDS:
        groups = {split: files_of(folder, kind) for split, folder in splits.items()}
        if not any(groups.values()):
            continue
        for split, folder in splits.items():
            if not groups[split]:
                raise ValueError(
                    f"{flag}: expected {kind} files in every split, got none in {folder}"
                )
            beside.pass_over_rest(folder, [*groups[split], folder / CLASS_NAMES])
        return groups
    return {}


def _open_files(
    groups: dict[str, list[Path]], flag: str, bad: BadImages, beside: Beside, columns: Columns
) -> dict[str, Source]:
    """One source for each split of files of one format."""
    first = next(file for files in groups.values() for file in files)
    for files in groups.values():
        for file in files:
            _refuse_special(file, flag)
    if first.suffix.lower() == ".parquet":
        from safer_fast.data.formats.parquet import open_parquet

        return open_parquet(groups, flag, columns)
    if first.suffix.lower() == ".tar":
        from safer_fast.data.formats.tar import open_tar

        return open_tar(groups, flag, bad, beside)
    raise ValueError(f"{flag}: expected {EXPECTED}, got {first}")


def _refuse_special(file: Path, flag: str) -> None:
    """Raises ValueError for pipes and devices, which could be read for ever, and for folders.

    Raises OSError that says why a file is not there, or may not be read.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{flag}: expected {EXPECTED}, got {file}, which is no file")


def _check(source: Source, path: Path) -> None:
    if not len(source):
        raise ValueError(f"{source.flag}: expected at least one image, got none in {path}")
    names = source.class_names
    for name in names or ():
        if printable(name) != name:
            raise ValueError(
                f"{source.flag}: expected class names without control characters, "
                f"got {name!a} in {path}"
            )
    num_labels = max(1, min(int(source.labels.max()) + 1, MOST_UNNAMED_CLASSES))
    check_labels(source, num_labels if names is None else len(names))
