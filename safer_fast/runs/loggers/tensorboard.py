"""TensorBoard: scalars and pictures of a run, in an event file beside metrics.jsonl."""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.runs.loggers.logger import Line, LoggedRun, layer_map, plotted
from safer_fast.runtime.files import open_plain

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_NAME = "events.out.tfevents."
_STAMP, _LAST_STAMP = re.compile(re.escape(_NAME) + r"([0-9]{10})\."), 10**10 - 1
_LEFT_OUT = ("event", "epoch", "step", "time_s", "validation_images", "of_validation_images")
_MOST_LEVELS = 3  # of values within values
_MOST_MAPS = 12  # of selections before a resume: each takes a quarter of a second to draw


class EventFile:
    """A logger that writes a new event file into the run folder, each call at once.

    Where it cannot be written, `report` gets one note, and the file is left as it is. That of a
    resumed run replaces all older ones and begins with the kept lines, so that every reader shows
    each scalar once. A map of layers that cannot be drawn is reported once; none are drawn then.

    Records are those of TensorBoard's RecordWriter. SummaryWriter does not suit: its thread prints
    a traceback when the disk is full; it opens the file by name for each record, which follows
    links, and makes a removed file anew, without a header; and its purge_step hides scalars by step
    alone, while a checkpoint may lie between two lines of one step.
    """

    def __init__(self, run: LoggedRun) -> None:
        self._report = run.report
        self._path: Path | None = None
        self._draws_maps = True
        try:
            events = [_header(), *self._kept_events(run.kept or ())]
            earlier = list(run.folder.glob(_NAME + "*"))
            for old in earlier if run.kept is not None else ():
                old.unlink()
            self._path = _new_path(run.folder.absolute(), earlier)
            self._write(events, os.O_CREAT | os.O_EXCL)
        except OSError as error:
            self._give_up(error)

    def add(self, line: Line) -> None:
        """Write the scalars of a line of metrics.jsonl, and the map of a selection."""
        self._append(self._events_of(line, time.time(), has_map=True))

    def add_image(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """Write a PNG file of this many pixels under `tag`."""
        self._append([_image_event(tag, (png, width, height), step, time.time())])

    def close(self) -> None:
        """Nothing: every call writes what it is given."""

    def _append(self, events: Sequence[Event]) -> None:
        try:
            self._write(events)
        except OSError as error:
            self._give_up(error)

    def _write(self, events: Sequence[Event], new: int = 0) -> None:
        """Append to the file; new: flags that make it, without which a removed file stays away."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._path is None or not events:
            return
        with open_plain(self._path, os.O_WRONLY | os.O_APPEND | new) as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())

    def _kept_events(self, lines: Sequence[Line]) -> Iterator[Event]:
        """Events of lines written earlier, as if the last had been written just now."""
        num_selections = sum(line["event"] == "selection" for line in lines)
        now = time.time() - (lines[-1]["time_s"] if lines else 0.0)
        for line in lines:
            num_selections -= line["event"] == "selection"
            has_map = num_selections < _MOST_MAPS
            yield from self._events_of(line, now + line["time_s"], has_map)

    def _events_of(self, line: Line, wall_time: float, has_map: bool) -> list[Event]:
        events = _scalar_events(line, wall_time)
        if has_map and self._draws_maps and line["event"] == "selection" and line["scores"]:
            try:
                picture = layer_map(line)
            except Exception as error:  # a picture is no reason to end a run
                self._draws_maps = False
                problem = " ".join(f"{type(error).__name__}: {error}".split())
                self._report(
                    f"TensorBoard's map of layers cannot be drawn: {problem}; it is left out"
                )
            else:
                events.append(_image_event("selection/layers", picture, line["step"], wall_time))
        return events

    def _give_up(self, error: OSError) -> None:
        self._path = None
        reason = error.strerror or error
        self._report(f"TensorBoard's event file cannot be written: {reason}; it is left as it is")


def _new_path(folder: Path, earlier: Sequence[Path]) -> Path:
    """A name as TensorBoard expects it, which sorts after those of earlier files.

    Also where the clock was set back: a TensorBoard that shows the run reads nothing that sorts
    before.
    """
    stamps = [found[1] for path in earlier if (found := _STAMP.match(path.name))]
    stamp = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps)])
    start = f"{_NAME}{min(stamp, _LAST_STAMP):010d}.{socket.gethostname()}.{os.getpid()}"
    paths = (folder / f"{start}.{number}" for number in itertools.count())
    return next(path for path in paths if not path.exists())


def _header() -> Event:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), file_version="brain.Event:2")


def _scalar_events(line: Line, wall_time: float) -> list[Event]:
    """One event with all scalars of a line, none where it has none."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=name, simple_value=value)
        for name, value in plotted(line, _LEFT_OUT, _MOST_LEVELS).items()
    ]
    return [_event(values, line["step"], wall_time)] if values else []


def _image_event(tag: str, picture: tuple[bytes, int, int], step: int, wall_time: float) -> Event:
    from tensorboard.compat.proto.summary_pb2 import Summary

    png, width, height = picture
    image = Summary.Image(width=width, height=height, encoded_image_string=png)
    return _event([Summary.Value(tag=tag, image=image)], step, wall_time)


def _event(values: Sequence[Any], step: int, wall_time: float) -> Event:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(wall_time=wall_time, step=step, summary=Summary(value=values))
