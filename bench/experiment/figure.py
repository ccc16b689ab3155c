"""The picture of an experiment: `python -m bench.experiment.figure --scale reduced FILE.svg`.

Left: robust accuracy on validation images, epoch by epoch, of the shared start and of the main
arms trained from it; thin lines are on training images. Right: every arm's clean and PGD-20
accuracy on test images, of its best epoch, with standard deviations over seeds; names stand at the
side in the order of robust accuracy. A comparison that was fixed in advance shows the last epoch
and AutoAttack, which decide it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.experiment.arms import ARMS, MAIN, SCALES
from bench.experiment.compared_table import BASELINES
from bench.experiment.table import Group, groups_of
from bench.experiment.tasks import RESULTS, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8d")
START_COLOUR = "#444444"
WIDTH, HEIGHT = 11.0, 4.2  # inches of one row


def main() -> None:
    """Draw the figure into the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="what is written: .svg or .png")
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="where the rows are")
    arguments = parser.parse_args()
    rows = [row for row in read_rows(arguments.rows) if row["case"] == arguments.scale]
    groups = [group for group in groups_of(rows) if set(group.arms()) & set(ARMS)]
    if not groups:
        expected = f"rows of arms of {arguments.scale} in {arguments.rows}"
        parser.error(f"--scale: expected {expected}, got none that are drawn")
    draw(groups, arguments.file)


def draw(groups: Sequence[Group], file: Path) -> None:
    """Draw a row of two figures for each model and start, as SVG or PNG by the file's ending."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT * len(groups)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for group, (left, right) in zip(groups, axes, strict=True):
        shown = _shown(group)
        _curves(group, shown, left)
        _accuracies(group, shown, right)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "experiment"}):
        nothing: dict[str, Any] = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, metadata=nothing)


@dataclass(frozen=True)
class _Shown:
    """The arms of a group that have curves and those that have points, and what is at a point.

    Colours are given out in the order of `arms`, which begins with those of `curves`.
    """

    curves: Sequence[str]
    arms: Sequence[str]
    weights: str = "best"
    attack: str = "pgd-20"
    attack_title: str = "PGD-20"

    def colours(self) -> dict[str, str]:
        return dict(zip(self.arms, itertools.cycle(COLOURS), strict=False))


def _shown(group: Group) -> _Shown:
    scale, trained = SCALES.get(group.case), group.arms()

    def those_of(names: Iterable[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if name in trained]

    if scale is None or not scale.compared:
        return _Shown(those_of(MAIN), those_of(ARMS))
    curves = those_of([*BASELINES, "SAFER", scale.compared[-1]])
    arms = those_of([*curves, *scale.compared])
    return _Shown(curves, arms, "last", "autoattack", "AutoAttack")


def _curves(group: Group, shown: _Shown, axes: Axes) -> None:
    offset, colours = 0, shown.colours()
    for training in group.trainings("start").values():
        curves = training["curves"]
        offset = training["best_epoch"] if group.start == "peak" else training["num_epochs"]
        for name, width in (("robust_accuracy", 1.6), ("train_robust_accuracy", 0.7)):
            values = [100 * value for value in curves[name]]
            label = "shared start" if name == "robust_accuracy" else None
            epochs = range(1, len(values) + 1)
            axes.plot(epochs, values, color=START_COLOUR, linewidth=width, label=label)
    axes.axvline(offset, color="#bbbbbb", linewidth=0.8, linestyle=":")
    for arm in shown.curves:
        trainings = list(group.trainings(arm).values())
        for name, width in (("robust_accuracy", 1.6), ("train_robust_accuracy", 0.7)):
            columns = zip(*(each["curves"][name] for each in trainings), strict=True)
            means = [100 * statistics.mean(column) for column in columns]
            epochs = range(offset + 1, offset + 1 + len(means))
            label = f"{arm} ({len(trainings)})" if name == "robust_accuracy" else None
            if means:
                axes.plot(epochs, means, color=colours[arm], linewidth=width, label=label)
    axes.set_title(f"{group.model}, from the {group.start} start: PGD accuracy, %", fontsize=10)
    axes.set_xlabel("epoch (thick: validation images, thin: training images)", fontsize=9)
    _plain(axes)
    axes.legend(frameon=False, fontsize=8)


def _accuracies(group: Group, shown: _Shown, axes: Axes) -> None:
    places: dict[str, tuple[float, float]] = {}
    colours = shown.colours() | {"start": START_COLOUR}
    for index, arm in enumerate(("start", *shown.arms)):
        weights = "best" if arm == "start" else shown.weights
        clean = group.accuracies(arm, weights, "clean")
        robust = group.accuracies(arm, weights, shown.attack)
        if not clean or not robust:
            continue
        place = 100 * statistics.mean(clean.values()), 100 * statistics.mean(robust.values())
        across, along = (
            100 * statistics.stdev(values.values()) if len(values) > 1 else 0.0
            for values in (clean, robust)
        )
        marker = "*" if arm == "start" else "o" if index <= len(COLOURS) else "s"
        style = {"color": colours[arm], "marker": marker, "linewidth": 0.8}
        axes.errorbar(*place, xerr=across, yerr=along, **style)
        places[arm] = place
    for index, arm in enumerate(sorted(places, key=lambda arm: places[arm][1])):
        axes.annotate(
            arm,
            places[arm],
            xytext=(1.03, (index + 0.5) / len(places)),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=8,
            color=colours[arm],
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": colours[arm],
                "linewidth": 0.4,
            },
        )
    axes.set_title(f"Test accuracy of the {shown.weights} epoch, %", fontsize=10)
    axes.set_xlabel("clean", fontsize=9)
    axes.set_ylabel(shown.attack_title, fontsize=9)
    axes.margins(0.05)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


if __name__ == "__main__":
    main()
