"""The tables of an experiment, from its rows alone: accuracies, differences, layers."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.experiment.arms import ARMS, BASELINE, SCALES, STEPS_ARMS
from bench.experiment.tasks import ID_FIELDS, PEAK, STARTS

Row = dict[str, Any]
Values = dict[int, float]
"""A figure of one arm by seed."""
REFERENCE = ("start", BASELINE, "SAFER")
"""Arms that stand in both tables."""


@dataclass(frozen=True)
class Group:
    """The rows of one experiment, model and start, of several measurements the newest."""

    case: str
    model: str
    start: str
    start_id: str
    rows: Sequence[Row]

    def arms(self) -> list[str]:
        """Names of the arms that were trained, and `start`."""
        return list(dict.fromkeys(row["arm"] for row in self.rows if row["task"] != "select"))

    def accuracies(self, arm: str, weights: str, attack: str, split: str = "test") -> Values:
        """Accuracies of an arm; those of the start are of the weights that it is."""
        wanted = {"arm": arm, "weights": weights, "attack": attack, "split": split}
        rows = _chosen(self.rows, {"figure": "accuracy", **wanted})
        return {row["seed"]: row["accuracy"] for row in rows}

    def gaps(self, arm: str, weights: str) -> Values:
        """Training minus validation PGD-20 accuracy."""
        train, held = (
            self.accuracies(arm, weights, "pgd-20", split) for split in ("train", "validation")
        )
        return {seed: train[seed] - held[seed] for seed in train if seed in held}

    def trainings(self, arm: str) -> dict[int, Row]:
        """The rows on how the runs of an arm went, by seed."""
        rows = _chosen(self.rows, {"figure": "training", "arm": arm})
        return {row["seed"]: row for row in rows}


def all_groups_of(rows: Iterable[Row]) -> list[Group]:
    """Rows by experiment, model, kind of start and training of the start, the newest first."""
    rows = sorted((r for r in rows if r["task"] != "search"), key=lambda row: row["date"])
    names = ("case", "model", "start", "start_id")
    trained = [row for row in rows if row["task"] == "arm"]
    groups = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in reversed(trained)):
        case, model, start, start_id = key
        arms = [row for row in rows if tuple(row[name] for name in names) == key]
        found = {_figure(row): row for row in arms if row["arm"] != "start"}
        own = [row for row in rows if row["arm"] == "start" and row["task"] != "select"]
        same = {"case": case, "model": model}
        starts = [_as_start(row, start, start_id) for row in _chosen(own, same)]
        found |= {_figure(row): row for row in starts if row}
        groups.append(Group(case, model, start, start_id, list(found.values())))
    return groups


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """The groups of each start's newest training, sorted by case, model and start."""
    found: dict[tuple[str, ...], Group] = {}
    for group in all_groups_of(rows):
        found.setdefault((group.case, group.model, group.start), group)
    return sorted(found.values(), key=lambda group: (group.case, group.model, group.start != PEAK))


def experiment_tables(rows: Iterable[Row]) -> str:
    """Tables of accuracies and differences to PGD-AT for each experiment, model and start."""
    groups = [group for group in groups_of(rows) if set(group.arms()) & set(ARMS)]
    return "\n".join(_both(group, [*ARMS]) for group in groups if not _is_fixed(group))


def earlier_tables(rows: Iterable[Row]) -> str:
    """Tables from earlier trainings of a start, and differences over all its trainings."""
    rows = list(rows)
    newest = {group.start_id for group in groups_of(rows)}
    groups = all_groups_of(rows)
    earlier = [group for group in groups if group.start_id not in newest]
    parts = [_both(group, [*ARMS]) for group in earlier]
    for kind in dict.fromkeys((group.case, group.model, group.start) for group in earlier):
        alike = [group for group in groups if (group.case, group.model, group.start) == kind]
        counts = Counter(arm for group in alike for arm in group.arms())
        common = [arm for arm in ARMS if counts[arm] > 1 and arm != BASELINE]
        lines = [_difference_line(alike, arm) for arm in common]
        words = f"{', '.join(kind)} start: {len(alike)} trainings of it together. {DIFFERENCES}"
        parts.append(caption(words) + _differences([line for line in lines if any(line[1:])]))
    return "\n".join(parts) or "None.\n"


