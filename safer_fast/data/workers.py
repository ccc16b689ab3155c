"""Worker processes: they outlive signals to all processes of a run, and never the main process."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from safer_fast.runtime.machine_errors import machine_error

# What a terminal or a scheduler sends to all processes of a run; the main one decides what follows.
SIGNALS = {signal.SIGINT, signal.SIGTERM}
SECONDS_BETWEEN_LOOKS = 0.5
# While a batch is waited for, so often in a row: then it is said, and then the run ends. Looks are
# counted and no time, so that a run which a scheduler suspends as a whole goes on afterwards.
LOOK_S = 5.0
LOOKS_UNTIL_SAID, MOST_LOOKS = 12, 360
# Where no descriptor is left for a batch: from torch, and from multiprocessing.
LIMITS = {
    "Too many open files": errno.EMFILE,
    "received 0 items of ancdata": errno.EMFILE,
    "can't start new thread": errno.EAGAIN,
}
NO_ROOM = (
    "shared memory (/dev/shm) has no room for batches ({}): they come through pipes, which is "
    "slower; make it larger (docker run --shm-size 8g), or lower --data.num_workers"
)


def start_loader(
    reader: Any,
    batch_sampler: list[list[int]],
    num_workers: int,
    prefetch: int,
    pin_memory: bool,
    report: Callable[[str], None],
) -> Iterator[Any]:
    """What `reader` gives for each list of indices, tuples or errors, read by `num_workers`
    processes.

    prefetch: lists that each of them reads ahead. report: told where shared memory, by which
    tensors come from workers, has no room for them; they come more slowly then; and where none of
    them gives anything for a minute. Workers that died raise ValueError, in up to five seconds; so
    do those that give nothing for half an hour, and a limit of this process that they or their
    batches meet.
    """
    loader: DataLoader[Any] = DataLoader(
        reader,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        collate_fn=_handed_over,
        pin_memory=pin_memory,
        worker_init_fn=_live_and_die_with_main,
        # Its own, so that loading draws nothing from the global one.
        generator=torch.Generator(),
    )
    try:
        samples = _started(loader)
    except (OSError, MemoryError, RuntimeError) as error:
        raise _limit(error, "starting worker processes") or error from None
    return _received(_alive(samples, report), report)


@dataclass(frozen=True)
class _Piped:
    """A tuple with arrays in place of tensors, which comes without shared memory, and why."""

    values: tuple[Any, ...]
    kind: Callable[[Any], Any]
    reason: str

    def unpacked(self) -> Any:
        return self.kind(
            torch.from_numpy(value) if is_tensor else value for value, is_tensor in self.values
        )


def _handed_over(samples: Any) -> Any:
    """In a worker: the samples with their tensors in shared memory, or without any of it.

    torch would move them there in a thread, whose error nobody sees: the main process would wait
    for ever.
    """
    if get_worker_info() is None or not isinstance(samples, tuple):
        return samples
    try:
        for value in samples:
            if isinstance(value, Tensor):
                value.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if stopped := _limit(error, "batches of worker processes"):
            return stopped
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        pairs = ((v.numpy(), True) if isinstance(v, Tensor) else (v, False) for v in samples)
        return _Piped(tuple(pairs), type(samples)._make, reason)  # type: ignore[attr-defined]
    return samples


def _received(samples: Iterator[Any], report: Callable[[str], None]) -> Iterator[Any]:
    """The samples as the reader gave them."""
    is_told = False
    for sample in samples:
        if isinstance(sample, _Piped):
            if not is_told:
                report(NO_ROOM.format(sample.reason))
            is_told, sample = True, sample.unpacked()
        yield sample


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, whose workers' deaths show when it is asked for more, and only then:
    torch's handler of SIGCHLD would raise wherever the main thread is, in a step for one."""
    handler = signal.getsignal(signal.SIGCHLD)
    with _signals_held_back(), _no_collection():  # nor in workers, until they see to it themselves
        samples = iter(loader)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    return samples


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """They come to this thread afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """The garbage that this process has stays where it is."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def _alive(samples: Iterator[Any], report: Callable[[str], None]) -> Iterator[Any]:
    """The samples; workers that died, or give nothing for long, raise ValueError."""
    if not getattr(samples, "_workers", ()):
        yield from samples
        return
    watch = _Watch(samples, report)
    try:
        while True:
            try:
                sample = watch.next()
            except StopIteration:
                return
            # a worker may die while it hands over a batch: then a socket breaks
            except (RuntimeError, EOFError, OSError) as error:
                if watch.fault is not None:
                    raise watch.fault from None
                if str(error).startswith("Caught "):
                    raise
                if stopped := _limit(error, "batches of worker processes"):
                    raise stopped from None
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise ValueError(
                    f"data.num_workers: expected worker processes that live, got: {reason} (is "
                    "there enough memory? lower --data.num_workers or --data.prefetch, then go on "
                    "with --resume)"
                ) from None
            yield sample
    finally:
        watch.close()


