"""Map of a model's layers: by depth and kind, coloured by score, selected ones marked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from safer_fast.runs.figures.canvas import GRID, INK, MUTED, PAGE, RUN_COLOURS, new_axes, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_LAYER_IN_BLOCK = re.compile(
    r"(?:\w+\.(?P<stage>\d{1,4})\.)?blocks\.(?P<block>\d{1,4})\.(?P<kind>.+)"
)
_LAYER_IN_STAGE = re.compile(r"\w+\.(?P<stage>\d{1,4})\..+")
_KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_OTHER = "other"
_IN, _OUT = -1, 1_000_000  # as stages: before the first one and after the last one
_REDUCTION = -1  # as block: before the first one of its stage
Depth = tuple[int, int]  # stage and block; a plain ViT is one stage


def draw_layer_map(
    scores: Mapping[str, float | None],
    selected: Sequence[str],
    *,
    limits: tuple[float, float],
    title: str,
) -> Figure:
    """Layers by depth (columns) and kind (rows), coloured by score; chosen ones carry a dot."""
    cells = _cells(scores)
    places = sorted({place for place, _ in cells.values()})
    kinds = sorted({kind for _, kind in cells.values()}, key=_kind_order)
    grid = [[float("nan")] * len(places) for _ in kinds]
    for name, (place, kind) in cells.items():
        score = scores[name]
        grid[kinds.index(kind)][places.index(place)] = float("nan") if score is None else score
    dots = [cells[name] for name in selected if name in cells]
    figure, axes = new_axes(0.75 + 0.24 * len(kinds))
    axes.set_title(title, loc="left", fontsize=9, color=INK, parse_math=False)
    mesh = axes.pcolormesh(grid, cmap=_colours(), edgecolors=PAGE, linewidth=1.2)
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
    bar.locator = ticks(3)
    bar.ax.tick_params(color=GRID, labelcolor=MUTED, labelsize=8)
    return figure


def score_limits(scores: Sequence[Mapping[str, float | None]]) -> tuple[float, float]:
    """The range of colours that all maps of a run share; the top twentieth of scores is clipped."""
    values = sorted(score for by_name in scores for score in by_name.values() if score is not None)
    if not values:
        return 0.0, 1.0
    low, high = values[0], values[int(0.95 * (len(values) - 1))]
    return (low, high) if high > low else (low, low + 1e-12)


def draw_choices(selections: Mapping[int, Sequence[str]], *, title: str) -> Figure:
    """Layers that were ever selected (rows, by depth) by epoch of selection (columns)."""
    names = sorted({name for chosen in selections.values() for name in chosen}, key=_depth)
    grid = [
        [0.0 if name in chosen else float("nan") for chosen in selections.values()]
        for name in names
    ]
    figure, axes = new_axes(0.75 + 0.19 * len(names))
    axes.set_title(title, loc="left", fontsize=9, color=INK, parse_math=False)
    axes.pcolormesh(grid, cmap=_one_colour(), edgecolors=PAGE, linewidth=1.2)
    places = range(0, len(selections), 1 + (len(selections) - 1) // 12)
    epochs = list(selections)
    axes.set_xticks([place + 0.5 for place in places], [str(epochs[place]) for place in places])
    axes.set_yticks(
        [index + 0.5 for index in range(len(names))], names, fontsize=8, parse_math=False
    )
    axes.grid(axis="y", color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("epoch of the selection", color=MUTED)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    return figure


def _depth(name: str) -> tuple[Depth, tuple[int, str], str]:
    place, kind = _cell(name)
    return place, _kind_order(kind), name


def _one_colour() -> Colormap:
    from matplotlib.colors import ListedColormap

    return ListedColormap([RUN_COLOURS[0]])


def _label_cells(axes: Axes, places: Sequence[Depth], kinds: Sequence[str]) -> None:
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


def _cells(names: Iterable[str]) -> dict[str, tuple[Depth, str]]:
    """A cell of the map, place in depth and kind, for each layer; no two share one."""
    cells: dict[str, tuple[Depth, str]] = {}
    for name in names:
        (stage, block), kind = _cell(name)
        while ((stage, block), kind) in cells.values():
            block += 1
        cells[name] = ((stage, block), kind)
    return cells


def _cell(name: str) -> tuple[Depth, str]:
    if found := _LAYER_IN_BLOCK.fullmatch(name):
        return (int(found["stage"] or 0), int(found["block"])), found["kind"]
    if found := _LAYER_IN_STAGE.fullmatch(name):
        return (int(found["stage"]), _REDUCTION), _OTHER
    return (_IN if name.startswith(("patch_embed", "stem")) else _OUT, 0), _OTHER


def _kind_order(kind: str) -> tuple[int, str]:
    if kind == _OTHER:
        return len(_KINDS) + 1, kind
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS)), kind


def _place_label(place: Depth) -> str:
    stage, block = place
    if stage in (_IN, _OUT):
        return "in" if stage == _IN else "out"
    return "\N{DOWNWARDS ARROW}" if block == _REDUCTION else str(block)
