"""Signals are noticed between two steps, and end a run in time."""

import os
import signal
import textwrap
import threading
import time

import pytest

from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.signals import SIGNALS, Stopped, Stops, ending_at_once
from tests.support.kills import Server


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noticed_at_the_next_check(number: signal.Signals) -> None:
    with Stops(Ranks(), grace_s=60) as stops:
        assert stops.check() is False
        assert stops.check(wish=True) is True
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            stops.check()
    assert (stopped.value.signal, stopped.value.code) == (number, 128 + number)


def test_what_is_watched_comes_until_a_signal_does() -> None:
    with Stops(Ranks(), grace_s=60) as stops:
        values = stops.watch(range(10))
        assert [next(values), next(values)] == [0, 1]
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            next(values)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_at_once_what_has_nothing_to_lose(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before, cleaned = [signal.getsignal(each) for each in SIGNALS], []

    @ending_at_once("stopped")
    def be_asked() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned.append(number)

    with pytest.raises(Stopped) as stopped:
        be_asked()
    assert (stopped.value.signal, cleaned) == (number, [number])
    assert capsys.readouterr() == (f"{number.name}: stopped\n", "")
    assert [signal.getsignal(each) for each in SIGNALS] == before
    timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)


def test_under_torchrun_signals_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with ending_at_once():
        assert [signal.getsignal(number) for number in SIGNALS] == before


def test_handlers_are_those_of_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stops(Ranks(), grace_s=60):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def ending(server: Server, code: str) -> tuple[int, str]:
    """Status and errors of a program that has Stops entered."""
    program = "import os, signal, time\nfrom safer_fast.runtime.ranks import Ranks\n"
    program += "from safer_fast.runtime.signals import Stops\n" + textwrap.dedent(code)
    result = server.run("-c", program, timeout=60)
    return result.returncode, result.stderr


def test_a_second_signal_ends_the_process_at_once(server: Server) -> None:
    status, errors = ending(
        server,
        """
        with Stops(Ranks(), grace_s=60):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        """,
    )
    assert (status, errors) == (130, "")


def test_a_process_that_does_not_end_in_time_is_ended_with_a_line(server: Server) -> None:
    status, errors = ending(
        server,
        """
        with Stops(Ranks(), grace_s=0.2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        """,
    )
    assert status == 143
    assert errors.startswith("error: SIGTERM: ")
    assert errors.count("\n") == 1
    assert "checkpoint.grace_s=0.2" in errors
