"""Processes that are stopped or killed, clocks that go back, folders that become read-only."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime import ranks
from tests.support.kills import (
    Moment,
    Patch,
    Server,
    Setting,
    State,
    checkpoints_of,
    flags_for,
    kill,
    lines_of,
    send,
)
from tests.support.ranks import FLAGS, Torchrun, assert_status, training, write_digits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TRAINER = "safer_fast.training.trainer.Trainer"
READ = "safer_fast.data.reading.Reader.__getitems__"
SAID = "safer_fast.data.bad_images.BadImages.say_once"
WORKERS = ["--data.num_workers=2", "--data.prefetch=1"]
STOP = partial(send, signal.SIGSTOP)


QUICK = [
    Setting("safer_fast.data.workers", "LOOK_S", 0.02),
    Setting("safer_fast.data.workers", "LOOKS_UNTIL_SAID", 3),
]


@pytest.fixture(scope="module")
def flags(photos: Path) -> list[str]:
    """A run whose images come from worker processes."""
    return flags_for(photos, "torch", *WORKERS)


@pytest.fixture(scope="module")
def twin(server: Server, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> State:
    """The same run, which nothing happens to."""
    folder = tmp_path_factory.mktemp("twin") / "run"
    assert server.train(folder, flags).status == 0
    return State.of(folder)


# worker processes


def children() -> list[int]:
    pid = os.getpid()
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def and_wake(say: Callable[..., None]) -> Callable[..., None]:
    """Wake stopped workers as soon as something is said."""

    def say_and_wake(*arguments: Any) -> None:
        say(*arguments)
        for pid in children():
            os.kill(pid, signal.SIGCONT)

    return say_and_wake


def test_workers_that_are_stopped_for_a_while_change_nothing(
    server: Server, flags: list[str], twin: State, tmp_path: Path
) -> None:
    stopped, woken = Moment(READ, 2, act=STOP), Patch(SAID, and_wake)
    ending = server.train(tmp_path / "run", flags, *QUICK, stopped, woken)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert "data.num_workers: still waits for worker processes " in ending.output
    assert " stopped (kill -CONT continues them)" in ending.output
    assert State.of(tmp_path / "run").differences(twin) == []


def stop_workers_and_end() -> None:
    """All workers are stopped, and the run is asked to end."""
    for pid in children():
        os.kill(pid, signal.SIGSTOP)
    send(signal.SIGTERM)


def test_a_run_that_is_asked_to_end_does_not_wait_for_workers_that_are_stopped(
    server: Server, flags: list[str], twin: State, tmp_path: Path
) -> None:
    run, update = tmp_path / "run", "safer_fast.training.step.Step.update"
    status, output, errors = server.train(run, flags, Moment(update, 5, act=stop_workers_and_end))
    assert (status, errors) == (143, ""), output
    assert "SIGTERM: stopped after step 5" in output
    ending = server.train(run, flags)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert State.of(run).differences(twin) == []


ENDED = {
    "stopped": (STOP, "batches of worker processes, got none of worker processes "),
    "killed": (kill, "worker processes that live, got: DataLoader worker (pid(s) "),
}


def test_workers_that_end_or_are_stopped_for_ever_end_a_run_that_goes_on(
    server: Server, flags: list[str], twin: State, tmp_path: Path
) -> None:
    soon = Setting("safer_fast.data.workers", "MOST_LOOKS", 9)
    started = {}
    for name, (act, _) in ENDED.items():  # side by side: torch takes five seconds to notice
        late = Moment("safer_fast.data.reading.start_loader", 6, act=Moment(READ, 2, act=act).arm)
        changes = [*QUICK, soon, late] if act is STOP else [late]
        started[name] = server.start(tmp_path / name, flags, *changes)
    for name, (_, expected) in ENDED.items():
        status, output, errors = started[name].ending()
        assert status == 2, output + errors
        assert errors.startswith(f"error: --data.num_workers: expected {expected}"), errors
        assert "then resume with --resume" in errors
        assert errors.count("\n") == 1
        assert checkpoints_of(tmp_path / name)
        started[name] = server.start(tmp_path / name, flags)
    for name in ENDED:
        status, output, errors = started[name].ending()
        assert (status, errors) == (0, ""), output
        assert State.of(tmp_path / name).differences(twin) == []


# commands that write no checkpoints

BUSY = {
    "evaluate": "safer_fast.evaluation.setup.load_run",
    "select": "safer_fast.runs.folder.load_run",
    "export": "pathlib.Path.chmod",  # of the folder that is full, before it gets its name
    "report": "safer_fast.report.write_report",
    "doctor": "safer_fast.doctor.diagnose",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", BUSY)
def test_a_command_that_is_asked_to_end_does_so_at_once_and_leaves_nothing(
    name: str, number: signal.Signals, server: Server, small_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    before = sorted(path for path in run.rglob("*") if path.name != "evaluation")
    words = [f"--output={run}"] if name == "doctor" else [str(run)]
    asked = Moment(BUSY[name], act=partial(send, number))
    ending = server.start_command(name, words, run, [asked]).ending(20)
    assert ending == (128 + number, "", ""), ending
    after = sorted(path for path in run.rglob("*") if path.name != "evaluation")
    assert after == before


DRY_RUN = """
import sys, tempfile
from safer_fast.runtime.command import run
from safer_fast.train import main

