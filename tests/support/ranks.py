"""Processes that train together, forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore

from safer_fast import train
from safer_fast.runtime.command import run
from tests.support.reports import leave_out_drawings

PRELOADED = ["tests.support.imported", "tests.system.test_distributed"]
NUM_IMAGES = {"train": 88, "test": 37}
# 62 training images in batches of 16, 16, 15 and 15, which neither two nor three ranks can share
# evenly; 26 validation images in batches of 13. Warm-up, then SAFER with two selections.
FLAGS = [
    "--data.validation_fraction=0.3",
    "--batch-size=20",
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 2, embed_dim: 32, num_heads: 2}",
    "--model.patch_size=2",
    "--epochs=4",
    "--selection.warmup_epochs=2",
    "--selection.every_epochs=1",
    "--selection.num_images=37",
    "--selection.fraction=0.2",
    "--attack.epsilon=0.1",
    "--attack.steps=2",
    "--attack.clean_epochs=1",
    "--attack.epsilon_warmup_epochs=1",
    "--optim.learning_rate=0.003",
    "--evaluation.steps=2",
    "--evaluation.attacks=clean,pgd-2",
    "--evaluation.sentinel_images=11",
    "--runtime.device=cpu",
    "--runtime.attention=math",
    "--runtime.log_every_steps=3",
    "--runtime.num_threads=1",
]


@dataclass(frozen=True)
class Ending:
    """The end of a process: its status, the value it returned, and all that it printed."""

    status: int
    value: Any
    output: str


class Team:
    """Processes 0 to K-1 that each do `function(*arguments)`, with the environment of torchrun.

    store: where they find each other, default: a new one; torchrun keeps it when it starts anew.
    """

    def __init__(
        self,
        num_ranks: int,
        function: Callable[..., Any],
        *arguments: Any,
        store: TCPStore | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.store = store or TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": num_ranks,
            "LOCAL_WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": self.store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RUN_ID": "none",
            "OMP_NUM_THREADS": 1,
        }
        self.processes = []
        for rank in range(num_ranks):
            variables = shared | {"RANK": rank, "LOCAL_RANK": rank}
            work = (variables, self._folder / str(rank), function, arguments)
            self.processes.append(context.Process(target=_work, args=work, daemon=True))
        for process in self.processes:
            process.start()

    def endings(self, seconds: float = 120) -> list[Ending]:
        """Wait for all processes; kill those that have not ended after so many seconds."""
        deadline = time.monotonic() + seconds
        left = [process.sentinel for process in self.processes]
        while left and (remaining := deadline - time.monotonic()) > 0:
            ended = wait(left, remaining)
            left = [sentinel for sentinel in left if sentinel not in ended]
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        found = [self._ending(rank) for rank in range(len(self.processes))]
        shutil.rmtree(self._folder)
        return found

    def _ending(self, rank: int) -> Ending:
        file, status = self._folder / str(rank), self.processes[rank].exitcode
        value = file.with_suffix(".value")
        assert status is not None
        return Ending(
            status,
            pickle.loads(value.read_bytes()) if value.exists() else None,
            file.read_text() if file.exists() else "",
        )


def together(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Values that the function returns on each of so many ranks."""
    endings = Team(num_ranks, function, *arguments).endings()
    assert_status(0, endings)
    return [ending.value for ending in endings]


def assert_status(status: int, endings: Iterable[Ending]) -> None:
    """All have ended with this status."""
    for rank, ending in enumerate(endings):
        assert ending.status == status, f"rank {rank}: status {ending.status}\n{ending.output}"


def training(
    num_ranks: int,
    flags: Sequence[str],
    *patches: Callable[[], object],
    store: TCPStore | None = None,
) -> Team:
    """`python -m safer_fast.train` on so many ranks, just started; without the report."""
    return Team(num_ranks, command, flags, *patches, store=store)


def command(flags: Sequence[str], *patches: Callable[[], object]) -> None:
    """`python -m safer_fast.train` as it is typed; a report would take longer than the run."""
    leave_out_drawings()
    for patch in patches:
        patch()
    sys.argv = ["train", *flags]
    run(train.main)


class Torchrun:
    """`torchrun ... -m safer_fast.train ...` as it is typed; a context manager that leaves no
    process behind."""

    def __init__(self, output: Path, options: Sequence[str], flags: Sequence[str]) -> None:
        self._output = output
        words = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "safer_fast.train"]
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [*words, *flags],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for pid in [self.process.pid, *self.ranks()]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that run now, in their order."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = {}
        for child in children:
            with suppress(OSError):
                variables = Path(f"/proc/{child}/environ").read_text().split("\0")
                ranks = [name for name in variables if name.startswith("RANK=")]
                found.update({int(name.removeprefix("RANK=")): int(child) for name in ranks})
        return [found[rank] for rank in sorted(found)]

    def ending(self, seconds: float = 120) -> Ending:
        """Wait for its end; fail where that takes longer."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun did not end: {self.output()}") from None
        return Ending(status, None, self.output())

    def output(self) -> str:
        """All that it and its ranks have printed."""
        return self._output.read_text()


def write_digits(file: Path) -> Path:
    """Some of scikit-learn's digits, with a test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    start, end = NUM_IMAGES["train"], sum(NUM_IMAGES.values())
    train_part = {"x_train": images[:start], "y_train": digits.target[:start]}
    test_part = {"x_test": images[start:end], "y_test": digits.target[start:end]}
    np.savez(file, **train_part, **test_part)
    return file


def _work(
    variables: dict[str, Any], file: Path, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    with file.open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    torch.set_num_threads(1)
    try:
        value = pickle.dumps(function(*arguments))
        file.with_suffix(".value").write_bytes(value)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
