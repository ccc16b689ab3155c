"""Output for people: tables of text with aligned columns, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def aligned(
    rows: Sequence[Sequence[str]],
    *,
    num_left: int = 1,
    gap: int = 2,
    least: tuple[int, int] = (0, 0),
) -> str:
    """The rows as lines, their columns as wide as the widest cell; all rows have as many cells.

    num_left: columns that are aligned to the left, the first ones. gap: spaces between columns.
    least: the least width of the first column, and of the others.
    """
    widths = [
        max(least[index > 0], *map(len, column))
        for index, column in enumerate(zip(*rows, strict=True))
    ]
    return "\n".join(
        (" " * gap)
        .join(
            cell.ljust(width) if index < num_left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in rows
    )


def shows_bars() -> bool:
    """True on a terminal and in a notebook; a log gets lines instead."""
    return in_notebook() or sys.stderr.isatty()


def in_notebook() -> bool:
    """True in a kernel of Jupyter, whose streams are no terminals and show bars all the same."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def progress_bar(
    values: Iterable[T] | None = None, *, is_shown: bool = True, **settings: Any
) -> tqdm[T]:
    """A bar of tqdm over `values`, removed when it is full; in a notebook a widget if it has them.

    is_shown: False on ranks that show nothing. settings: further arguments of tqdm.
    """
    kind: Any = tqdm
    if in_notebook() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as kind
    settings = {"leave": False, "disable": not (is_shown and shows_bars()), **settings}
    bar: tqdm[T] = kind(values, **settings)
    return bar