tempfile.tempdir = sys.argv.pop(1)
run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_dry_run_that_is_asked_to_end_does_not_wait_for_a_checkpoint(
    number: signal.Signals,
    server: Server,
    flags: list[str],
    tmp_path: Path,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = ["-c", DRY_RUN, str(temporary), *flags, "--data.num_workers=0"]
    words += ["--dry-run", "--epochs=40", "--resume=never", "--attack.max_steps=4000"]
    words += ["--attack.steps=4000"]  # a step lasts longer than this test waits
    process = server.program(*words)
    said = []
    while not (said and said[-1].startswith("warm-up: up to")):
        said.append(process.readline())
        assert said[-1], process.communicate()
    time.sleep(0.5)
    (folder,) = temporary.glob("tmp*/run")
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (128 + number, ""), output
    assert output.splitlines()[-1] == f"{number.name}: stopped; nothing was written"
    assert "checkpoint" not in output
    assert not folder.parent.exists()


# clocks


def and_back(_: Callable[[], float], start: float) -> Callable[[], float]:
    """A clock that goes back by a day whenever somebody looks at it."""
    days = itertools.count()
    return lambda: start - 86400.0 * next(days)


def test_a_clock_that_goes_back_changes_nothing(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    run, twin = tmp_path / "run", tmp_path / "twin"
    flags = flags_for(photos, "device", "--checkpoint.every_steps=null")
    flags += ["--checkpoint.every_minutes=1e-6", "--checkpoint.keep=30"]
    others = server.start(twin, flags)
    clock = partial(Patch, "time.time")
    end = Moment("safer_fast.training.step.Step.update", 10)
    ending = server.train(run, flags, clock(partial(and_back, start=1.8e9)), end)
    assert ending.status == -signal.SIGKILL, ending
    found = checkpoints_of(run)
    assert len(found) > 2
    (before,) = run.glob("events.out.tfevents.*")
    for age, path in enumerate(found):  # the newest by their steps are the oldest by the clock
        os.utime(path, (1.7e9 - age * 86400, 1.7e9 - age * 86400))
    ending = server.train(run, flags, clock(partial(and_back, start=1.6e9)))
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert f"resumed from {found[-1]}" in ending.output
    (after,) = run.glob("events.out.tfevents.*")
    assert after.name > before.name
    assert others.ending().status == 0
    assert State.of(run).differences(State.of(twin)) == []
    times = [event["time_s"] for event in read_metrics(run / "metrics.jsonl")]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 600


# folders that become read-only

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of linux/sched.h


@dataclass(frozen=True)
class OwnMounts:
    """Hides from all others what the process of a run mounts."""

    def arm(self) -> None:
        assert ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def remount(folder: Path) -> None:
    """The folder is read-only from now on, for this process alone."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)


def refuse(folder: Path) -> None:
    """The same where nothing may be mounted: the calls that write there fail."""
    for name in ("open", "unlink", "replace", "rename", "mkdir", "link"):
        Patch(f"os.{name}", partial(refusing, folder)).arm()


def refusing(folder: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which changes nothing in the folder."""

    def guarded(path: Any, *arguments: Any, **settings: Any) -> Any:
        flags = arguments[0] if arguments and function.__name__ == "open" else os.O_RDWR
        if str(path).startswith(str(folder)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return function(path, *arguments, **settings)

    return guarded


def can_mount() -> bool:
    words = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/tmp"]
    try:
        return subprocess.run(words, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.parametrize("change", [remount, refuse], ids=["remounted", "refused"])
def test_a_run_whose_folder_becomes_read_only_ends_with_one_line_and_goes_on_later(
    change: Callable[[Path], None], server: Server, photos: Path, twin: State, tmp_path: Path
) -> None:
    if change is remount and not can_mount():
        pytest.skip("nothing may be mounted here")
    run, flags = tmp_path / "run", flags_for(photos, "torch", *WORKERS, "--data.num_workers=0")
    changes = [OwnMounts()] if change is remount else []
    late = Moment("safer_fast.training.step.Step.update", 10, act=partial(change, run))
    status, output, errors = server.train(run, flags, *changes, late)
    assert status == 2, output + errors
    assert errors == f"error: {run / 'best.safetensors'}: Read-only file system\n"
    assert "metrics.jsonl cannot be written: Read-only file system; lines are kept" in output
    assert "training continues, the last one is" in output
    newest = checkpoints_of(run)[-1]
    ending = server.train(run, flags)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert f"resumed from {newest}" in ending.output
    assert State.of(run).differences(twin) == []


# ranks


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag of a small set of digits."""
    return f"--data.path={write_digits(tmp_path_factory.mktemp('digits') / 'digits.npz')}"


def own_rank() -> int:
    return int(os.environ["RANK"])


def fall_silent(rank: int, where: str, call: int) -> None:
    """This rank is stopped for ever, and the others soon lose their patience."""
    ranks.ANSWER_S = 2.0
    if rank == own_rank():
        Moment(where, call, act=STOP).arm()


# rank, function, call: one after the other in the same run, which is resumed each time
SILENT = [
    (0, "safer_fast.runtime.ranks._rendezvous", 1),
    (1, "safer_fast.runtime.ranks._rendezvous", 1),
    (0, f"{TRAINER}.take_step", 6),
    (1, f"{TRAINER}.take_step", 4),
]


@pytest.fixture(scope="module")
def undisturbed(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    assert_status(0, training(2, [*FLAGS, digits, f"--output={folder}"]).endings())
    return folder


def test_a_rank_that_is_stopped_for_ever_ends_the_others_with_one_line(
    digits: str, tmp_path: Path, undisturbed: Path
) -> None:
    flags = [*FLAGS, digits, f"--output={tmp_path / 'run'}", "--checkpoint.every_steps=1"]
    for rank, *where in SILENT:
        team = training(2, [*flags, "--resume=auto"], partial(fall_silent, rank, *where))
        silent, other = team.processes[rank], team.processes[1 - rank]
        assert wait([other.sentinel], 60)
        assert silent.is_alive()
        silent.kill()
        endings = team.endings()
        assert endings[1 - rank].status == 2, endings[1 - rank].output
        lines = endings[1 - rank].output.splitlines()
        (error,) = [line for line in lines if line.startswith("error: ")]
        assert error.startswith(
            f"error: rank {1 - rank}: expected an answer of all ranks within 2 s, got none: one is "
            "stopped or hangs"
        )
        assert "Traceback" not in endings[1 - rank].output
    assert_status(0, training(2, [*flags, "--resume=must"]).endings())
    assert_same(tmp_path / "run", undisturbed)


def assert_same(folder: Path, other: Path) -> None:
    """The same weights and the same lines, but for what is measured."""
    for name in ("model.safetensors", "best.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert lines_of(folder) == lines_of(other)


# torchrun


LONG = ["--epochs=6", "--selection.every_epochs=4", "--evaluation.every_epochs=6"]


@contextmanager
def load(num_processes: int) -> Iterator[None]:
    """Processes that compute all the while."""
    busy = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(busy) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(is_so: Callable[[], object], torchrun: Torchrun) -> None:
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline, torchrun.output()
        assert torchrun.process.poll() is None, torchrun.output()
        time.sleep(0.005)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max([int(path.stem.removeprefix("step-")) for path in checkpoints_of(folder)], default=0)


def test_ranks_that_are_stopped_for_a_while_and_killed_under_load_end_with_the_same_bits(
    digits: str, tmp_path: Path
) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    flags = [*FLAGS, *LONG, digits, "--checkpoint.every_steps=1", "--resume=auto"]
    team = training(2, [*flags, f"--output={other}"])
    options = ["--nproc-per-node=2", "--max-restarts=1"]
    with Torchrun(tmp_path / "out.txt", options, [*flags, f"--output={folder}"]) as torchrun:
        wait_for(lambda: newest(folder) >= 3, torchrun)
        first, second = torchrun.ranks()
        os.kill(second, signal.SIGSTOP)
        time.sleep(0.3)  # what is under way comes to its end
        stood = newest(folder)
        time.sleep(0.3)
        assert newest(folder) == stood
        os.kill(second, signal.SIGCONT)
        with load(1):
            wait_for(lambda: newest(folder) > stood + 2, torchrun)
            os.kill(first, signal.SIGKILL)  # it writes
            wait_for(lambda: first not in torchrun.ranks(), torchrun)
            ending = torchrun.ending()
    assert ending.status == 0, ending.output
    assert ending.output.count("resumed from") == 1, ending.output
    assert_status(0, team.endings())
    assert_same(folder, other)
