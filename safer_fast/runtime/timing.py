"""Time as the device sees it: measured while the host goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")


class DeviceTime:
    """A point in time; on a GPU one of its own, so that the host need not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._host_s = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def seconds_until(self, end: DeviceTime) -> float:
        """Waits for the device to reach `end`."""
        if self._event is None or end._event is None:
            return end._host_s - self._host_s
        end._event.synchronize()
        return float(self._event.elapsed_time(end._event)) / 1e3


class DataWait:
    """How long the device had nothing to do: from the end of a step until the next batch came."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gaps: list[tuple[DeviceTime, DeviceTime]] = []

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; what is done with one before the next is asked for is its step."""
        end = DeviceTime(self._device)
        for batch in batches:
            self._gaps.append((end, DeviceTime(self._device)))
            yield batch
            end = DeviceTime(self._device)

    def take(self) -> float:
        """Seconds since it was last asked for; waits for the device."""
        gaps, self._gaps = self._gaps, []
        return sum(end.seconds_until(start) for end, start in gaps)


class StepTimer:
    """How long the stages of steps take, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str | None, DeviceTime]] = []

    def begin(self) -> None:
        """A step begins."""
        self._marks.append((None, DeviceTime(self._device)))

    def end(self, name: str) -> None:
        """A stage ends that began where the one before it ended, or the step began."""
        self._marks.append((name, DeviceTime(self._device)))

    def take(self) -> dict[str, float]:
        """Seconds in each stage since it was last asked for; waits for the device."""
        marks, self._marks = self._marks, []
        seconds: dict[str, float] = {}
        for (_, start), (name, end) in pairwise(marks):
            if name is not None:
                seconds[name] = seconds.get(name, 0.0) + start.seconds_until(end)
        return seconds
