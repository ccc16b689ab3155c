"""Weights & Biases: metrics and pictures of a run, where `--log.wandb` asks for it."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from safer_fast.runs.layout import RunFolder
from safer_fast.runs.loggers.logger import Line, LoggedRun, layer_map, plotted
from safer_fast.runtime.files import check_no_link, write_whole

PROJECT = "safer_fast"
_LEFT_OUT = ("event", "step")


class WandbRun:
    """A logger that belongs to a run folder and is resumed when the run is.

    Its own settings are those of wandb: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and so on. Where
    it cannot be reached, `report` gets one note, and the run continues without it.
    """

    def __init__(self, run: LoggedRun) -> None:
        self._report = run.report
        self._run: Any = None
        self._try(lambda: self._begin(run))

    def add(self, line: Line) -> None:
        """Send the numbers of a line of metrics.jsonl, and the map of a selection."""
        values = plotted_values(line)
        if values and self._run is not None:
            self._try(lambda: self._run.log({"step": line["step"], **values}))
        if line["event"] == "selection" and line["scores"] and self._run is not None:
            self._try(lambda: self.add_image("selection/layers", *layer_map(line), line["step"]))

    def add_image(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """Send a PNG file, which knows its width and height itself."""
        if self._run is not None:
            self._try(lambda: self._run.log({"step": step, tag: _image(png)}))

    def close(self) -> None:
        """Send everything, or write it where wandb keeps it for later."""
        if self._run is not None:
            self._try(self._run.finish)
        self._run = None

    def _begin(self, run: LoggedRun) -> None:
        import wandb

        identity = RunFolder(run.folder).wandb_id
        check_no_link(RunFolder(run.folder).wandb)
        if not identity.is_file():
            write_whole(identity, f"{secrets.token_hex(4)}\n".encode())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.resolve().name,
            id=identity.read_text().strip(),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _try(self, work: Callable[[], object]) -> None:
        """Do the work; an error of wandb's is reported and ends the logger, not the run."""
        try:
            work()
        except Exception as error:
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._report(f"log.wandb: off from here on ({reason:.200})")


def check_wandb() -> None:
    """Raise ValueError where wandb is not installed."""
    if find_spec("wandb") is None:
        raise ValueError(
            "--log.wandb: expected the package wandb, got none: pip install wandb, or leave it out"
        )


def plotted_values(line: Line) -> dict[str, float]:
    """Numbers by name, however deep they lie in lists and dictionaries."""
    return plotted(line, _LEFT_OUT, most_levels=sys.getrecursionlimit())


def _image(png: bytes) -> Any:
    import io

    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(png)))
