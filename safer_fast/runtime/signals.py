"""SIGINT and SIGTERM: noticed between two steps, on all ranks at once; or obeyed at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from safer_fast.runtime.ranks import Ranks, is_under_torchrun

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_S = 1.0
"""Seconds within which torchrun forwards a signal that was also sent to all processes."""
CLEAN_UP_S = 5.0
"""Seconds after which a process ends that a signal has ended, though it still cleans up."""
T = TypeVar("T")


class Stopped(SystemExit):
    """Ends the run at a safe point after a signal, with the exit status 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def ending_at_once(said: str = "", numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Context in which a signal raises Stopped wherever the main thread is, so that files are
    removed that should not stay.

    A second one ends the process without that. Signals are left alone outside the main thread and
    under torchrun, whose processes may wait for one another where no signal is noticed. said: words
    for the line that is printed then; none: no line.
    """
    handlers: dict[signal.Signals, Any] = {}
    timers: list[threading.Timer] = []

    def end(number: int, _: object) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)
        timers.append(_end_after(CLEAN_UP_S, number, ""))
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread() and not is_under_torchrun():
        for each in numbers:
            handlers[each] = signal.signal(each, end)
    try:
        yield
    except Stopped as stop:
        if said and timers:
            print(f"{stop.signal.name}: {said}", flush=True)
        raise
    finally:
        for timer in timers:
            timer.cancel()
        for each, handler in handlers.items():
            signal.signal(each, handler)


class Stops:
    """Context in which SIGINT and SIGTERM end the run at its next `check`.

    A second signal ends the process at once, as does the first if the process is still running
    after `grace_s` seconds. If a scheduler or terminal sends a signal to all processes and torchrun
    forwards its own, both count as the first. Signals are left alone outside the main thread.
    ranks: all stop at the same check when one receives a signal. awaited: words for a check, for
    the line that says that none came in time.
    """

    def __init__(
        self,
        ranks: Ranks,
        grace_s: float,
        awaited: str = "at its next checkpoint within checkpoint.grace_s=",
    ) -> None:
        self._ranks, self._grace_s = ranks, grace_s
        self.awaited = awaited
        self._received, self._received_at = 0, 0.0
        self._handlers: dict[signal.Signals, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Stops:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def check(self, wish: bool = False) -> bool:
        """Return True if any rank passes `wish`; raise Stopped if any rank received a signal.

        All ranks must call it equally often. With several ranks the answer is that of the previous
        call, see `Ranks.agree`.
        """
        received, wished = self._ranks.agree([self._received, int(wish)])
        if received:
            raise Stopped(received)
        return bool(wished)

    def watch(self, values: Iterable[T]) -> Iterator[T]:
        """Yield the values, with a check before each."""
        for value in values:
            self.check()
            yield value

    def _receive(self, number: int, _: object) -> None:
        if self._received:
            is_same = is_under_torchrun() and time.monotonic() - self._received_at < SAME_S
            if not is_same:
                _end_now(number, "")
            return
        self._received, self._received_at = number, time.monotonic()
        name = signal.Signals(number).name
        reason = f"{name}: not {self.awaited}{self._grace_s:g}"
        self._timer = _end_after(self._grace_s, number, reason)


def _end_after(seconds: float, number: int, reason: str) -> threading.Timer:
    timer = threading.Timer(seconds, _end_now, (number, reason))
    timer.daemon = True
    timer.start()
    return timer


def _end_now(number: int, reason: str) -> None:
    """End the process without clean-up: files are written whole or not at all anyway."""
    if reason:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(128 + number)
