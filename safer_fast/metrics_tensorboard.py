"""What TensorBoard shows of a run: the scalars of metrics.jsonl, in an event file beside it."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE

_NAME = "events.out.tfevents."
_NOT_PLOTTED = ("event", "epoch", "step", "time_s")


class EventFile:
    """A new event file of a run; where it cannot be written, it is left alone from then on.

    With `kept`, the lines of a run that is resumed, it takes the place of all older ones and starts
    with their scalars. SummaryWriter is not used: after one error in its thread every call raises,
    that of `close` too; a removed file it makes anew, without a header; and it opens the file for
    each scalar, so that 100 000 lines of a resumed run would take a minute in place of seconds.
    """

    def __init__(
        self, run: Path, report: Callable[[str], None], kept: Sequence[Mapping[str, Any]] | None
    ) -> None:
        self._report = report
        self._path: Path | None = None
        header = Event(wall_time=time.time(), file_version="brain.Event:2")
        records = [_record(header.SerializeToString()), *_records_of(kept or ())]
        try:
            for old in run.glob(_NAME + "*") if kept is not None else ():
                old.unlink()
            self._path = _new_path(run.absolute())
            with self._path.open("xb") as file:
                file.writelines(records)
        except OSError as error:
            self._give_up(error)

    def add(self, line: Mapping[str, Any]) -> None:
        """The scalars of a line of metrics.jsonl are in the file, if it can be written."""
        if self._path is None:
            return
        record = _record_of(line, time.time())
        try:
            with self._path.open("r+b") as file:  # not "ab": a removed file is not made anew
                file.seek(0, os.SEEK_END)
                file.write(record)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._path = None
        reason = error.strerror or error
        self._report(f"TensorBoard's event file cannot be written: {reason}; it is left as it is")


def _new_path(run: Path) -> Path:
    """A name as TensorBoard expects it, which sorts after those of earlier files."""
    start = f"{_NAME}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    paths = (run / f"{start}.{number}" for number in itertools.count())
    return next(path for path in paths if not path.exists())


def _records_of(lines: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The records of lines written earlier, as if the last of them had been written just now."""
    times = [line["time_s"] for line in lines]
    now = time.time()
    return [_record_of(line, now - times[-1] + at) for line, at in zip(lines, times, strict=True)]


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
        values = {f"{line['weights']}-{line['split']}-{line['attack']}": line["accuracy"]}
    elif event == "selection":
        values = line["scores"]
    elif event in ("run", "end"):
        return {}
    else:
        values = {key: value for key, value in line.items() if key not in _NOT_PLOTTED}
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return {f"{event}/{key}": float(value) for key, value in numbers.items()}


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
