"""Data formats: a table of them, a function that opens a path, and a module for each format."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from safer_fast.config.messages import meant, printable
from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats.skipped import CLASS_NAMES, SkippedFiles, visible_folders
from safer_fast.data.formats.source import (
    Columns,
    EncodedSource,
    OpenRequest,
    Source,
    check_labels,
    empty_classes,
    hides_labels,
)
from safer_fast.data.formats.splits import (
    expand_pattern,
    files_of,
    find_split_folders,
    group_by_split,
    is_pattern,
)
from safer_fast.runtime.machine_errors import machine_error

__all__ = [
    "FORMATS",
    "Columns",
    "EncodedSource",
    "Format",
    "OpenRequest",
    "SkippedFiles",
    "Source",
    "check_labels",
    "empty_classes",
    "names_of",
    "open_splits",
]


class Format(NamedTuple):
    """A data format: the way to recognise it and the function that opens it.

    kind: how a path is recognised. word: it is the name; given: it is the name of data that Python
    holds, see `giving`; prefix: the path begins with the name; marked: a folder holds a file of
    this name; files: one or more files of this ending for each split, given as a file, a folder or
    a pattern; file: one file of this ending that holds all splits; folders: images in folders of
    classes. opener: MODULE.FUNCTION in this folder, which is imported when it is used; it takes the
    paths of each split and an `OpenRequest`, and returns a source for each split. is_archive: a
    folder of such files that also holds folders of splits is read from these folders.
    """

    kind: Literal["word", "given", "prefix", "marked", "files", "file", "folders"]
    name: str
    opener: str
    is_archive: bool = False

    def open(self, splits: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
        """Call the opener, whose module and libraries are imported now."""
        module, function = self.opener.split(".")
        found: dict[str, Source] = getattr(import_module(f"{__name__}.{module}"), function)(
            splits, request
        )
        return found


FORMATS = (
    Format("word", "digits", "arrays.open_digits"),
    Format("word", "synthetic", "synthetic.open_synthetic"),
    Format("given", "given", "given.open_given"),
    Format("prefix", "hf:", "hugging_face.open_hub"),
    Format("marked", "dataset_dict.json", "hugging_face.open_saved"),
    Format("marked", "state.json", "hugging_face.open_saved"),
    Format("files", ".parquet", "parquet.open_parquet"),
    Format("files", ".tar", "tar.open_tar", is_archive=True),
    Format("file", ".npz", "arrays.open_npz"),
    Format("folders", "train/CLASS/*.jpg", "folder.open_folders"),
)
"""All formats of data, in the order in which a path is compared with them."""
# Without class names, a larger label is not taken for a class.
MOST_UNNAMED_CLASSES = 2**20


def open_splits(
    path: str | None,
    flag: str,
    bad: BadImages | None = None,
    skipped: SkippedFiles | None = None,
    columns: Columns | None = None,
    needs_labels: bool = True,
) -> dict[str, Source]:
    """Open the splits that a path holds: train, validation and test, or `all` where it names none.

    path: a word of `FORMATS` ("digits", also for None), a file, a folder or a pattern; files with
    the name of a word are reached as ./digits. flag: the setting named in errors. bad: receives
    damaged shards and samples without image; default: they are errors. skipped: counts what is not
    read. columns: of parquet files. needs_labels: False takes images without labels too.
    Raises ValueError when the path, its format, columns, arrays, classes or labels are not usable,
    or the machine cannot read them.
    """
    request = OpenRequest(
        flag,
        bad or BadImages("error"),
        skipped or SkippedFiles(),
        columns or Columns(),
        needs_labels,
    )
    if path is None or path in names_of("word"):
        return _find("word", path or "digits").open({}, request)
    location = Path(path).expanduser()
    try:
        splits = _open(location, request)
    except (OSError, MemoryError) as error:
        place = str(getattr(error, "filename", None) or path)
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise machine_error(error, flag, place) or ValueError(
            f"{flag}: expected {_expected()}, got {place} ({reason}){meant(path, names_of('word'))}"
        ) from error
    for split in [name for name in splits if name in ("validation", "test")]:
        if len(splits) > 1 and hides_labels(splits[split]):
            request.skipped.skip_unlabelled(_origin(splits[split], split, path))
            del splits[split]
    for source in splits.values():
        if hides_labels(source) and not needs_labels:
            source.leave_out_labels()
        _check(source, location)
    return splits


def _origin(source: Source, split: str, path: str) -> str:
    """The name of a split for a note; that of data given in Python is its flag."""
    return source.flag if path in names_of("given") else f"the {split} split in {path}"


def names_of(kind: str) -> list[str]:
    """The words or endings of the formats of a kind, in their order."""
    return [item.name for item in FORMATS if item.kind == kind]


def _find(kind: str, name: str) -> Format:
    return next(item for item in FORMATS if (item.kind, item.name) == (kind, name))


def _expected() -> str:
    """The words for all formats, for messages."""
    return (
        f"a {' or '.join(names_of('files'))} file, a folder or pattern (train-{{000..099}}.tar) of "
        f"them, a folder of images ({', '.join(names_of('folders'))}), "
        f"an {' or '.join(names_of('file'))} file, hf:NAME, {' or '.join(names_of('word'))}"
    )


def _open(path: Path, request: OpenRequest) -> dict[str, Source]:
    if str(path) in names_of("given"):
        return _find("given", str(path)).open({}, request)
    for prefix in names_of("prefix"):
        if str(path).startswith(prefix):
            return _find("prefix", prefix).open({"all": [path]}, request)
    if is_pattern(path):
        return _open_files({"all": expand_pattern(path, request.flag)}, request)
    if path.is_dir():
        return _open_folder(path, request)
    if (ending := path.suffix.lower()) in names_of("file"):
        _refuse_special(path, request.flag)
        return _find("file", ending).open({"all": [path]}, request)
    return _open_files({"all": [path]}, request)


def _open_folder(path: Path, request: OpenRequest) -> dict[str, Source]:
    """Open the files of one format in a folder, or its folders of splits or of classes.

    Archives come after folders of splits: these may have been unpacked from them.
    """
    flag, skipped = request.flag, request.skipped
    for mark in names_of("marked"):
        if (path / mark).is_file():
            return _find("marked", mark).open({"all": [path]}, request)
    archives = [item.name for item in FORMATS if item.is_archive]
    others = [ending for ending in names_of("files") if ending not in archives]
    splits: dict[str, Path] = {}
    if not (files := _first_files(path, others)):
        splits = find_split_folders(path, names_of("files"), flag, skipped)
        files = [] if splits else _first_files(path, archives)
    if files:
        skipped.skip_rest(path, [*files, path / CLASS_NAMES])
        return _open_files(group_by_split(files, flag), request)
    if groups := _files_of_splits(splits, flag, skipped):
        return _open_files(groups, request)
    folders = {split: [folder] for split, folder in splits.items()} or {"all": [path]}
    return _find("folders", *names_of("folders")).open(folders, request)


def _first_files(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files of the first ending that any file in the folder has."""
    return next(filter(None, (files_of(folder, ending) for ending in endings)), [])