def sensitivity_tables(rows: Iterable[Row]) -> str:
    """Tables of SAFER with one setting changed, beside SAFER and PGD-AT."""
    parts = []
    for group in groups_of(rows):
        others = {*ARMS, *STEPS_ARMS, "start"}
        names = [name for name in group.arms() if name not in others]
        if names and not _is_fixed(group):
            parts.append(_both(group, [BASELINE, "SAFER", *names]))
    return "\n".join(parts) or "Not measured yet.\n"


def selection_tables(rows: Iterable[Row]) -> str:
    """Tables of the layers that each criterion selects of the starts."""
    parts = []
    for row in {_figure(row): row for row in rows if row["figure"] == "selection"}.values():
        lines = [
            [name, _layers(found["selected"]), _layers(list(found["scores"])[:6])]
            for name, found in row["criteria"].items()
        ]
        words = (
            f"{row['case']}: {row['model']}, {row['start']} start; {row['images']} training images "
            f"under {row['attack']}, rho {row['rho']:g}:"
        )
        heads = ["criterion", "selects", "from the highest score on"]
        parts.append(caption(words) + markdown(heads, lines))
    return "\n".join(parts) or "Not measured yet.\n"


def choice_tables(rows: Iterable[Row]) -> str:
    """Tables of the layers that each arm selected while it trained, by training of a start."""
    rows = list(rows)
    searches = [row | {"task": "arm"} for row in rows if row["task"] == "search"]
    groups = [(group, "") for group in all_groups_of(rows)]
    groups += [(group, ", search") for group in all_groups_of(searches)]
    parts = []
    for group, what in groups:
        lines = []
        for arm in group.arms():
            for seed, training in sorted(group.trainings(arm).items()):
                chosen = [
                    f"{each['epoch']}: {_layers(each['selected'])} (suffix from {each['cut']})"
                    for each in training["selections"]
                ]
                if chosen:
                    lines.append([arm, str(seed), "; ".join(chosen)])
        words = f"{group.case}{what}: {group.model}, from the {group.start} start {group.start_id}:"
        if lines:
            heads = ["arm", "seed", "epoch: layers (lowest block that is trained)"]
            parts.append(caption(words) + markdown(heads, lines))
    return "\n".join(parts) or "Not measured yet.\n"


def _is_fixed(group: Group) -> bool:
    """True for the rows of a comparison that was fixed in advance: it has a table of its own."""
    scale = SCALES.get(group.case)
    return scale is not None and bool(scale.compared)


def _both(group: Group, names: Sequence[str]) -> str:
    shown = [name for name in ["start", *names] if name in group.arms()]
    accuracies = [_line(group, arm) for arm in shown]
    heads = ["arm", "seeds", "clean", "PGD-20", "AutoAttack", "clean", "PGD-20", "gap", "s / epoch"]
    heads = [
        f"{title}, {weights}" if weights else title
        for title, weights in zip(
            heads, ("", "", "best", "best", "best", "last", "last", "last", ""), strict=True
        )
    ]
    parts = [caption(about(group)) + markdown(heads, accuracies)]
    lines = [_difference_line([group], arm) for arm in shown if arm not in ("start", BASELINE)]
    lines = [line for line in lines if any(line[1:])]
    if lines:
        parts.append(caption(DIFFERENCES) + _differences(lines))
    return "\n".join(parts)


def _differences(lines: Sequence[Sequence[str]]) -> str:
    heads = ["minus PGD-AT", "clean, best", "PGD-20, best", "clean, last", "PGD-20, last"]
    return markdown(heads, [[cell or "-" for cell in line] for line in lines])


AUGMENTATION = {"crop": "random crop and flip", "none": "no augmentation"}
DIFFERENCES = (
    "Differences to PGD-AT in points, paired by seed and start: mean, standard deviation, and p of "
    "a two-sided paired t-test where there are two seeds or more (not corrected for the number of "
    "comparisons):"
)


def _line(group: Group, arm: str) -> list[str]:
    """Accuracies in percent: means and standard deviations over seeds."""

    def cell(weights: str, attack: str) -> str:
        return spread(group.accuracies(arm, weights, attack))

    trainings = group.trainings(arm)
    seconds = [row["seconds_per_epoch"] for row in trainings.values()]
    return [
        arm,
        str(len(trainings)) if arm != "start" else "-",
        *(cell("best", attack) for attack in ("clean", "pgd-20", "autoattack")),
        *(cell("last", attack) for attack in ("clean", "pgd-20")),
        spread(group.gaps(arm, "last")),
        f"{statistics.median(seconds):.1f}" if seconds else "-",
    ]


