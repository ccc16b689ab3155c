"""Loading leaves no process, thread or memory behind, in whatever way a run ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils import signal_handling

from safer_fast.config.schema import DataConfig
from safer_fast.data import Loader, load_data
from tests.support.kills import Server
from tests.support.programs import Program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BACKENDS = ["torch", "dali"]
NUM_FILES, NUM_LINKS = 8, 200
# The tiniest model, and epochs of many seconds: what is done to a run is done in mid-epoch.
TRAINING = [
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 32, num_heads: 1}",
    "--model.patch_size=24",
    "--data.image_size=72",
    "--data.num_workers=2",
    "--attack.steps=1",
    "--batch_size=4",
    "--epochs=1000",
    "--selection.warmup_epochs=999",
    "--evaluation.every_epochs=1000",
    "--runtime.log_every_steps=20",
    "--runtime.num_threads=1",
    "--runtime.compile=off",
]
ONE_LINE = "error: --data.num_workers: expected worker processes that live, got: "


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few small JPEGs of noise under many names."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for number in range(NUM_FILES):
        file = folder / "ab"[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90, 100, 3), dtype=np.uint8)).save(file)
        for copy in range(NUM_LINKS):
            file.with_name(f"{number}-{copy}.jpg").hardlink_to(file)
    return folder


def load(path: Path, backend: Any, **settings: Any) -> Loader:
    needs(backend)
    config = DataConfig(path=str(path), image_size=72, backend=backend, **settings)
    return load_data(config, batch_size=4, seed=0).train


def needs(backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")


Started = Callable[..., Program]


@pytest.fixture
def started(server: Server) -> Iterator[Started]:
    """Starts Python in a session of its own, which ends with the test."""
    processes = []

    def start(*arguments: object) -> Program:
        processes.append(server.program(*map(str, arguments)))
        return processes[-1]

    yield start
    for process in processes:
        for pid in processes_of(session=process.pid):
            os.kill(pid, signal.SIGKILL)
        process.end()


def processes_of(session: int | None = None, parent: int | None = None) -> list[int]:
    """The living processes of a session or a parent."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, its_parent, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if state not in "ZX" and (session, parent) in [
            (int(its_session), None),
            (None, int(its_parent)),
        ]:
            found.append(int(stat.parent.name))
    return found


