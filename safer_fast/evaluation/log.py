"""Figures of evaluations in a run's metrics.jsonl, each once, even if several run at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safer_fast.data.formats import names_of
from safer_fast.data.formats.splits import is_pattern
from safer_fast.runs.layout import RunFolder
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.turns import turn_at


def open_log(folder: Path, ranks: Ranks) -> RunLog:
    """The log of the run; raises ValueError where its lines cannot be read."""
    if not ranks.is_first:
        return RunLog(folder, ranks)
    with turn_at(RunFolder(folder).metrics):
        read_metrics(RunFolder(folder).metrics)
        return RunLog(folder, ranks)


def log_rows(rows: Sequence[dict[str, Any]], folder: Path, epoch: int, log: RunLog) -> None:
    """Append the rows to metrics.jsonl that are not there yet, at the end of training.

    epoch: of the weights where the file does not tell when training ended.
    Evaluations that run at once take turns. Earlier versions did not say of how many images theirs
    were, nor how many were not finite.
    """
    with turn_at(RunFolder(folder).metrics):
        _append(rows, read_metrics(RunFolder(folder).metrics), epoch, log)
        log.close()


def whole_path(path: str) -> str:
    """The absolute path of data; words such as digits, and names of the hub, as they are."""
    place = Path(path).expanduser()
    if path in names_of("word"):
        return path
    return str(place.absolute()) if place.exists() or is_pattern(place) else path


def _append(
    rows: Sequence[dict[str, Any]], logged: Sequence[Mapping[str, Any]], epoch: int, log: RunLog
) -> None:
    known = [{"of_images": e.get("num_images"), "num_not_finite": 0, **e} for e in logged]
    epoch, step = _end_of_training(logged) or (epoch, 0)
    for row in rows:
        facts = {key: value for key, value in row.items() if key != "seconds"}
        if not any(event.items() >= facts.items() for event in known):
            log.write("evaluation", epoch=epoch, step=step, **row)


def _end_of_training(logged: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Epoch and step at which the run wrote its weights, as its own final figures have them."""
    for kind in ("end", "epoch"):
        for event in reversed(logged):
            place = event.get("epoch"), event.get("step")
            if event.get("event") == kind and all(type(n) is int and n >= 0 for n in place):
                return place
    return None
