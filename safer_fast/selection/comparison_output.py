"""Output of select: a row for each layer, a column for each criterion, and how they agree."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.config.checks import check_file, check_ranges
from safer_fast.config.commands import SelectConfig
from safer_fast.config.messages import shortened
from safer_fast.runtime.files import check_writable, write_whole
from safer_fast.runtime.terminal import aligned
from safer_fast.selection.comparison import CriteriaScores, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def score_table(scores: Mapping[str, Scores], selected: Mapping[str, Sequence[str]]) -> str:
    """Scores with their ranks, the first criterion's highest on top; * marks selected layers."""
    ranks = {name: _ranks(by_layer) for name, by_layer in scores.items()}
    order = next(iter(ranks.values()))
    rows = [["", *scores]]
    for layer in order:
        cells = (
            f"{by_layer[layer]:.3e} {ranks[name][layer]:>4}"
            f"{'*' if layer in selected[name] else ' '}"
            for name, by_layer in scores.items()
        )
        rows.append([f"{layer} ", *cells])
    return aligned(rows, gap=1, least=(0, 18))


def correlation_table(correlations: Mapping[str, Mapping[str, float | None]]) -> str:
    """Spearman's rank correlation of each criterion with each; - where all scores are equal."""
    rows = [["", *correlations]]
    for name, row in correlations.items():
        rows.append(
            [f"{name} ", *("-" if value is None else f"{value:.3f}" for value in row.values())]
        )
    return "rank correlation (Spearman)\n" + aligned(rows, gap=1, least=(0, 19))


def _ranks(scores: Scores) -> dict[str, int]:
    """The rank of each layer, 1 for the highest score; equal scores are ordered by name."""
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    return {name: place for place, name in enumerate(ranked, start=1)}


_LEFT_OUT = "random measures nothing and least-sharp is sharpness reversed: neither is compared"


def check_settings(config: SelectConfig) -> None:
    """Raise ValueError naming the first flag with a value that means nothing."""
    from safer_fast.selection.criteria import CRITERIA, check_criterion, compared_criteria

    check_ranges(config)
    if config.plot and not config.plot.endswith(FORMATS):
        raise ValueError(f"--plot: expected a .svg or .png file, got {shortened(config.plot)}")
    check_file(config.output, "--output")
    check_file(config.plot, "--plot")
    if not config.output or config.plot == "":
        check_writable(Path(config.run), "--output", "give a file elsewhere")
    check_criterion(config.criterion, "--criterion", list(CRITERIA))
    for name in config.criteria:
        check_criterion(name, "--criteria", compared_criteria())
    if Path(config.run).is_file():
        raise ValueError(
            f"RUN: expected a run folder, got {config.run}: weights alone do not say which data "
            "the layers are scored on"
        )


def with_plot_file(words: Sequence[str]) -> list[str]:
    """The words with `--plot` alone as `--plot=`: a file that it may name has a known ending."""
    return [
        "--plot=" if word == "--plot" and not following.endswith(FORMATS) else word
        for word, following in pairwise([*words, ""])
    ]


def comparison_content(
    config: SelectConfig,
    chosen: str,
    measured: CriteriaScores,
    selected: dict[str, list[str]],
    correlations: dict[str, dict[str, float | None]],
) -> dict[str, Any]:
    """Content of selection.json."""
    scores = measured.scores[chosen]
    return {
        "criterion": config.criterion,
        "rho": config.rho,
        "radius": config.radius,
        "fraction": config.fraction,
        "selected": selected[chosen],
        "scores": {name: scores[name] for name in sorted(scores, key=lambda n: (-scores[n], n))},
        "criteria": {
            name: {"scores": by_layer, "selected": selected[name]}
            for name, by_layer in measured.scores.items()
        },
        "rank_correlations": correlations,
        **measured.facts,
    }


def comparison_conclusion(
    config: SelectConfig, chosen: str, measured: CriteriaScores, selected: dict[str, list[str]]
) -> str:
    """Lines on the selected layers and the circumstances of the measurement."""
    facts, names = measured.facts, selected[chosen]
    lines = [f"{name} would select {', '.join(layers)}" for name, layers in selected.items()]
    lines[0] = (
        f"{chosen} selects {len(names)} of {len(measured.scores[chosen])} layers (*): "
        f"{', '.join(names)}"
    )
    circumstances = (
        f"{facts['images']} images, {facts['attack']} in {facts['norm']} epsilon "
        f"{facts['epsilon']:.4g}, rho {config.rho:g}, amp {facts['amp']}, {facts['seconds']} s"
    )
    return "\n".join([*lines, circumstances, _LEFT_OUT])


# CSS variables of the report's page, which other programs do not know
_COLOURS = {"ink": "#1a1a1a", "muted": "#555555", "grid": "#cccccc", "page": "#ffffff"}
_VIEW_BOX = re.compile(r'viewBox="0 0 (?P<width>[\d.]+) (?P<height>[\d.]+)"')
_PER_ROW = 2
FORMATS = (".svg", ".png")


def save_maps(
    path: Path, scores: Mapping[str, Scores], selected: Mapping[str, Sequence[str]]
) -> None:
    """Draw a map for each criterion, two side by side, into `path`, .svg or .png, written whole."""
    from safer_fast.runs.figures.layer_map import draw_layer_map, score_limits

    figures = {
        name: draw_layer_map(by_layer, selected[name], limits=score_limits([by_layer]), title=name)
        for name, by_layer in scores.items()
    }
    content = _as_svg(figures) if path.suffix == ".svg" else _as_png(list(figures.values()))
    write_whole(path, content)


def _as_svg(figures: Mapping[str, Figure]) -> bytes:
    from safer_fast.runs.figures.canvas import as_svg

    drawings = [as_svg(figure, name, name) for name, figure in figures.items()]
    sizes = [_VIEW_BOX.search(drawing) for drawing in drawings]
    width, height = (max(float(size[key]) for size in sizes if size) for key in ("width", "height"))
    parts = []
    for index, drawing in enumerate(drawings):
        row, column = divmod(index, _PER_ROW)
        place = f'x="{column * width}" y="{row * height}" width="{width}" height="{height}"'
        parts.append(drawing.replace("<svg", f"<svg {place}", 1))
    columns, rows = min(len(drawings), _PER_ROW), -(-len(drawings) // _PER_ROW)
    size = f'width="{columns * width}" height="{rows * height}"'
    content = "".join(parts)
    for name, colour in _COLOURS.items():
        content = content.replace(f"var(--{name})", colour)
    back = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{back}{content}</svg>\n'.encode()


def _as_png(figures: Sequence[Figure]) -> bytes:
    from PIL import Image

    from safer_fast.runs.figures.canvas import as_png

    images = [Image.open(io.BytesIO(as_png(figure)[0])) for figure in figures]
    width, height = max(image.width for image in images), max(image.height for image in images)
    columns, rows = min(len(images), _PER_ROW), -(-len(images) // _PER_ROW)
    page = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, _PER_ROW)
        page.paste(image, (column * width, row * height))
    buffer = io.BytesIO()
    page.save(buffer, "png")
    return buffer.getvalue()
