"""Two runs on the same images under the same attack: `python -m bench.studies.paired RUN OTHER`.

Both must have been evaluated (`python -m safer_fast.evaluate`): outcomes of single images lie in
their folders. Accuracies of two runs differ by chance in the draw of images. Most of that is the
same for both, so the difference image by image says more: its standard error comes from the images
that one run has right and the other has not (McNemar, 1947).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safer_fast.evaluation.store import file_digest
from safer_fast.runs.layout import RunFolder

DIGITS_OF_A_NAME = 16
Z = 1.959964


class Difference(NamedTuple):
    """RUN minus OTHER on `num_images` images: how many RUN alone has right, and OTHER alone."""

    num_images: int
    gained: int
    lost: int

    def points(self) -> tuple[float, float]:
        """The difference in points of accuracy, and half of its 95 % interval."""
        mean = (self.gained - self.lost) / self.num_images
        variance = (self.gained + self.lost) / self.num_images - mean**2
        return 100 * mean, 100 * Z * math.sqrt(variance / self.num_images)


def outcomes(folder: Path, attack: str) -> dict[str, bool]:
    """Right or not under an attack, by the names of the images, with the last weights of a run."""
    weights = file_digest(RunFolder(folder).weights("last"))
    found: dict[str, bool] = {}
    balls = set()
    for file in sorted((folder / "evaluation").glob("*.jsonl")):
        header, *lines = (json.loads(line) for line in file.read_text().splitlines())
        if header["attack"] == attack and header["judge"]["weights"] == weights:
            balls.add((header.get("norm"), header.get("epsilon"), header.get("restarts")))
            found.update(pair for line in lines for pair in _pairs(line))
    if len(balls) != 1:
        got = f"{len(balls)} of other balls or restarts" if balls else "none"
        raise SystemExit(f"{folder}: expected one evaluation under {attack}, got {got}")
    return found


def compare(run: dict[str, bool], other: dict[str, bool]) -> Difference:
    """The difference on the images that both have."""
    both = run.keys() & other.keys()
    gained = sum(run[name] and not other[name] for name in both)
    lost = sum(other[name] and not run[name] for name in both)
    return Difference(len(both), gained, lost)


def _pairs(line: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    names = line["names"]
    for place, right in enumerate(line["right"]):
        start = place * DIGITS_OF_A_NAME
        yield names[start : start + DIGITS_OF_A_NAME], right == "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--attacks", default="clean,pgd-20", help="separated by commas")
    given = parser.parse_args(arguments)
    for attack in given.attacks.split(","):
        found = compare(*(outcomes(folder, attack) for folder in (given.run, given.other)))
        if not found.num_images:
            raise SystemExit(
                f"{attack}: expected images that both runs were evaluated on, got none"
            )
        mean, half = found.points()
        print(
            f"{attack}: {mean:+.2f} ± {half:.2f} points, {found.gained} images gained and "
            f"{found.lost} lost of {found.num_images}"
        )


if __name__ == "__main__":
    main()