class _Watch:
    """Looks at workers while a batch is waited for, in a thread: some wait in the system itself.

    fault: what the run ends with; workers that give nothing for long are killed, so that whoever
    waits for them does so no more.
    """

    def __init__(self, samples: Any, report: Callable[[str], None]) -> None:
        self.fault: ValueError | None = None
        self._samples, self._report = samples, report
        self._is_waiting, self._num_looks = False, 0
        self._ended = threading.Event()
        # a worker that is stopped does not end: whoever waits for it at exit would wait for ever
        self._wake = Finalize(self, _send, (samples._workers, signal.SIGCONT), exitpriority=0)
        self._thread = threading.Thread(target=self._look, name="workers", daemon=True)
        self._thread.start()

    def next(self) -> Any:
        """The next sample."""
        self._num_looks, self._is_waiting = 0, True
        try:
            return next(self._samples)
        finally:
            self._is_waiting = False

    def close(self) -> None:
        """Ends the thread; workers that are stopped go on, so that they can end."""
        self._ended.set()
        self._thread.join()
        self._wake()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            if not self._is_waiting:
                continue
            self._num_looks += 1
            if self._num_looks % LOOKS_UNTIL_SAID == 0:
                self._report(f"data.num_workers: still waits for {self._described()}")
            if self._num_looks == MOST_LOOKS:
                self.fault = ValueError(
                    "data.num_workers: expected batches of worker processes, got none of "
                    f"{self._described()}; see to them, or to the disk or network, then go on with "
                    "--resume"
                )
                _send(self._samples._workers, signal.SIGKILL)

    def _described(self) -> str:
        """The workers, and which of them are stopped."""
        pids = [worker.pid for worker in self._samples._workers]
        asleep = [str(pid) for pid in pids if _is_asleep(pid)]
        words = f"worker processes {', '.join(map(str, pids))}"
        if asleep:
            words += f", of which {', '.join(asleep)} stopped (kill -CONT lets them go on)"
        return words


def _send(workers: Sequence[Any], number: signal.Signals) -> None:
    """Sends a signal to those that live."""
    for worker in workers:
        if worker.is_alive():
            with suppress(ProcessLookupError):
                os.kill(worker.pid, number)


def _is_asleep(pid: int) -> bool:
    """True where a signal has stopped the process; False where that is not to be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def _limit(error: Exception, where: str) -> ValueError | None:
    """The line on a limit of this process that the error speaks of; None where it does not."""
    for words, number in LIMITS.items():
        if words in str(error):
            error = OSError(number, os.strerror(number))
            break
    return machine_error(error, "data.num_workers", where)


def _live_and_die_with_main(_: int) -> None:
    """In a worker, at its start."""
    # What a worker inherits is not its own to collect: the end of a pipeline of DALI waits for
    # threads that only the main process has.
    gc.freeze()
    gc.enable()
    _end_in_silence()
    if sys.platform != "linux":  # who sent a signal is not to be known
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return
    # Held back and not ignored, because ignored ones could not be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    """Ends this process when the main one has ended or sends SIGTERM itself.

    That is how torch and, at exit, multiprocessing end workers which do not by themselves; they
    then wait for them, without end.
    """
    main, parent = multiprocessing.parent_process(), os.getppid()
    # The parent tells sooner, but may have ended before this was called.
    while main is not None and main.is_alive() and os.getppid() == parent:
        came = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
        if came is not None and came.si_pid == main.pid:
            break
    os._exit(0)


def _end_in_silence() -> None:
    """A main process that ends while it is handed a batch is worth no traceback."""
    hook = sys.excepthook

    def unless_it_ended(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            hook(kind, error, traceback)

    sys.excepthook = unless_it_ended
