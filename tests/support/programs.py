"""Python programs in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Ask = Callable[[object], int | None]
"""Send a request to the process that forks: an Order is answered with the number of the process, a
Question with its status, None while it runs."""


@dataclass(frozen=True)
class Order:
    """A program to be started: `python WORDS`, words being those that follow the interpreter."""

    words: Sequence[str]
    folder: str
    environment: Mapping[str, str]
    outputs: tuple[str, str]
    has_session: bool = False

    def fork(self) -> int:
        """Fork the process in which it is to run; return its number, 0 there."""
        # opened here: whoever reads waits for the first byte instead of finding nobody
        streams = [os.open(os.devnull, os.O_RDONLY)]
        streams += [os.open(path, os.O_WRONLY | os.O_APPEND) for path in self.outputs]
        if (pid := os.fork()) == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            self._become()
        for stream in streams:
            os.close(stream)
        return pid

    def _become(self) -> None:
        multiprocessing.process._children.clear()  # type: ignore[attr-defined]
        if self.has_session:
            os.setsid()
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        if "OMP_NUM_THREADS" in self.environment:  # read when torch was imported
            torch.set_num_threads(int(self.environment["OMP_NUM_THREADS"]))

    def run(self) -> None:
        """Run the program to its end as the interpreter does; call it where nothing follows."""
        first, *words = self.words
        if first == "-m":
            name, *words = words
            sys.argv, sys.path[0] = [name, *words], os.getcwd()
            sys.modules.pop(name, None)  # it is imported anew, as `__main__`
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif first == "-c":
            code, *words = words
            sys.argv, sys.path[0] = ["-c", *words], ""
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), vars(main))
        else:
            sys.argv, sys.path[0] = [first, *words], str(Path(first).resolve().parent)
            runpy.run_path(first, run_name="__main__")


@dataclass(frozen=True)
class Question:
    """Has this process ended, and how?"""

    pid: int


class Program:
    """A running program, with what tests need of `subprocess.Popen`; its output is text.

    It is one of a process that has imported everything, hence starts at once. Imports, options of
    the interpreter and environment variables that libraries read when they are imported
    (OMP_NUM_THREADS apart) need `subprocess` itself.
    """

    def __init__(
        self,
        ask: Ask,
        words: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        output: str | None = None,
    ) -> None:
        """Start it. output: a file that what it prints is added to, in place of pipes."""
        self.args, self._ask = list(words), ask
        self.returncode: int | None = None
        place = Path(tempfile.mkdtemp(prefix="program-"))
        names = (str(place / "stdout"), str(place / "stderr")) if output is None else (output,) * 2
        self._streams = []
        for name in names if output is None else ():
            os.mkfifo(name)
            self._streams.append(os.open(name, os.O_RDONLY | os.O_NONBLOCK))
        environment = dict(os.environ if env is None else env)
        order = Order(words, str(cwd or os.getcwd()), environment, names, start_new_session)
        pid = ask(order)
        assert pid is not None
        self.pid = pid
        shutil.rmtree(place)

    def poll(self) -> int | None:
        """Its exit status, minus the number of the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._ask(Question(self.pid))
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        """Its exit status as soon as it has ended."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        """The process gets the signal; it does no harm where it has ended already."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def readline(self, timeout: float = 120) -> str:
        """The next line of its standard output; empty at the end."""
        line = b""
        while not line.endswith(b"\n") and (byte := self._read(self._streams[:1], timeout, 1)[1]):
            line += byte
        return line.decode()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """The rest of both streams when nobody holds them any more and the program has ended."""
        deadline = time.monotonic() + timeout
        texts = dict.fromkeys(self._streams, b"")
        left = [*texts]
        while left:
            stream, part = self._read(left, deadline - time.monotonic(), 2**16)
            texts[stream] += part
            if not part:
                left.remove(stream)
        self.wait(max(deadline - time.monotonic(), 1))
        for stream in texts:
            os.close(stream)
        self._streams = []
        output, errors = (text.decode() for text in texts.values())
        return output, errors

    def end(self) -> None:
        """Kill it if it still runs."""
        self.send_signal(signal.SIGKILL)
        self.wait()
        for stream in self._streams:
            os.close(stream)
        self._streams = []

    def _read(self, streams: Sequence[int], timeout: float, size: int) -> tuple[int, bytes]:
        """A stream that has something, or has ended, and what can be read of it."""
        ready, _, _ = select.select(streams, [], [], max(timeout, 0))
        if not ready:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return ready[0], os.read(ready[0], size)
