"""Files and folders of each split, recognised by their names, and brace patterns."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from safer_fast.data.formats.skipped import (
    SkippedFiles,
    find_dead_links,
    is_hidden,
    visible_folders,
)

RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")
SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing)?)|(?P<validation>val(?:id(?:ation)?)?|dev)|"
    r"(?P<test>test(?:ing)?))(?:set|data)?(?![a-z])"
)
# Words that mean validation data to some and test data to others.
UNCLEAR = re.compile(r"(?<![a-z])(?:eval(?:uation)?|(?:hold|held)[-_ ]?out)(?:set|data)?(?![a-z])")
CAPITAL_WITHIN = re.compile(r"(?<=[a-z])(?=[A-Z])")
ADVICE = "name it train, val or test, or give each split by a path of its own"


def is_pattern(path: Path) -> bool:
    """True for a path that names several files, such as train-{000..099}.tar."""
    return RANGE.search(str(path)) is not None


def expand_pattern(pattern: Path, flag: str) -> list[Path]:
    """Return the files that a brace pattern names, in the order and with the padding of a shell.

    Raises ValueError for a range that counts down and for the first missing file.
    """
    files = []
    for name in _expand(str(pattern), flag):
        file = Path(name)
        if not file.exists():
            raise ValueError(f"{flag}: expected all files of {pattern}, got no {file}")
        files.append(file)
    return files


def split_of(name: str) -> str | None:
    """The split named by a word of a file or folder name, in any case; None if there is none."""
    match = SPLIT.search(_words(name))
    return match.lastgroup if match else None


def names_split(name: str) -> bool:
    """True if a name has a word for a split, including ambiguous words."""
    return split_of(name) is not None or UNCLEAR.search(_words(name)) is not None


def files_of(folder: Path, ending: str) -> list[Path]:
    """The files of an ending, in any case, in a folder, sorted by name."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() == ending and not is_hidden(entry.name)
    )


def group_by_split(files: list[Path], flag: str) -> dict[str, list[Path]]:
    """Group files by the split in their names; under `all` if no name has one."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        groups[split_of(file.stem) or "all"].append(file)
    if "all" in groups and len(groups) > 1:
        raise ValueError(
            f"{flag}: expected train, val or test in the name of every file or of none, "
            f"got {groups['all'][0]}"
        )
    return dict(groups)


def find_split_folders(
    path: Path, endings: Sequence[str], flag: str, skipped: SkippedFiles
) -> dict[str, Path]:
    """Find the folders below `path` that are splits by their names; none if they are classes.

    A folder is a split if its name is a word for one, or contains such a word and the folder holds
    folders. Raises ValueError for two folders of one split, and for a folder that looks like a
    split and is not used. endings: of the files that splits may hold.
    """
    if dead := [name for name in find_dead_links(path) if names_split(name)]:
        raise ValueError(f"{flag}: expected a folder, got a link to nowhere: {path / dead[0]}")
    folders = [path / name for name in visible_folders(path)]
    found = _splits_among(folders, flag)
    others = [folder for folder in folders if folder not in found.values()]
    for folder in others:
        if UNCLEAR.search(_words(folder.name)) and (found or visible_folders(folder)):
            raise ValueError(
                f"{flag}: expected folders of classes, or of train, val and test data, "
                f"got {folder}; {ADVICE}"
            )
    if others and not any(_holds_data(folder, endings) for folder in found.values()):
        found = _as_classes(path, found, others[0], flag)
    if found:
        skipped.skip_rest(path, found.values())
    return found


def _expand(pattern: str, flag: str) -> Iterator[str]:
    match = RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"{flag}: expected a range that counts up, got {match[0]} in {pattern}")
    is_padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    for number in range(int(first), int(last) + 1):
        name = f"{pattern[: match.start()]}{number:0{width}}{pattern[match.end() :]}"
        yield from _expand(name, flag)


def _splits_among(folders: list[Path], flag: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        if (split := _split_of_folder(folder)) is None:
            continue
        if split in found:
            names = f"{found[split].name} and {folder.name}"
            raise ValueError(
                f"{flag}: expected one folder of {split} data, got {names} in {folder.parent}"
            )
        found[split] = folder
    return found


def _holds_data(folder: Path, endings: Sequence[str]) -> bool:
    """True if the folder of a split holds folders of classes, or data files."""
    return bool(visible_folders(folder)) or any(files_of(folder, ending) for ending in endings)


def _as_classes(path: Path, found: dict[str, Path], other: Path, flag: str) -> dict[str, Path]:
    """Return no splits if `path` is itself a split, whose classes are named like splits.

    Raises ValueError otherwise, for splits without classes beside other folders.
    """
    if found and not SPLIT.fullmatch(_words(path.resolve().name)):
        folder = next(iter(found.values()))
        raise ValueError(
            f"{flag}: expected folders of splits or folders of classes, "
            f"got both: {folder} without classes, beside {other.name}"
        )
    return {}


def _split_of_folder(folder: Path) -> str | None:
    split = split_of(folder.name)
    is_word = SPLIT.fullmatch(_words(folder.name)) is not None
    return split if split and (is_word or visible_folders(folder)) else None


def _words(name: str) -> str:
    """The name in lower case, with a space within TrainImages."""
    return CAPITAL_WITHIN.sub(" ", name).lower()
