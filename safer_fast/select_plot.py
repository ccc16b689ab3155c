"""The picture of a selection: a map of the layers for each criterion, in one file."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safer_fast.select_scores import Scores
from safer_fast.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the page of the report has these as CSS variables, which other programs do not know
_COLOURS = {"ink": "#1a1a1a", "muted": "#555555", "grid": "#cccccc", "page": "#ffffff"}
_VIEW_BOX = re.compile(r'viewBox="0 0 (?P<width>[\d.]+) (?P<height>[\d.]+)"')
_PER_ROW = 2
FORMATS = (".svg", ".png")


def save_maps(
    path: Path, scores: Mapping[str, Scores], selected: Mapping[str, Sequence[str]]
) -> None:
    """`path`, .svg or .png, shows a map for each criterion, two side by side, none half written."""
    from safer_fast.report_map import draw_layer_map, score_limits

    figures = {
        name: draw_layer_map(by_layer, selected[name], limits=score_limits([by_layer]), title=name)
        for name, by_layer in scores.items()
    }
    content = _as_svg(figures) if path.suffix == ".svg" else _as_png(list(figures.values()))
    write_whole(path, content)


def _as_svg(figures: Mapping[str, Figure]) -> bytes:
    from safer_fast.report_drawing import as_svg

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

    from safer_fast.report_drawing import as_png

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
