"""The drawings of the report, curves over epochs and maps of the layers, as SVG for its page.

matplotlib draws with stand-in colours; they become CSS variables of the page, so that one drawing
serves light, dark and paper. It is imported on first use and never touches pyplot.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

# Okabe and Ito's colours, told apart by colour-blind readers; the page defines --run-0 to --run-6.
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8d")
_INK, _MUTED, _GRID, _PAGE = "#010203", "#040506", "#070809", "#fdfcfb"
_VARIABLES = {colour: f"--run-{index}" for index, colour in enumerate(RUN_COLOURS)} | {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _PAGE: "--page",
}
_WIDTH, _HEIGHT = 4.8, 2.7  # inches: 346 points, so that text stays readable on a phone
_LAYER_IN_BLOCK = re.compile(
    r"(?:\w+\.(?P<stage>\d{1,4})\.)?blocks\.(?P<block>\d{1,4})\.(?P<kind>.+)"
)
_LAYER_IN_STAGE = re.compile(r"\w+\.(?P<stage>\d{1,4})\..+")
_KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_OTHER = "other"
_IN, _OUT = -1, 1_000_000  # as stages: before the first one and after the last one
_REDUCTION = -1  # as block: before the first one of its stage
Place = tuple[int, int]  # stage and block; a plain ViT is one stage


@dataclass(frozen=True)
class Curve:
    """One line of a drawing: a value per epoch, None where it was not measured."""

    epochs: Sequence[int]
    values: Sequence[float | None]
    run: int
    is_dashed: bool = False

    def points(self) -> dict[int, float]:
        """The measured values by epoch."""
        pairs = zip(self.epochs, self.values, strict=True)
        return {epoch: value for epoch, value in pairs if value is not None}


@dataclass(frozen=True)
class Gap:
    """The area to shade between two curves of a run, from epoch `since` on."""

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
    is_share: bool = False,
) -> str:
    """The curves over epochs as SVG; `marks` are epochs with a vertical line, shares show as %."""
    figure, axes = _new_figure(_HEIGHT)
    for gap in gaps:
        _shade(axes, gap)
    for mark in marks:
        axes.axvline(mark, color=_MUTED, linewidth=0.8, linestyle=":", zorder=1)
    for curve in curves:
        _draw_curve(axes, curve)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.xaxis.set_major_locator(_ticks(9, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", color=_MUTED)
    if is_share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    values = [value for curve in curves for value in curve.points().values()]
    if min(values, default=0.0) >= 0:
        axes.set_ylim(0, 1.06 * max(values, default=0.0) or 1.0)
    return _svg(figure, identity, title)


def draw_layer_map(
    scores: Mapping[str, float | None],
    selected: Sequence[str],
    *,
    limits: tuple[float, float],
    identity: str,
    title: str,
) -> str:
    """Layers by depth (columns) and kind (rows), coloured by score; chosen ones carry a dot."""
    cells = _cells(scores)
    places = sorted({place for place, _ in cells.values()})
    kinds = sorted({kind for _, kind in cells.values()}, key=_kind_order)
    grid = [[float("nan")] * len(places) for _ in kinds]
    for name, (place, kind) in cells.items():
        score = scores[name]
        grid[kinds.index(kind)][places.index(place)] = float("nan") if score is None else score
    dots = [cells[name] for name in selected if name in cells]
    figure, axes = _new_figure(0.75 + 0.24 * len(kinds))
    axes.set_title(title, loc="left", fontsize=9, color=_INK, parse_math=False)
    mesh = axes.pcolormesh(grid, cmap=_colours(), edgecolors=_PAGE, linewidth=1.2)
    mesh.set_clim(*limits)
    columns = [places.index(place) + 0.5 for place, _ in dots]
    rows = [kinds.index(kind) + 0.5 for _, kind in dots]
    axes.plot(columns, rows, "o", markersize=5.5, color="#ffffff", markeredgecolor="#000000")
    _label_cells(axes, places, kinds)
    is_clipped = any(score is not None and score > limits[1] for score in scores.values())
    bar = figure.colorbar(mesh, ax=axes, extend="max" if is_clipped else "neither", pad=0.02)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")  # no seams between the levels
    bar.locator = _ticks(3)
    bar.ax.tick_params(color=_GRID, labelcolor=_MUTED, labelsize=8)
    return _svg(figure, identity, title)


def score_limits(scores: Sequence[Mapping[str, float | None]]) -> tuple[float, float]:
    """The range of colours that all maps of a run share; the top twentieth of scores is clipped."""
    values = sorted(score for by_name in scores for score in by_name.values() if score is not None)
    if not values:
        return 0.0, 1.0
    low, high = values[0], values[int(0.95 * (len(values) - 1))]
    return (low, high) if high > low else (low, low + 1e-12)


def _new_figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(color=_GRID, labelcolor=_MUTED, labelsize=9, length=3)
    return figure, axes


def _draw_curve(axes: Axes, curve: Curve) -> None:
    points = curve.points()
    axes.plot(
        list(points),
        list(points.values()),
        color=RUN_COLOURS[curve.run % len(RUN_COLOURS)],
        linewidth=1.8,
        linestyle=(0, (3, 1.5)) if curve.is_dashed else "-",
        marker="o" if len(points) <= 2 else None,
        markersize=4,
    )


def _shade(axes: Axes, gap: Gap) -> None:
    upper, lower = gap.upper.points(), gap.lower.points()
    epochs = sorted(epoch for epoch in upper.keys() & lower.keys() if epoch >= gap.since)
    axes.fill_between(
        epochs,
        [upper[epoch] for epoch in epochs],
        [lower[epoch] for epoch in epochs],
        color=RUN_COLOURS[gap.upper.run % len(RUN_COLOURS)],
        alpha=0.18,
        linewidth=0,
    )


def _label_cells(axes: Axes, places: Sequence[Place], kinds: Sequence[str]) -> None:
    labels = [_place_label(place) for place in places]
    if len(places) > 16:
        labels = ["" if label.isdigit() and int(label) % 2 else label for label in labels]
    axes.set_xticks([index + 0.5 for index in range(len(places))], labels, fontsize=8)
    axes.set_yticks(
        [index + 0.5 for index in range(len(kinds))], kinds, fontsize=8, parse_math=False
    )
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)


def _colours() -> Colormap:
    """Cividis, even for colour-blind readers, in few enough levels to stay a vector drawing."""
    import matplotlib

    return matplotlib.colormaps["cividis"].resampled(32)


def _ticks(most: int, **options: Any) -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, **options)


def _cells(names: Iterable[str]) -> dict[str, tuple[Place, str]]:
    """A cell of the map, place in depth and kind, for each layer; no two share one."""
    cells: dict[str, tuple[Place, str]] = {}
    for name in names:
        (stage, block), kind = _cell(name)
        while ((stage, block), kind) in cells.values():
            block += 1
        cells[name] = ((stage, block), kind)
    return cells


def _cell(name: str) -> tuple[Place, str]:
    if found := _LAYER_IN_BLOCK.fullmatch(name):
        return (int(found["stage"] or 0), int(found["block"])), found["kind"]
    if found := _LAYER_IN_STAGE.fullmatch(name):
        return (int(found["stage"]), _REDUCTION), _OTHER
    return (_IN if name.startswith(("patch_embed", "stem")) else _OUT, 0), _OTHER


def _kind_order(kind: str) -> tuple[int, str]:
    if kind == _OTHER:
        return len(_KINDS) + 1, kind
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS)), kind


def _place_label(place: Place) -> str:
    stage, block = place
    if stage in (_IN, _OUT):
        return "in" if stage == _IN else "out"
    return "\N{DOWNWARDS ARROW}" if block == _REDUCTION else str(block)


def _svg(figure: Figure, identity: str, title: str) -> str:
    """The drawing as one <svg> element that scales with its column; ids begin with `identity`."""
    import matplotlib

    buffer = io.StringIO()
    with (
        matplotlib.rc_context(
            {"svg.fonttype": "none", "svg.hashsalt": identity, "text.parse_math": False}
        ),
        warnings.catch_warnings(),
    ):
        # a browser has the letters that matplotlib's font lacks
        warnings.simplefilter("ignore", UserWarning)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r' id="', f' id="{identity}-', drawing)
    drawing = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{identity}-", drawing)
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable})")
    width_and_height = re.compile(r'width="[\d.]+pt" height="[\d.]+pt"')
    label = f'role="img" aria-label="{escape(title)}"'
    return width_and_height.sub(lambda _: label, drawing, count=1)
