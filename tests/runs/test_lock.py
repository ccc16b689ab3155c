"""One run folder, one writer: whoever comes second is told of the first and touches nothing."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from safer_fast.runs import lock as run_lock
from safer_fast.runs import lock_file
from safer_fast.runs.layout import LOCK
from safer_fast.runs.lock import RunLock
from tests.support.kills import Moment, Patch, Server, State, send

STEP = "safer_fast.training.step.Step.update"
REFUSED = "error: --output: expected a folder that no other run writes, got "


def becomes(value: float, _: object) -> float:
    return value


def constant(name: str, value: float) -> Patch:
    """Another value of a constant of runs/lock.py."""
    return Patch(f"safer_fast.runs.lock.{name}", partial(becomes, value))


QUICK = constant("WAIT_S", 0.3)


@pytest.fixture(scope="module")
def twin(finished: Path) -> State:
    """A run that was alone."""
    return State.of(finished)


def wait_for(is_so: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def pause(here: Path) -> None:
    """This process makes a file, and goes on when it is gone."""
    here.touch()
    wait_for(lambda: not here.exists())


def another_name(run: Path) -> Path:
    """The same folder, for a second process: what a process says lies beside its folder."""
    other = run.with_name("other")
    if not other.is_symlink():
        other.symlink_to(run)
    return other


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files by name, with the numbers that the file system knows them by."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("every_steps", ["null", "1"])
@pytest.mark.parametrize("is_asleep", [False, True])
def test_the_second_of_two_is_refused_and_touches_nothing(
    every_steps: str, is_asleep: bool, server: Server, flags: list[str], twin: State, tmp_path: Path
) -> None:
    run, here = tmp_path / "run", tmp_path / "here"
    flags = [*flags, f"--checkpoint.every_steps={every_steps}"]
    first = server.start(run, flags, Moment(STEP, 6, act=partial(pause, here)))
    wait_for(here.exists)
    time.sleep(0.3)  # its thread writes the checkpoint of the step before
    if is_asleep:
        first.send(signal.SIGSTOP)
    before = contents(run)
    assert json.loads((run / LOCK).read_text())["pid"] == first.pid
    for mode in ("auto", "must"):
        ending = server.train(another_name(run), [*flags, f"--resume={mode}"], QUICK)
        assert (ending.status, ending.output) == (2, "")
        assert ending.errors.startswith(
            f"{REFUSED}{another_name(run)}, which is written by process {first.pid} "
        )
        assert f" on {socket.gethostname()}, since 20" in ending.errors
        assert ending.errors.count("\n") == 1
    assert contents(run) == before
    first.send(signal.SIGCONT)
    here.unlink()
    ending = first.ending()
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert State.of(run).differences(twin) == []


def test_a_finished_run_leaves_no_lock(twin: State) -> None:
    assert LOCK not in twin.names


@pytest.mark.slow
@pytest.mark.parametrize("is_there", [False, True])
def test_of_two_that_begin_at_once_one_trains(
    is_there: bool, server: Server, flags: list[str], twin: State, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if is_there:
        run.mkdir()
    both = [server.start(name, flags, QUICK) for name in (run, another_name(run))]
    endings = sorted((training.ending() for training in both), key=lambda ending: ending.status)
    assert [ending.status for ending in endings] == [0, 2]
    assert endings[1].errors.startswith(REFUSED)
    assert State.of(run).differences(twin) == []


def fork_a_worker(file: Path) -> None:
    """A process that holds all that this one has opened, and outlives it."""
    if (pid := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    file.write_text(str(pid))
    send(signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_owner_that_leaves_workers_is_followed_at_once(
    server: Server, flags: list[str], twin: State, tmp_path: Path
) -> None:
    run, file = tmp_path / "run", tmp_path / "worker"
    kill = Moment(STEP, 6, act=partial(fork_a_worker, file))
    assert server.train(run, flags, kill).status == -signal.SIGKILL
    worker = int(file.read_text())
    assert (run / LOCK).exists()
    ending = server.train(run, flags, constant("WAIT_S", 0.0))
    os.kill(worker, signal.SIGKILL)  # was still there
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert "resumed from" in ending.output
    assert State.of(run).differences(twin) == []


@pytest.mark.slow
def test_an_owner_that_is_about_to_end_is_waited_for(
    server: Server, flags: list[str], twin: State, tmp_path: Path
) -> None:
    run, here = tmp_path / "run", tmp_path / "here"
    first = server.start(run, flags, Moment(STEP, 6, act=partial(pause, here)))
    wait_for(here.exists)
    threading.Timer(1, lambda: first.send(signal.SIGKILL)).start()
    ending = server.train(another_name(run), flags)
    assert first.ending().status == -signal.SIGKILL
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert State.of(run).differences(twin) == []


def foreign(**changes: Any) -> bytes:
    """What an owner on another machine writes."""
    owner = {"host": "elsewhere", "machine": "another", "pid": 7, "since": "2026-01-01 12:00:00"}
    return json.dumps({**owner, "claim": "c", "beats": 3, **changes}).encode()


@pytest.mark.slow
def test_a_run_of_another_machine_is_taken_over_when_it_is_silent(
    server: Server, flags: list[str], twin: State, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert server.train(run, flags, Moment(STEP, 6)).status == -signal.SIGKILL
    (run / LOCK).write_bytes(foreign())
    os.utime(run / LOCK, (0, time.time() - 1000))
    ending = server.train(run, flags, constant("BEAT_S", 0.4))
    assert (ending.status, ending.errors) == (0, ""), ending.output
    owner = "process 7 on elsewhere, since 2026-01-01 12:00:00"
    sign = re.escape(f"{owner}, wrote it and gave its last sign of life ")
    assert re.search(rf"{sign}10\d\d s ago; waits 1 s", ending.output), ending.output
    taken_over = rf"{re.escape(f'{run}: taken over from {owner}')}, silent for 10\d\d s\n"
    assert re.search(taken_over, ending.output), ending.output
    assert State.of(run).differences(twin) == []


def test_a_run_of_another_machine_that_lives_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 2)
    (tmp_path / LOCK).write_bytes(foreign())
    os.utime(tmp_path / LOCK, (0, 0))
    beat = threading.Timer(0.5, lambda: (tmp_path / LOCK).write_bytes(foreign(beats=4)))
    beat.start()
    with RunLock() as lock, pytest.raises(ValueError, match="written by process 7 on elsewhere"):
        lock.take(tmp_path)
    beat.join()
    assert (tmp_path / LOCK).read_bytes() == foreign(beats=4)


def test_clocks_that_differ_make_nobody_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "LEASE_S", 0.3)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.1)
    (tmp_path / LOCK).write_bytes(foreign())
    os.utime(tmp_path / LOCK, (0, time.time() + 1e6))
    lines: list[str] = []
    with RunLock(lines.append) as lock:
        lock.take(tmp_path)
    assert len(lines) == 2


def test_without_locks_signs_of_life_count_and_this_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    for name, seconds in {"LEASE_S": 1.0, "BEAT_S": 0.1, "SETTLE_S": 0.2}.items():
        monkeypatch.setattr(run_lock, name, seconds)
    lines: list[str] = []
    with RunLock(lines.append) as first, RunLock(lines.append) as second:
        first.take(tmp_path)
        assert lines == []
        # this process knows its own lock: as another one would see it
        monkeypatch.setattr(lock_file, "_HELD", set())
        with pytest.raises(ValueError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            second.take(tmp_path)
    assert "its file system has no locks" in lines[0]
    assert not (tmp_path / LOCK).exists()


def test_an_owner_whose_folder_was_taken_over_ends_at_once(server: Server, tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from safer_fast.runs import lock as run_lock
run_lock.BEAT_S = 0.1
with run_lock.RunLock() as lock:
    lock.take(Path({str(tmp_path)!r}))
    print("taken", flush=True)
    time.sleep(60)
"""
    process = server.program("-c", code)
    assert process.readline() == "taken\n"
    mine = foreign(host="there")
    (tmp_path / LOCK).write_bytes(mine)
    _, errors = process.communicate(timeout=20)
    expected = "taken over by process 7 on there, since 2026-01-01 12:00:00: this process ends"
    assert (process.returncode, errors) == (2, f"error: {tmp_path} was {expected}\n")
    assert (tmp_path / LOCK).read_bytes() == mine


def test_a_lock_that_was_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    with RunLock() as lock:
        lock.take(tmp_path)
        (tmp_path / LOCK).unlink()
        wait_for((tmp_path / LOCK).exists, 10)
    assert not (tmp_path / LOCK).exists()


def test_two_of_one_process_are_told_apart(tmp_path: Path) -> None:
    with RunLock() as first, RunLock() as second:
        first.take(tmp_path)
        first.take(tmp_path)
        with pytest.raises(ValueError, match="written by this process"):
            second.take(tmp_path)
        first.release()
        second.take(tmp_path)
        assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\xff" * 600, b"7"])
def test_nonsense_in_the_file_names_nobody(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with RunLock() as lock:
        lock.take(tmp_path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    run = tmp_path / "run"
    run.mkdir()
    make = {
        "link": lambda path: path.symlink_to(victim),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
    }
    make[kind](run / LOCK)
    with RunLock() as lock, pytest.raises(ValueError, match="--output: expected a folder that can"):
        lock.take(run)
    assert not victim.exists()
