"""Table of the arms against PGD-10 beside those against audited iterations, from rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.experiment.arms import STEPS_ARMS
from bench.experiment.table import Group, about, caption, groups_of, markdown, spread

Row = dict[str, Any]
ATTACKS = ("clean", "pgd-20", "pgd-50 x 10", "autoattack")
PAIRS = tuple(
    (name, name.replace("auto", "PGD-10")) for name in STEPS_ARMS if name.endswith("auto")
)


def steps_tables(rows: Iterable[Row]) -> str:
    """Accuracies of the last epoch, and paired differences with 95 % intervals over seeds."""
    parts = []
    for group in groups_of(rows):
        arms = [name for name in STEPS_ARMS if name in group.arms()]
        if not arms:
            continue
        heads = ["arm", "seeds", *ATTACKS, "iterations in the last epoch", "s / epoch"]
        lines = [_line(group, arm) for arm in arms]
        parts.append(caption(about(group)) + markdown(heads, lines))
        differences = [_differences(group, *pair) for pair in PAIRS]
        differences = [line for line in differences if any(line[1:])]
        if differences:
            words = (
                "auto minus PGD-10 at the last epoch in points, paired by seed: mean and 95 % "
                "interval of Student's t over seeds:"
            )
            lines = [[cell or "-" for cell in line] for line in differences]
            parts.append(caption(words) + markdown(["method", *ATTACKS], lines))
    return "\n".join(parts) or "Not measured yet.\n"


def _line(group: Group, arm: str) -> list[str]:
    trainings = group.trainings(arm).values()
    steps = sorted({row["steps_by_epoch"][-1] for row in trainings if "steps_by_epoch" in row})
    seconds = [row["seconds_per_epoch"] for row in trainings]
    return [
        arm,
        str(len(trainings)),
        *(spread(group.accuracies(arm, "last", attack)) for attack in ATTACKS),
        ", ".join(map(str, steps)) or "10",
        f"{statistics.median(seconds):.1f}" if seconds else "-",
    ]


def _differences(group: Group, auto: str, fixed: str) -> list[str]:
    cells = [auto.removesuffix(", auto")]
    for attack in ATTACKS:
        own, base = (group.accuracies(arm, "last", attack) for arm in (auto, fixed))
        cells.append(interval([100 * (own[seed] - base[seed]) for seed in own if seed in base]))
    return cells


def interval(differences: Sequence[float]) -> str:
    """Mean and 95 % interval of Student's t; the mean alone of one, nothing of none."""
    from scipy.stats import t

    if not differences:
        return ""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(t.ppf(0.975, len(differences) - 1)) * error
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"
