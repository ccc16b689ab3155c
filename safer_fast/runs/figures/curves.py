"""Drawings of the report: curves over epochs or steps, and the time of a step by its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safer_fast.runs.figures.canvas import (
    ALARM,
    GRID,
    INK,
    MUTED,
    PAGE,
    RUN_COLOURS,
    as_svg,
    new_axes,
    ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 2.7  # inches
_LONGEST_NAME = 18  # letters of a run's name beside its bar


@dataclass(frozen=True)
class Curve:
    """One line of a drawing: a value per epoch or step, None where it was not measured."""

    epochs: Sequence[int]
    values: Sequence[float | None]
    run: int
    is_dashed: bool = False
    opacity: float = 1.0

    def points(self) -> dict[int, float]:
        """The measured values by epoch."""
        pairs = zip(self.epochs, self.values, strict=True)
        return {epoch: value for epoch, value in pairs if value is not None}


@dataclass(frozen=True)
class Gap:
    """The area to shade where one curve of a run is above another, from epoch `since` on."""

    upper: Curve
    lower: Curve
    since: float = 0


def draw_curves(
    curves: Sequence[Curve],
    *,
    identity: str,
    title: str,
    gaps: Sequence[Gap] = (),
    marks: Sequence[int] = (),
    alarms: Sequence[int] = (),
    is_share: bool = False,
    across: str = "epoch",
) -> str:
    """The curves over `across` as SVG; shares show as %.

    marks: where a vertical line stands. alarms: what is shaded in the colour of trouble.
    """
    figure, axes = new_axes(_HEIGHT)
    for gap in gaps:
        _shade(axes, gap, alpha=max(0.06, 0.2 / len(gaps)))
    for alarm in alarms:
        axes.axvspan(alarm - 0.5, alarm + 0.5, color=ALARM, alpha=0.35, linewidth=0, zorder=0)
    for mark in marks:
        axes.axvline(mark, color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
    for curve in curves:
        _draw_curve(axes, curve)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.xaxis.set_major_locator(ticks(9, integer=True, min_n_ticks=1))
    axes.set_xlabel(across, color=MUTED)
    if is_share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    values = [value for curve in curves for value in curve.points().values()]
    if min(values, default=0.0) >= 0:
        axes.set_ylim(0, 1.06 * max(values, default=0.0) or 1.0)
    return as_svg(figure, identity, title)


def draw_areas(
    epochs: Sequence[int], layers: Mapping[str, Sequence[float]], *, identity: str, title: str
) -> str:
    """Milliseconds of each layer by epoch, one upon the other, as SVG; a step for each epoch."""
    figure, axes = new_axes(_HEIGHT)
    edges = [epoch + side for epoch in epochs for side in (-0.5, 0.5)]
    lower = [0.0] * len(epochs)
    for index, values in enumerate(layers.values()):
        upper = [below + value for below, value in zip(lower, values, strict=True)]
        low, high = ([value for value in line for _ in (0, 1)] for line in (lower, upper))
        axes.fill_between(edges, low, high, color=_colour(index), linewidth=0)
        lower = upper
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.xaxis.set_major_locator(ticks(9, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", color=MUTED)
    axes.set_axisbelow(True)
    axes.set_ylabel("ms per step", color=MUTED)
    axes.set_ylim(0, 1.06 * max(lower, default=0.0) or 1.0)
    axes.margins(x=0)
    return as_svg(figure, identity, title)


def draw_bars(
    names: Sequence[str], layers: Mapping[str, Sequence[float]], *, identity: str, title: str
) -> str:
    """Milliseconds of each layer as parts of one bar for each name, as SVG."""
    figure, axes = new_axes(0.75 + 0.34 * len(names))
    left = [0.0] * len(names)
    for index, values in enumerate(layers.values()):
        axes.barh(range(len(names)), values, 0.7, left, color=_colour(index), edgecolor=PAGE)
        left = [start + value for start, value in zip(left, values, strict=True)]
    labels = [_shortened(name) for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8, color=INK, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("ms per step", color=MUTED)
    axes.set_xlim(0, 1.06 * max(left, default=0.0) or 1.0)
    return as_svg(figure, identity, title)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    points = curve.points()
    axes.plot(
        list(points),
        list(points.values()),
        color=_colour(curve.run),
        alpha=curve.opacity,
        linewidth=1.8,
        linestyle=(0, (3, 1.5)) if curve.is_dashed else "-",
        marker="o" if len(points) <= 2 else None,
        markersize=4,
    )


def _shade(axes: Axes, gap: Gap, alpha: float) -> None:
    upper, lower = gap.upper.points(), gap.lower.points()
    epochs = sorted(epoch for epoch in upper.keys() & lower.keys() if epoch >= gap.since)
    axes.fill_between(
        epochs,
        [upper[epoch] for epoch in epochs],
        [lower[epoch] for epoch in epochs],
        where=[upper[epoch] >= lower[epoch] for epoch in epochs],
        interpolate=True,
        color=_colour(gap.upper.run),
        alpha=alpha,
        linewidth=0,
    )


def _colour(index: int) -> str:
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    return "\N{HORIZONTAL ELLIPSIS}" + name[1 - _LONGEST_NAME :]