def _difference_line(groups: Sequence[Group], arm: str) -> list[str]:
    """An arm's name and differences; empty where nothing can be paired."""
    cells = [arm]
    for weights in ("best", "last"):
        for attack in ("clean", "pgd-20"):
            pairs = []
            for group in groups:
                own, base = (group.accuracies(a, weights, attack) for a in (arm, BASELINE))
                pairs += [(own[seed], base[seed]) for seed in sorted(own) if seed in base]
            cells.append(paired(pairs) if pairs else "")
    return cells


def paired(pairs: Sequence[tuple[float, float]]) -> str:
    """Mean difference of pairs in points, its standard deviation, p of the paired t-test."""
    from scipy.stats import ttest_1samp

    differences = [100 * (first - second) for first, second in pairs]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}"
    deviation = statistics.stdev(differences)
    if deviation == 0:
        return f"{mean:+.1f} ± 0.0"
    p = float(ttest_1samp(differences, 0).pvalue)
    return f"{mean:+.1f} ± {deviation:.1f} (p {p:.2g})"


def spread(values: Mapping[int, float]) -> str:
    percents = [100 * value for value in values.values()]
    if not percents:
        return "-"
    mean = f"{statistics.mean(percents):.1f}"
    return mean if len(percents) < 2 else f"{mean} ± {statistics.stdev(percents):.1f}"


def about(group: Group) -> str:
    """A paragraph with what the figures depend on: data, attack, machine, date."""
    trainings = [row for row in group.rows if row["figure"] == "training" and row["arm"] != "start"]
    tests = _chosen(group.rows, {"figure": "accuracy", "split": "test", "attack": "pgd-20"})
    library = _chosen(group.rows, {"figure": "accuracy", "attack": "autoattack"})
    first, test = trainings[0], tests[0]
    against = " or ".join(
        f"PGD-{steps}" for steps in sorted({str(r["attack_steps"]) for r in trainings})
    )
    starts = group.trainings("start").values()
    days = sorted({row["date"][:10] for row in group.rows})
    hours = sum(row["seconds"] for row in [*trainings, *starts]) / 3600
    words = [
        f"**{group.case}, {group.model}** ({first['num_weights']:,} weights), from the",
        f"{group.start} start",
        *(f"(epoch {_start_epoch(row, group.start)} of its training)" for row in starts),
        f"for {first['num_epochs']} epochs on {first['num_train_images']:,} images of CIFAR-10,",
        f"pixels in [0, 1] at 32 x 32, {AUGMENTATION[first['augmentation']]}; trained against",
        f"{against}, Linf, epsilon {255 * test['epsilon']:.0f}/255.",
        f"Accuracies in % on {test['num_images']:,} test images (PGD-20 from one random start"
        + (f"; AutoAttack on {library[0]['num_images']:,})," if library else "),"),
        "best epoch by PGD on validation images, and last; mean and standard deviation over seeds;",
        "gap: PGD-20 accuracy on training minus validation images, points.",
        f"{first['device']} for each run, torch {first['torch']};",
        f"{hours:.1f} hours of training; {' to '.join(sorted({days[0], days[-1]}))}:",
    ]
    return " ".join(words)


def _start_epoch(row: Row, start: str) -> int:
    return int(row["best_epoch"] if start == "peak" else row["num_epochs"])


def _as_start(row: Row, start: str, start_id: str) -> Row | None:
    """A row of the start as one of this start's group: its weights are the best and the last."""
    if row["task"] != "start":
        is_same = row["start"] == start and row["start_id"] == start_id
    else:
        is_same = row.get(ID_FIELDS[start]) == start_id
    if not is_same or row["figure"] != "accuracy":
        return row if is_same and row["task"] == "start" else None
    return row | {"weights": "best"} if row["weights"] == STARTS[start] else None


def _figure(row: Row) -> tuple[object, ...]:
    """The fields that identify a figure: rows with equal ones are measurements of the same."""
    names = ("case", "model", "start", "figure", "arm", "seed", "weights", "split", "attack")
    start = "" if row["task"] == "start" else row["start"]
    return tuple(start if name == "start" else row.get(name) for name in names)


def _chosen(rows: Iterable[Row], wanted: Mapping[str, object]) -> list[Row]:
    return [row for row in rows if all(row.get(k) == value for k, value in wanted.items())]


def _layers(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def caption(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False) + "\n\n"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |\n" for cells in [heads, *lines]]
    return "".join([rows[0], f"|{'---|' * len(heads)}\n", *rows[1:]])