def wait_until(is_so: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {seconds} seconds"
        time.sleep(0.02)


class Ending(NamedTuple):
    status: int
    errors: str
    num_orphans: int


def ending_of(process: Program, seconds: float = 60) -> Ending:
    """The end of the process; its orphans are counted at that moment."""
    status = process.wait(seconds)
    num_orphans = len(processes_of(session=process.pid))
    return Ending(status, process.communicate(timeout=seconds)[1], num_orphans)


class Training(NamedTuple):
    process: Program
    folder: Path

    @property
    def workers(self) -> list[int]:
        return processes_of(parent=self.process.pid)

    def wait_for_steps(self) -> None:
        def has_taken_some() -> bool:
            assert self.process.poll() is None, self.process.communicate()[1]
            log = self.folder / "metrics.jsonl"
            return log.exists() and '"event": "step"' in log.read_text()

        wait_until(has_taken_some, 120)
        time.sleep(0.1)  # it takes further steps after the one that it has just logged


def train(started: Started, photos: Path, folder: Path, backend: str) -> Training:
    flags = ["--data.path", photos, "--data.backend", backend, "--output", folder]
    return Training(started("-m", "safer_fast.train", *flags, *TRAINING), folder)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupt_ends_training_at_once_and_in_silence(
    backend: str, started: Started, photos: Path, tmp_path: Path
) -> None:
    needs(backend)
    # A terminal interrupts all processes, kill the main one. Side by side: most of it is importing.
    alone, together = (train(started, photos, tmp_path / name, backend) for name in "ab")
    for training in (alone, together):
        training.wait_for_steps()
        assert len(training.workers) == (2 if backend == "torch" else 0)
    alone.process.send_signal(signal.SIGINT)
    os.killpg(together.process.pid, signal.SIGINT)
    for training in (alone, together):
        assert ending_of(training.process, seconds=20) == Ending(130, "", 0)


STREAM = """
import itertools, sys
from safer_fast.config import DataConfig
from safer_fast.data import load_data

config = DataConfig(path=sys.argv[1], image_size=72, num_workers=2, backend="torch")
loader = load_data(config, batch_size=4, seed=0).train
for epoch in itertools.count(1):
    for number, _ in enumerate(loader.epoch(epoch)):
        if (epoch, number) == (1, 2):
            print("in mid-epoch", flush=True)
            while sys.argv[2] == "idle":
                pass
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_workers_do_not_outlive_a_main_process_that_is_killed(
    state: str, started: Started, photos: Path
) -> None:
    streams = {
        number: started("-c", STREAM, photos, state) for number in (signal.SIGTERM, signal.SIGKILL)
    }
    for number, process in streams.items():
        assert process.readline() == "in mid-epoch\n"
        assert len(processes_of(session=process.pid)) == 3
        if number == signal.SIGTERM:
            os.killpg(process.pid, number)  # as a scheduler does
        else:
            process.send_signal(number)
    for number, process in streams.items():
        assert process.wait(5) == -number
    wait_until(lambda: not any(processes_of(session=each.pid) for each in streams.values()), 15)


def send(*signals: signal.Signals, to: list[int]) -> None:
    """As a terminal or a scheduler does: the workers' main process is not who sends."""
    for number in signals:
        subprocess.run(["kill", f"-{number.value}", *map(str, to)], check=True)


def test_workers_continue_when_all_processes_are_asked_to_end(photos: Path) -> None:
    others = processes_of(parent=os.getpid())  # those that compile, where a test before did
    loader = load(photos, "torch", num_workers=2, max_images=80)
    expected = [
        batch.images for batch in load(photos, "torch", num_workers=0, max_images=80).epoch(1)
    ]
    images = []
    for index, batch in enumerate(loader.epoch(1)):
        images.append(batch.images)
        if index in (0, 3, 8):
            workers = [pid for pid in processes_of(parent=os.getpid()) if pid not in others]
            assert len(workers) == 2
            send(signal.SIGINT, signal.SIGTERM, to=workers)
    assert len(images) == 20
    assert all(torch.equal(*pair) for pair in zip(images, expected, strict=True))
    assert not set(processes_of(parent=os.getpid())) - set(others)


def test_workers_that_have_just_started_go_on_too(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_handlers = signal_handling._set_worker_signal_handlers

    def set_handlers_late() -> None:
        time.sleep(0.5)
        set_handlers()

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", set_handlers_late)
    others = set(processes_of(parent=os.getpid()))
    loader = load(photos, "torch", num_workers=2, max_images=40)

    def workers() -> list[int]:
        return [pid for pid in processes_of(parent=os.getpid()) if pid not in others]

    def ask_to_end() -> None:
        wait_until(lambda: len(workers()) == 2, 5)
        send(signal.SIGINT, signal.SIGTERM, to=workers())

    sender = threading.Thread(target=ask_to_end)
    sender.start()
    assert len(list(loader.epoch(1))) == 10
    sender.join()


def test_workers_end_when_their_main_process_asks(photos: Path) -> None:
    batches = load(photos, "torch", num_workers=2).epoch(1)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()  # the last resort of torch and of multiprocessing
        worker.join(2)
        assert worker.exitcode == 0
    with pytest.raises(
        ValueError, match=r"^data\.num_workers: expected worker processes that live"
    ):
        list(batches)


HELD = """
import sys
from safer_fast.config import DataConfig
from safer_fast.data import load_data

config = DataConfig(path=sys.argv[1], image_size=72, num_workers=2, backend="torch")
batches = load_data(config, batch_size=4, seed=0).train.epoch(1)
next(batches)
print("in mid-epoch", flush=True)
"""
# Much to decode at the start, and not by this process alone.
DECODING = """
import sys
from safer_fast.runtime.command import run
from safer_fast.config import DataConfig
from safer_fast.data import load_data, reading

reading.BYTES_PER_TASK = 2**15

def load(_):
    config = DataConfig(path=sys.argv[1], image_size=64, num_workers=2, backend="device")
    config.augmentation = "crop"
    print("loading", flush=True)
    while True:
        load_data(config, batch_size=4, seed=0)

run(load)
"""


def test_no_worker_keeps_a_process_from_its_end(started: Started, photos: Path) -> None:
    held, decoding = started("-c", HELD, photos), started("-c", DECODING, photos)
    assert decoding.readline() == "loading\n"
    wait_until(lambda: len(processes_of(parent=decoding.pid)) == 2, 30)
    os.killpg(decoding.pid, signal.SIGINT)
    assert ending_of(decoding, seconds=20) == Ending(130, "", 0)
    assert ending_of(held, seconds=30) == Ending(0, "", 0)


# In a process of its own, of which nothing else has used DALI or filled the heap.
PIPELINES = """
import gc, sys
from safer_fast.config import DataConfig
from safer_fast.data import load_data
from safer_fast.data.reading import Reader

read = Reader.__getitems__

def collect_and_read(reader, indices):
    gc.collect()
    return read(reader, indices)

def load(backend, num_workers):
    config = DataConfig(path=sys.argv[1], image_size=72, backend=backend, max_images=8)
    config.num_workers = num_workers
    return load_data(config, batch_size=4, seed=0).train

Reader.__getitems__ = collect_and_read
gc.disable()
list(load("dali", 2).epoch(1))
# one that has ended, in a circle of references: workers must not collect it
print(sum(type(each).__name__ == "Pipeline" for each in gc.get_objects()))
print(len(list(load("torch", 2).epoch(1))), gc.isenabled())
gc.enable()
print(len(list(load("torch", 2).epoch(1))), gc.isenabled())
"""


def test_workers_leave_the_pipelines_of_their_main_process_alone(
    started: Started, photos: Path
) -> None:
    needs("dali")
    process = started("-c", PIPELINES, photos)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert output.split() == ["1", "2", "False", "2", "True"]


def test_dali_leaves_the_handlers_of_signals_alone(photos: Path) -> None:
    before = caught()
    for _ in load(photos, "dali", max_images=40).epoch(1):
        assert caught() == before


def caught() -> list[int]:
    """The signals that this process blocks, ignores and catches, as the system knows it; those of
    glibc left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines if line.startswith("Sig"))
    return [int(found[name], 16) & (2**31 - 1) for name in ("SigBlk", "SigIgn", "SigCgt")]


@pytest.mark.slow
def test_training_whose_worker_is_killed_ends_with_one_line(
    started: Started, photos: Path, tmp_path: Path
) -> None:
    training = train(started, photos, tmp_path / "run", "torch")
    training.wait_for_steps()
    os.kill(training.workers[0], signal.SIGKILL)
    status, errors, num_orphans = ending_of(training.process, seconds=30)
    assert (status, num_orphans) == (2, 0), errors
    assert errors.startswith(ONE_LINE)
    assert errors.count("\n") == 1


# Between two batches, as in a training step, and at random times, also while a batch is sent.
KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from random import Random
from safer_fast.runtime.command import run
from safer_fast.config import DataConfig
from safer_fast.data import load_data

config = DataConfig(path=sys.argv[1], image_size=72, num_workers=2, backend="torch")
loader = load_data(config, batch_size=4, seed=0).train
draw = Random(0)

def kill_a_worker():
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(draw.choice(children)), signal.SIGKILL)

def train_until_a_worker_dies(_):
    for number, _ in enumerate(loader.epoch(1)):
        if number == 0 and step_ms:
            kill_a_worker()
        elif number == 0:
            threading.Timer(draw.uniform(0, 0.05), kill_a_worker).start()
        until = time.perf_counter() + step_ms / 1000
        while time.perf_counter() < until:
            pass

for step_ms in (50, 0, 0, 0):
    try:
        run(train_until_a_worker_dies)
    except SystemExit as end:
        print(end.code)
"""


@pytest.mark.slow
def test_a_worker_may_die_at_any_moment(started: Started, photos: Path) -> None:
    process = started("-c", KILLED, photos)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.split() == ["2"] * 4
    assert all(line.startswith(ONE_LINE) for line in errors.splitlines()), errors
    assert errors.count("\n") == 4


def read_and_drop(loader: Loader) -> None:
    next(loader.epoch(1))


def read_and_fail(loader: Loader) -> None:
    try:
        for _ in loader.epoch(1):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def read_some_and_start_again(loader: Loader) -> None:
    first, second = loader.epoch(1), loader.epoch(2)
    next(first), next(second), next(first)


def read_a_probe(loader: Loader) -> None:
    assert len(list(loader.probe(10, 1))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "use", [read_and_drop, read_and_fail, read_some_and_start_again, read_a_probe]
)
def test_an_epoch_that_is_abandoned_leaves_nothing_behind(
    use: Callable[[Loader], None], backend: str, photos: Path
) -> None:
    loader = load(photos, backend)
    read_and_drop(loader)  # what is made once per process may stay
    before = left_behind()
    use(loader)
    until = time.monotonic() + 5  # the kernel lists a thread for a moment after it was joined
    while left_behind() != before and time.monotonic() < until:
        time.sleep(0.01)
    assert left_behind() == before


def left_behind() -> dict[str, int]:
    """Processes, threads, open files and pipelines of this process."""
    gc.collect()
    return {
        "processes": len(processes_of(parent=os.getpid())),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "pipelines": num_pipelines(),
    }


def num_pipelines() -> int:
    """The pipelines of DALI that are not yet collected."""
    module = sys.modules.get("nvidia.dali.pipeline")
    return 0 if module is None else sum(type(e) is module.Pipeline for e in gc.get_objects())


def test_what_is_left_behind_would_be_noticed(photos: Path) -> None:
    for backend, kept in {"torch": {"processes": 2}, "dali": {"pipelines": 1}}.items():
        loader = load(photos, backend)
        before = left_behind()
        batches = loader.epoch(1)
        next(batches)
        now = left_behind()
        for name, number in kept.items():
            assert now[name] == before[name] + number
        assert now["threads"] > before["threads"]
        del batches


IMAGES_PER_EPOCH, IMAGES_PER_BATCH, SIZE = 96, 32, 224
FIRST_EPOCH, LAST_EPOCH = 4, 9  # before, DALI's threads still fill their heaps
LEAK_MIB = (LAST_EPOCH - FIRST_EPOCH) * IMAGES_PER_BATCH * 3 * SIZE * SIZE / 2**20
MOST_GROWTH_MIB = 8
# Large blocks are given back when they are freed. Otherwise glibc 2.36 keeps those that torch asks
# for, aligned, between small ones, and often cannot use them again: up to 1 GiB, without any leak.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
MEMORY = f"""
import os, sys
from pathlib import Path
import torch
from safer_fast.config import DataConfig
from safer_fast.data import load_data

torch.set_num_threads(1)
config = DataConfig(path=sys.argv[1], backend=sys.argv[2], image_size={SIZE}, num_workers=2)
config.augmentation = "crop" if config.backend == "device" else "auto"
config.max_images = {IMAGES_PER_EPOCH}
loader = load_data(config, batch_size={IMAGES_PER_BATCH}, seed=0).train
assert loader.backend == sys.argv[2]

def memory_mib():
    # of this process and its workers; the libraries they share with others are left out
    children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
    total = 0
    for pid in [os.getpid(), *children]:
        for line in Path(f"/proc/{{pid}}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon", "Pss_Shmem")):
                total += int(line.split()[1])
    return total / 2**10

def growth_mib(keep):
    kept, memory = [], []
    for number in range(1, {LAST_EPOCH} + 1):
        for index, batch in enumerate(loader.epoch(number), start=1):
            batch.images.float().sum()
            if index == len(loader):
                kept += [batch] * keep
                memory.append(memory_mib())
    return memory[{LAST_EPOCH} - 1] - memory[{FIRST_EPOCH} - 1]

print(growth_mib(keep=False), growth_mib(keep=True))
"""


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Noise at a size that is resized, as JPEGs, and at one that is not, which may lie on the
    device."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    num_images = IMAGES_PER_EPOCH * 5 // 4
    for name in "ab":
        (folder / "photos" / name).mkdir(parents=True)
    for number in range(num_images):
        pixels = rng.integers(0, 256, (256, 341, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / "ab"[number % 2] / f"{number}.jpg")
    images = rng.integers(0, 256, (num_images, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(folder / "set.npz", images=images, labels=np.arange(num_images) % 2)
    return {
        "torch": folder / "photos",
        "dali": folder / "photos",
        "device": folder / "set.npz",
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, "device"])
def test_memory_is_stable_over_epochs(backend: str, noise: dict[str, Path]) -> None:
    needs(backend)
    # glibc reads its settings at the very start
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY, noise[backend], backend],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | EXACT_MALLOC,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    growth, with_a_leak = map(float, ended.stdout.split())
    assert growth < MOST_GROWTH_MIB, f"a leak of one batch per epoch would be {LEAK_MIB:.0f} MiB"
    assert with_a_leak > LEAK_MIB - MOST_GROWTH_MIB, "a leak of one batch per epoch was not seen"
