"""Tables of a comparison that was fixed in advance: the search before it, and its arms."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bench.experiment.arms import BASELINE, SCALES
from bench.experiment.table import (
    Group,
    Row,
    Values,
    about,
    caption,
    groups_of,
    markdown,
    spread,
)

BASELINES = (BASELINE, "PGD-AT, low rate")
"""The arms that differences are taken to."""
ATTACKS = ("clean", "pgd-20", "autoattack")
MOST_LOST = 0.005
"""Clean accuracy below that of PGD-AT that an arm of the search may have and still be chosen."""


class Found(NamedTuple):
    """Accuracies of an arm of the search on validation images, at its last epoch."""

    arm: str
    clean: float
    robust: float


def chosen(found: Sequence[Found]) -> str | None:
    """The arm with the best robust accuracy of those that keep PGD-AT's clean accuracy.

    Half a point less is kept too. Where none does: the arm with the highest sum of both. None
    before PGD-AT and another have been measured.
    """
    base = [each for each in found if each.arm == BASELINE]
    others = [each for each in found if each.arm != BASELINE]
    if not base or not others:
        return None
    kept = [each for each in others if each.clean >= base[0].clean - MOST_LOST]
    if kept:
        return max(kept, key=lambda each: each.robust).arm
    return max(others, key=lambda each: each.clean + each.robust).arm


def search_tables(rows: Iterable[Row]) -> str:
    """Accuracies of all arms of each search, on validation images; the chosen one is bold."""
    rows = [row for row in rows if row["task"] == "search"]
    parts = []
    for case in dict.fromkeys((row["case"], row["start_id"]) for row in rows):
        own = [row for row in rows if (row["case"], row["start_id"]) == case]
        found = _found(own)
        best = chosen(found)
        trained = next(row for row in own if row["figure"] == "training")
        images = next(row["num_images"] for row in own if row["figure"] == "accuracy")
        words = (
            f"{case[0]}: {trained['num_epochs']} epochs from the peak start, one seed; accuracies "
            f"in % on {images:,} validation images at the last epoch; what the rule chooses is "
            "bold:"
        )
        lines = [
            [
                f"**{each.arm}**" if each.arm == best else each.arm,
                f"{100 * each.clean:.1f}",
                f"{100 * each.robust:.1f}",
            ]
            for each in found
        ]
        parts.append(caption(words) + markdown(["arm", "clean", "PGD-20"], lines))
    return "\n".join(parts) or "Not measured yet.\n"


def compared_tables(rows: Iterable[Row]) -> str:
    """Accuracies of all arms, and paired differences to both baselines with Holm's p."""
    parts = []
    for group in groups_of(rows):
        scale = SCALES.get(group.case)
        if scale is None or not scale.compared:
            continue
        names = [name for name in ("start", *scale.compared) if name in group.arms()]
        heads = [f"{attack}, {w}" for w in ("best", "last") for attack in _heads()]
        lines = [_line(group, name) for name in names]
        heads = ["arm", "seeds", *heads, "gap, last", "s / epoch"]
        parts.append(caption(about(group)) + markdown(heads, lines))
        for base in BASELINES:
            others = [name for name in names if name not in ("start", base)]
            differences = _differences(group, others, base)
            if differences:
                words = (
                    f"Differences to {base} at the last epoch in points, paired by seed: mean and "
                    "standard deviation, and p of a two-sided paired t-test after Holm's "
                    "correction for all of this table:"
                )
                heads = [f"minus {base}", *_heads()]
                parts.append(caption(words) + markdown(heads, differences))
    return "\n".join(parts) or "Not measured yet.\n"


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number by Holm's step-down method (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _found(rows: Sequence[Row]) -> list[Found]:
    """Accuracies by arm, of several measurements the newest."""
    values: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        own = values.setdefault(row["arm"], {})
        if row["figure"] == "accuracy" and row["weights"] == "last":
            own[row["attack"]] = row["accuracy"]
    return [Found(arm, own["clean"], own["pgd-20"]) for arm, own in values.items()]


def _heads() -> list[str]:
    return ["clean", "PGD-20", "AutoAttack"]


def _line(group: Group, arm: str) -> list[str]:
    """Accuracies in percent: means and standard deviations over seeds."""
    trainings = group.trainings(arm)
    seconds = [row["seconds_per_epoch"] for row in trainings.values()]
    cells = [
        spread(group.accuracies(arm, weights, attack))
        for weights in ("best", "last")
        for attack in ATTACKS
    ]
    return [
        arm,
        str(len(trainings)) if arm != "start" else "-",
        *cells,
        spread(group.gaps(arm, "last")),
        f"{statistics.median(seconds):.1f}" if seconds else "-",
    ]


def _differences(group: Group, arms: Sequence[str], base: str) -> list[list[str]]:
    """A line for each arm that can be paired with `base`."""
    bases = {attack: group.accuracies(base, "last", attack) for attack in ATTACKS}
    points = {
        (arm, attack): _points(group.accuracies(arm, "last", attack), bases[attack])
        for arm in arms
        for attack in ATTACKS
    }
    tested = {key: _p(own) for key, own in points.items()}
    known = {key: p for key, p in tested.items() if p is not None}
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    lines = []
    for arm in arms:
        keys = [(arm, attack) for attack in ATTACKS]
        if any(points[key] for key in keys):
            lines.append([arm, *(_cell(points[key], corrected.get(key)) for key in keys)])
    return lines


def _points(own: Mapping[int, float], base: Values) -> list[float]:
    return [100 * (own[seed] - base[seed]) for seed in sorted(own) if seed in base]


def _p(points: Sequence[float]) -> float | None:
    """P of a t-test; None of fewer than two differences, or of equal ones."""
    from scipy.stats import ttest_1samp

    if len(points) < 2 or statistics.stdev(points) == 0:
        return None
    return float(ttest_1samp(points, 0).pvalue)


def _cell(points: Sequence[float], p: float | None) -> str:
    if not points:
        return "-"
    mean = f"{statistics.mean(points):+.1f}"
    if len(points) < 2:
        return mean
    cell = f"{mean} ± {statistics.stdev(points):.1f}"
    return cell if p is None else f"{cell} (p {p:.2g})"