def _files_of_splits(
    splits: dict[str, Path], flag: str, skipped: SkippedFiles
) -> dict[str, list[Path]]:
    """The files in the folders of splits; none where these hold folders of classes."""
    if any(map(visible_folders, splits.values())):
        return {}
    for ending in names_of("files"):
        groups = {split: files_of(folder, ending) for split, folder in splits.items()}
        if not any(groups.values()):
            continue
        for split, folder in splits.items():
            if not groups[split]:
                raise ValueError(
                    f"{flag}: expected {ending} files in every split, got none in {folder}"
                )
            skipped.skip_rest(folder, [*groups[split], folder / CLASS_NAMES])
        return groups
    return {}


def _open_files(groups: dict[str, list[Path]], request: OpenRequest) -> dict[str, Source]:
    """One source for each split of files of one format."""
    first = next(file for files in groups.values() for file in files)
    for files in groups.values():
        for file in files:
            _refuse_special(file, request.flag)
    if (ending := first.suffix.lower()) in names_of("files"):
        return _find("files", ending).open(groups, request)
    raise ValueError(f"{request.flag}: expected {_expected()}, got {first}")


def _refuse_special(file: Path, flag: str) -> None:
    """Raise ValueError for pipes, devices and folders: reading them might never end.

    Raises OSError with the reason if a file is missing or may not be read.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{flag}: expected {_expected()}, got {file}, which is no file")


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
