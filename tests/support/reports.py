"""Reports and maps of layers of runs: tests of them read them, the others leave them out."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safer_fast.runs.loggers import logger, tensorboard
from safer_fast.runs.report.page import write_report
from safer_fast.training import results

LAYER_MAP = logger.layer_map
"""Draws the map of layers that a run logs."""


@contextmanager
def without_reports() -> Iterator[None]:
    """Runs of this process end without a report, and write maps of layers of one pixel.

    Drawing takes as long as a small run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_report", write_nothing)
        patch.setattr(tensorboard, "layer_map", one_pixel)
        yield


@contextmanager
def with_reports() -> Iterator[None]:
    """Runs of this process end with their report and draw maps, as those of users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_report", write_report)
        patch.setattr(tensorboard, "layer_map", LAYER_MAP)
        yield


def leave_out_drawings() -> None:
    """Let a run of this process end without a report, and write maps of layers of one pixel."""
    for name, module in list(sys.modules.items()):
        if name.startswith("safer_fast.") and "write_report" in vars(module):
            vars(module)["write_report"] = write_nothing
    for place in (logger, tensorboard):
        vars(place)["layer_map"] = one_pixel


def one_pixel(*_: Any) -> tuple[bytes, int, int]:
    """Return a map of layers that takes no time to draw."""
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "png")
    return pixel.getvalue(), 1, 1


def write_nothing(folders: Sequence[Path], *_: Any) -> Path:
    """Name the report of a run, without one."""
    return folders[0] / "report.html"
