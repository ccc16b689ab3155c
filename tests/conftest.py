"""Fixtures and settings of all tests."""

import fcntl
import gc
import itertools
import os
import shutil
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # runs that tests start would each take all cores, and wait for one another at every operation
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # and processes that compile for them would each import torch
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    gc.disable()  # until all tests are collected: imports make a million objects that stay

import pytest
import torch

from safer_fast.data.dali import pipeline as dali_pipeline
from safer_fast.runtime.command import freeze
from tests.support import small_runs
from tests.support.kills import Server, flags_for, write_photos
from tests.support.pictures import NUM_IMAGES, SIZES, encode, num_alive, photo, write
from tests.support.reports import without_reports


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Let one worker alone run while its test takes times or has the GPU.

    Whoever waits for its turn holds the first byte, so that one that must be alone is not passed
    over for ever; the wait is not counted in the timeout.
    """
    if not hasattr(item.config, "workerinput"):  # the only process
        return (yield)
    names = ("alone", "gpu") if torch.cuda.is_available() else ("alone",)
    is_alone = any(item.get_closest_marker(name) for name in names)
    cache = item.config.cache
    assert cache is not None, "processes take turns by a file of pytest's cacheprovider"
    with open(cache.mkdir("turns") / "turn", "a+") as turn:
        fcntl.lockf(turn, fcntl.LOCK_EX, 1, 0)
        fcntl.lockf(turn, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH, 1, 1)
        fcntl.lockf(turn, fcntl.LOCK_UN, 1, 0)
        return (yield)


def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores, of which at most four are used: some tests wait."""
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(num_cores, 4) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names of tests with an address, which each process would collect by another name."""
    if wrong := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"expected ids without addresses, got {wrong[0]}")


def pytest_collection_finish() -> None:
    """Never look for garbage in what was imported: it takes longer than many a test."""
    gc.collect()
    freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the session for measured timings, in subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_reports_that_nobody_reads() -> Iterator[None]:
    """Runs draw neither report nor maps; a test that reads them trains in `with_reports()`."""
    with without_reports():
        yield


@pytest.fixture(autouse=True)
def one_thread_and_the_default_attention() -> Iterator[None]:
    """Run on one thread, fastest for small tensors; restore process-wide settings after it."""
    threads, backends = torch.get_num_threads(), torch.backends.cuda
    settings = {
        backends.enable_flash_sdp: backends.flash_sdp_enabled(),
        backends.enable_mem_efficient_sdp: backends.mem_efficient_sdp_enabled(),
        backends.enable_cudnn_sdp: backends.cudnn_sdp_enabled(),
        backends.enable_math_sdp: backends.math_sdp_enabled(),
    }
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for enable, is_enabled in settings.items():
        enable(is_enabled)


Once = Callable[[str, Callable[[Path], object]], Path]
"""(name, fill) -> the folder of this name, filled by whichever process asks for it first."""


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Folders that are filled once for the tests of all processes, which only read them."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    place.mkdir(exist_ok=True)

    def once(name: str, fill: Callable[[Path], object]) -> Path:
        folder, full = place / name, place / f"{name}.full"
        with open(place / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not full.exists():
                shutil.rmtree(folder, ignore_errors=True)
                fill(folder)
                full.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The process that forks runs for the tests of this one."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def photos(once: Once) -> Path:
    """Splits of a few noisy pictures, one of them broken."""
    return once("photos", write_photos)


@pytest.fixture(scope="session")
def flags(photos: Path) -> list[str]:
    """Flags of a small run on these pictures that is resumed where it was stopped."""
    return flags_for(photos, "device")


@pytest.fixture(scope="session")
def finished(once: Once, server: Server, flags: list[str]) -> Path:
    """The folder of such a run that nobody stopped, which tests only read or copy."""

    def train(folder: Path) -> None:
        ending = server.train(folder, flags)
        assert (ending.status, ending.errors) == (0, ""), ending.output

    return once("finished", train)


@pytest.fixture(scope="session")
def small_run(once: Once) -> Path:
    """The folder of a run on the digits with the flags SMALL, which tests only read or copy."""
    torch.set_num_threads(1)
    return once("small-run", small_runs.run)


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG of several sizes."""
    sizes = itertools.islice(itertools.cycle(SIZES), NUM_IMAGES)
    images = (photo(*size, seed) for seed, size in enumerate(sizes))
    return write(tmp_path_factory.mktemp("photos"), (encode(i, "jpeg", quality=90) for i in images))


@pytest.fixture(scope="session")
def pngs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG of one size."""
    images = (photo(32, 32, seed) for seed in range(NUM_IMAGES))
    return write(tmp_path_factory.mktemp("small"), (encode(image, "png") for image in images))


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Weak references to the DALI pipelines that the test builds."""
    built: list[weakref.ref[Any]] = []
    build = dali_pipeline._build

    def recording(*arguments: Any) -> Any:
        assert num_alive(built) == 0
        pipeline = build(*arguments)
        built.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(dali_pipeline, "_build", recording)
    return built
