"""What Weights & Biases shows of a run, where `--log.wandb` asks for it: its metrics, its maps."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safer_fast.runs.loggers.tensorboard import evaluation_tag, layer_map
from safer_fast.runtime.files import check_no_link, write_whole

IDENTITY = "wandb-id.txt"
FOLDER = "wandb"
PROJECT = "safer_fast"
_NOT_PLOTTED = ("event", "step")


class WandbRun:
    """A run of Weights & Biases that belongs to a run folder, and is gone on with when that is.

    Its own settings are those of wandb: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and so on. Where
    it cannot be reached, `report` is told once, and the run goes on without.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], report: Callable[[str], None]
    ) -> None:
        self._report = report
        self._run: Any = None
        self._try(lambda: self._begin(folder, settings))

    def add(self, line: Mapping[str, Any]) -> None:
        """What can be plotted of a line of metrics.jsonl, by `event/name`, over the steps."""
        values = _plotted(line)
        if values and self._run is not None:
            self._try(lambda: self._run.log({"step": line["step"], **values}))
        if line["event"] == "selection" and line["scores"] and self._run is not None:
            self._try(lambda: self.add_image("selection/layers", layer_map(line)[0], line["step"]))

    def add_image(self, tag: str, png: bytes, step: int) -> None:
        """A picture, as PNG."""
        if self._run is not None:
            self._try(lambda: self._run.log({"step": step, tag: _image(png)}))

    def close(self) -> None:
        """Everything is sent, or written where wandb keeps it for later."""
        if self._run is not None:
            self._try(self._run.finish)
        self._run = None

    def _begin(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        identity = folder / IDENTITY
        check_no_link(folder / FOLDER)
        if not identity.is_file():
            write_whole(identity, f"{secrets.token_hex(4)}\n".encode())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            id=identity.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _try(self, work: Callable[[], object]) -> None:
        """Whatever goes wrong at wandb's does not end the training."""
        try:
            work()
        except Exception as error:
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._report(f"log.wandb: off from here on ({reason:.200})")


def check_wandb() -> None:
    """Raises ValueError where wandb is not installed."""
    if find_spec("wandb") is None:
        raise ValueError(
            "--log.wandb: expected the package wandb, got none: pip install wandb, or leave it out"
        )


def _plotted(line: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers by name, those in lists and dictionaries too."""
    event = line["event"]
    if event in ("run", "end"):
        return {}
    if event == "evaluation":
        return {f"{event}/{evaluation_tag(line)}": line["accuracy"]}
    if event == "selection":
        return {f"{event}/{name}": score for name, score in line["scores"].items()}
    found: dict[str, Any] = {}
    for name, value in line.items():
        if name not in _NOT_PLOTTED:
            found |= _numbers(f"{event}/{name}", value)
    return found


def _numbers(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        inner = {f"{name}/{key}": item for key, item in value.items()}
    elif isinstance(value, list):
        inner = {f"{name}/{index}": item for index, item in enumerate(value)}
    else:
        return {name: float(value)} if isinstance(value, int | float) else {}
    found: dict[str, float] = {}
    for path, item in inner.items():
        found |= _numbers(path, item)
    return found


def _image(png: bytes) -> Any:
    import io

    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(png)))
