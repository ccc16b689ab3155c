"""Tables of text: columns are as wide as their widest cell."""

from __future__ import annotations

from safer_fast.runtime.tables import aligned


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [["name", "a", "long title"], ["x", "1.5", ""], ["longer", "10", "2"]]
    assert aligned(rows).split("\n") == [
        "name      a  long title",
        "x       1.5",
        "longer   10           2",
    ]


def test_widths_and_gaps_can_be_wider_and_columns_stand_left() -> None:
    rows = [["a", "b", "c"], ["d", "e", "f"]]
    assert aligned(rows, num_left=2, gap=1, least=(3, 2)) == "a   b   c\nd   e   f"
