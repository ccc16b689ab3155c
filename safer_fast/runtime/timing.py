"""Time measured on the device, without making the host wait."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")


class DeviceTime:
    """A point in time; on a GPU an event on the device, so that the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._host_s = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def seconds_until(self, end: DeviceTime) -> float:
        """Seconds from this point to `end`; waits for the device to reach `end`."""
        if self._event is None or end._event is None:
            return end._host_s - self._host_s
        end._event.synchronize()
        return float(self._event.elapsed_time(end._event)) / 1e3


class DataWait:
    """Measures how long the device waits for data, from the end of a step to the next batch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gaps: list[tuple[DeviceTime, DeviceTime]] = []

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; the work until the next one is requested is a step."""
        end = DeviceTime(self._device)
        for batch in batches:
            self._gaps.append((end, DeviceTime(self._device)))
            yield batch
            end = DeviceTime(self._device)

    def take(self) -> float:
        """Return the seconds since the previous call; waits for the device."""
        gaps, self._gaps = self._gaps, []
        return sum(end.seconds_until(start) for end, start in gaps)


class StepTimer:
    """Measures the time of consecutive parts of steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str | None, DeviceTime]] = []

    def begin(self) -> None:
        """Mark the beginning of a step."""
        self._marks.append((None, DeviceTime(self._device)))

    def end(self, name: str) -> None:
        """Mark the end of a part, which began at the end of the one before it or of `begin`."""
        self._marks.append((name, DeviceTime(self._device)))

    def take(self) -> dict[str, float]:
        """Return the seconds in each part since the previous call; waits for the device."""
        marks, self._marks = self._marks, []
        seconds: dict[str, float] = {}
        for (_, start), (name, end) in pairwise(marks):
            if name is not None:
                seconds[name] = seconds.get(name, 0.0) + start.seconds_until(end)
        return seconds
