"""Canvas of the report: colours, empty axes, and drawings as SVG or PNG.

matplotlib draws with stand-in colours; they become CSS variables of the page, so that one drawing
serves light, dark and paper. It is imported on first use and never touches pyplot.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

# Okabe and Ito's colours, distinct for colour-blind readers; the page defines --run-0 to --run-6.
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8d")
INK, MUTED, GRID, PAGE, ALARM = "#010203", "#040506", "#070809", "#fdfcfb", "#c00102"
_VARIABLES = {colour: f"--run-{index}" for index, colour in enumerate(RUN_COLOURS)} | {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAGE: "--page",
    ALARM: "--alarm",
}
_WIDTH = 4.8  # inches: 346 points, so that text stays readable on a phone
_DPI = 150


def new_axes(height: float) -> tuple[Figure, Axes]:
    """A figure of this height, in inches, and its axes, with little ink."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(color=GRID, labelcolor=MUTED, labelsize=9, length=3)
    return figure, axes


def ticks(most: int, **options: Any) -> Locator:
    """At most this many round numbers along an axis."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, **options)


def as_svg(figure: Figure, identity: str, title: str) -> str:
    """The drawing as one <svg> element that scales with its column; ids begin with `identity`."""
    buffer = io.StringIO()
    with _plain_text(identity):
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


def as_png(figure: Figure) -> tuple[bytes, int, int]:
    """The drawing on white as a PNG file, with its width and height in pixels."""
    buffer = io.BytesIO()
    with _plain_text():
        figure.savefig(
            buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None}
        )
    png = buffer.getvalue()
    width, height = struct.unpack(">II", png[16:24])  # of its first chunk, IHDR
    return png, width, height


@contextmanager
def _plain_text(salt: str = "") -> Iterator[None]:
    """Draw texts as texts, not formulas, and without a warning for letters the font lacks."""
    import matplotlib

    with (
        matplotlib.rc_context(
            {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False}
        ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)  # a browser has those letters
        yield
