"""Tables have wide enough columns; bars show on terminals and in notebooks, and nowhere else."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from safer_fast.runtime import terminal
from safer_fast.runtime.terminal import aligned


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class ZMQInteractiveShell:
    """The class that a kernel of Jupyter has, by its name."""


def in_jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, "IPython", module)  # type: ignore[arg-type]
    monkeypatch.setattr(terminal, "find_spec", lambda _: None)  # without widgets


@pytest.mark.parametrize("place", ["log", "terminal", "notebook", "other rank"])
def test_bars_show_where_somebody_looks(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if place == "terminal" else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(sys.modules, "IPython", None)
    if place == "notebook":
        in_jupyter(monkeypatch)
    bar = terminal.progress_bar(range(3), is_shown=place != "other rank", desc="epoch 1")
    assert list(bar) == [0, 1, 2]
    assert isinstance(bar, tqdm)
    assert ("epoch 1" in stream.getvalue()) is (place in ("terminal", "notebook"))


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
