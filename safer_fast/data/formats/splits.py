"""Which files make which split: brace patterns, and what the names of files tell."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")
SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train(ing)?|val(id|idation)?|test(ing)?)(?![a-z])")
SPLITS = {"tr": "train", "va": "validation", "te": "test"}


def is_pattern(path: Path) -> bool:
    """Whether a path names many files, as in train-{000..099}.tar."""
    return RANGE.search(str(path)) is not None


def expand_pattern(pattern: Path, flag: str) -> list[Path]:
    """The files that a brace pattern names, the last range the fastest; padded as in a shell.

    Raises ValueError for a range that counts down and for the first file that is not there.
    """
    files = []
    for name in _expand(str(pattern), flag):
        file = Path(name)
        if not file.exists():
            raise ValueError(f"{flag}: expected all files of {pattern}, got no {file}")
        files.append(file)
    return files


def group_by_split(files: list[Path], flag: str) -> dict[str, list[Path]]:
    """The splits that the file names tell, or all of it where no name tells one."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        match = SPLIT_IN_NAME.search(file.stem.lower())
        groups[SPLITS[match[0][:2]] if match else "all"].append(file)
    if "all" in groups and len(groups) > 1:
        raise ValueError(
            f"{flag}: expected train, val or test in the name of every file or of none, "
            f"got {groups['all'][0]}"
        )
    return dict(groups)


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
