"""The interface of a logger, and the values of a line of metrics.jsonl that loggers show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Line = Mapping[str, Any]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger is opened for.

    report: shows a note to the user. kept: the lines up to the checkpoint of a resumed run; None
    for a new one. settings: its configuration and description.
    """

    folder: Path
    report: Callable[[str], None] = print
    kept: Sequence[Line] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Logger(Protocol):
    """A place that shows a run beside metrics.jsonl; none of its failures ends the run."""

    def add(self, line: Line) -> None:
        """Show a line of metrics.jsonl, a map of the layers too where it is a selection."""

    def add_image(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """Show a PNG file of this many pixels under `tag`."""

    def close(self) -> None:
        """Send what waits; may be called again."""


def plotted(line: Line, left_out: Sequence[str], most_levels: int) -> dict[str, float]:
    """The numbers of a line that are curves, by `event/name`, at most `most_levels` deep."""
    event = line["event"]
    if event == "evaluation":
        figure = line["accuracy"]
        figure = line.get("embedding_distance") if figure is None else figure
        values = {evaluation_tag(line): figure}
    elif event == "selection":
        values = line["scores"]
    elif event in ("run", "end"):
        return {}
    else:
        values = {key: value for key, value in line.items() if key not in left_out}
    return dict(_numbers(event, values, most_levels))


def _numbers(name: str, value: Any, levels: int) -> Iterator[tuple[str, float]]:
    """The numbers within a value: by name in dictionaries, by index in lists."""
    if isinstance(value, int | float):
        yield name, float(value)
    elif levels and isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _numbers(f"{name}/{key}", item, levels - 1)


def evaluation_tag(line: Line) -> str:
    """A name for the accuracy of an evaluation, with all that it depends on: none share a name.

    For example `last-test-pgd-20-linf-8of255-1000images`; defaults (one restart, seed 0) are left
    out.
    """
    words = [str(line[name]) for name in ("weights", "split", "attack")]
    words += [line["norm"]] if line.get("norm") else []
    words += [_radius(line["epsilon"])] if line["epsilon"] else []
    words += [f"{line['num_images']}images"]
    words += [f"{line['restarts']}restarts"] if (line.get("restarts") or 1) > 1 else []
    words += [f"seed{line['seed']}"] if line.get("seed") else []
    words += [str(line["source"])] if line.get("source") else []
    words += [str(line["text_embeddings"])] if line.get("text_embeddings") else []
    return "-".join(words)


def _radius(epsilon: float) -> str:
    """8of255 for 8/255: a slash would make a group of its own."""
    levels = round(epsilon * 255)
    return f"{levels}of255" if levels / 255 == epsilon else repr(float(epsilon))


def layer_map(line: Line) -> tuple[bytes, int, int]:
    """The map of a selection as a PNG file, with its width and height."""
    from safer_fast.runs.figures.canvas import as_png
    from safer_fast.runs.figures.layer_map import draw_layer_map, score_limits

    scores, title = line["scores"], f"epoch {line['epoch']}: {line['criterion']}"
    limits = score_limits([scores])
    return as_png(draw_layer_map(scores, line["selected"], limits=limits, title=title))
