"""What TensorBoard shows of a run: scalars and pictures, in an event file beside metrics.jsonl."""

from __future__ import annotations

import itertools
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE

from safer_fast.runtime.files import open_plain

_NAME = "events.out.tfevents."
_STAMP, _LAST_STAMP = re.compile(re.escape(_NAME) + r"([0-9]{10})\."), 10**10 - 1
_NOT_PLOTTED = ("event", "epoch", "step", "time_s", "validation_images", "of_validation_images")
_MOST_MAPS = 12  # of selections before a resume: each takes a quarter of a second to draw
_MOST_LEVELS = 3  # of values within values


class EventFile:
    """A new event file of a run; where it cannot be written, it is left alone from then on.

    With `kept`, the lines of a run that is resumed, it takes the place of all older ones and starts
    with their scalars. SummaryWriter is not used: after one error in its thread every call raises,
    that of `close` too; a removed file it makes anew, without a header; and it opens the file for
    each scalar, so that 100 000 lines of a resumed run would take a minute in place of seconds.
    A selection also has a map of the layers; where it cannot be drawn, there are no more of them.
    """

    def __init__(
        self, run: Path, report: Callable[[str], None], kept: Sequence[Mapping[str, Any]] | None
    ) -> None:
        self._report = report
        self._path: Path | None = None
        self._draws_maps = True
        header = Event(wall_time=time.time(), file_version="brain.Event:2")
        records = [_record(header.SerializeToString()), *self._records_of(kept or ())]
        try:
            earlier = list(run.glob(_NAME + "*"))
            for old in earlier if kept is not None else ():
                old.unlink()
            self._path = _new_path(run.absolute(), earlier)
            with self._path.open("xb") as file:
                file.writelines(records)
        except OSError as error:
            self._give_up(error)

    def add(self, line: Mapping[str, Any]) -> None:
        """What is shown of a line of metrics.jsonl is in the file, if it can be written."""
        if self._path is not None:
            now = time.time()
            self._append(_record_of(line, now) + self._map_of(line, now))

    def add_images(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """A PNG file of this many pixels is shown under `tag`, if the file can be written."""
        if self._path is not None:
            self._append(_image_record(tag, (png, width, height), step, time.time()))

    def _append(self, record: bytes) -> None:
        assert self._path is not None
        try:
            with open_plain(
                self._path, os.O_RDWR
            ) as file:  # not "ab": a removed file is not made anew
                file.seek(0, os.SEEK_END)
                file.write(record)
        except OSError as error:
            self._give_up(error)

    def _records_of(self, lines: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
        """The records of lines written earlier, as if the last had been written just now."""
        num_selections = sum(line["event"] == "selection" for line in lines)
        now = time.time() - (lines[-1]["time_s"] if lines else 0.0)
        for line in lines:
            at = now + line["time_s"]
            yield _record_of(line, at)
            if line["event"] == "selection":
                num_selections -= 1
                if num_selections < _MOST_MAPS:
                    yield self._map_of(line, at)

    def _map_of(self, line: Mapping[str, Any], wall_time: float) -> bytes:
        """A record with the map of the layers of a selection, empty where there is none."""
        if line["event"] != "selection" or not line["scores"] or not self._draws_maps:
            return b""
        try:
            picture = layer_map(line)
        except Exception as error:  # a picture is no reason to end a run
            self._draws_maps = False
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            self._report(f"TensorBoard's map of layers cannot be drawn: {problem}; it is left out")
            return b""
        return _image_record("selection/layers", picture, line["step"], wall_time)

    def _give_up(self, error: OSError) -> None:
        self._path = None
        reason = error.strerror or error
        self._report(f"TensorBoard's event file cannot be written: {reason}; it is left as it is")


def _new_path(run: Path, earlier: Sequence[Path]) -> Path:
    """A name as TensorBoard expects it, which sorts after those of earlier files, also where the
    clock went back: a TensorBoard that shows the run reads nothing that sorts before."""
    stamps = [found[1] for path in earlier if (found := _STAMP.match(path.name))]
    stamp = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps)])
    start = f"{_NAME}{min(stamp, _LAST_STAMP):010d}.{socket.gethostname()}.{os.getpid()}"
    paths = (run / f"{start}.{number}" for number in itertools.count())
    return next(path for path in paths if not path.exists())


def evaluation_tag(line: Mapping[str, Any]) -> str:
    """A name for the figure of an evaluation, with all that it depends on: none share a name.

    For example `last-test-pgd-20-linf-8of255-1000images`; what is as usual (one restart, seed 0)
    goes unsaid.
    """
    words = [str(line[name]) for name in ("weights", "split", "attack")]
    words += [line["norm"]] if line.get("norm") else []
    words += [_radius(line["epsilon"])] if line["epsilon"] else []
    words += [f"{line['num_images']}images"]
    words += [f"{line['restarts']}restarts"] if (line.get("restarts") or 1) > 1 else []
    words += [f"seed{line['seed']}"] if line.get("seed") else []
    words += [str(line["source"])] if line.get("source") else []
    return "-".join(words)


def _radius(epsilon: float) -> str:
    """8of255 for 8/255: a slash would make a group of its own."""
    levels = round(epsilon * 255)
    return f"{levels}of255" if levels / 255 == epsilon else repr(float(epsilon))


def layer_map(line: Mapping[str, Any]) -> tuple[bytes, int, int]:
    """The map of a selection as a PNG file, with its width and height."""
    from safer_fast.runs.figures.canvas import as_png
    from safer_fast.runs.figures.layer_map import draw_layer_map, score_limits

    scores, title = line["scores"], f"epoch {line['epoch']}: {line['criterion']}"
    limits = score_limits([scores])
    return as_png(draw_layer_map(scores, line["selected"], limits=limits, title=title))


def _image_record(tag: str, picture: tuple[bytes, int, int], step: int, wall_time: float) -> bytes:
    png, width, height = picture
    image = Summary.Image(width=width, height=height, encoded_image_string=png)
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    return _record(Event(wall_time=wall_time, step=step, summary=summary).SerializeToString())


def _record_of(line: Mapping[str, Any], wall_time: float) -> bytes:
    """One record with all scalars of a line, empty where it has none."""
    scalars = _scalars(line)
    if not scalars:
        return b""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    event = Event(wall_time=wall_time, step=line["step"], summary=Summary(value=values))
    return _record(event.SerializeToString())


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """What TensorBoard plots of a line, by `group/name`."""
    event = line["event"]
    if event == "evaluation":
        values = {evaluation_tag(line): line["accuracy"]}
    elif event == "selection":
        values = line["scores"]
    elif event in ("run", "end"):
        return {}
    else:
        values = {key: value for key, value in line.items() if key not in _NOT_PLOTTED}
    return dict(_flat(event, values, _MOST_LEVELS))


def _flat(name: str, value: Any, levels: int) -> Iterator[tuple[str, float]]:
    """The numbers in a value: by name in dictionaries, by place in lists."""
    if isinstance(value, int | float):
        yield name, float(value)
    elif levels and isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _flat(f"{name}/{key}", item, levels - 1)


def _record(data: bytes) -> bytes:
    """A record of the TFRecord format: length, its checksum, data, its checksum."""
    return _length(len(data)) + data + _checksum(data)


@cache
def _length(num_bytes: int) -> bytes:
    length = struct.pack("<Q", num_bytes)
    return length + _checksum(length)


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked as TFRecord wants it.

    tensorboard's own takes three times as long, which is seconds where a long run is resumed.
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
