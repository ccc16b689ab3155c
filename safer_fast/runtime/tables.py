"""Tables of text with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


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
