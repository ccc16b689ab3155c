"""Worker processes that survive signals sent to the whole run and end with the main process."""

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

from safer_fast.config.messages import first_line
from safer_fast.runtime.machine_errors import machine_error

# Signals that a terminal or scheduler sends to all processes of a run; the main one reacts.
SIGNALS = {signal.SIGINT, signal.SIGTERM}
SECONDS_BETWEEN_LOOKS = 0.5
# Waiting for a batch is reported after this many looks in a row, and ends the run after more. Looks
# are counted and no time, so that a run suspended as a whole by a scheduler continues afterwards.
LOOK_S = 5.0
LOOKS_UNTIL_SAID, MOST_LOOKS = 12, 360
# Messages of torch and multiprocessing when a limit of the process is reached.
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
    """Yield what `reader` returns for each list of indices, read by `num_workers` processes.

    prefetch: lists that each worker reads in advance. report: receives a line if shared memory has
    no room for batches, which then come through pipes, more slowly, and for each minute without a
    batch. Raises ValueError if a worker has died (within five seconds), if workers return nothing
    for half an hour, or if a limit of this process is reached.
    """
    loader: DataLoader[Any] = DataLoader(
        reader,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        collate_fn=_share_tensors,
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
    """A tuple with arrays in place of tensors, sent without shared memory, and the reason."""

    values: tuple[Any, ...]
    kind: Callable[[Any], Any]
    reason: str

    def unpacked(self) -> Any:
        return self.kind(
            torch.from_numpy(value) if is_tensor else value for value, is_tensor in self.values
        )


def _share_tensors(samples: Any) -> Any:
    """Move the tensors of samples to shared memory, or to arrays if it is full; runs in a worker.

    torch would move them in a thread whose errors are lost: the main process would wait for ever.
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
        reason = first_line(error).rpartition(": ")[2]
        pairs = ((v.numpy(), True) if isinstance(v, Tensor) else (v, False) for v in samples)
        return _Piped(tuple(pairs), type(samples)._make, reason)  # type: ignore[attr-defined]
    return samples


def _received(samples: Iterator[Any], report: Callable[[str], None]) -> Iterator[Any]:
    """Yield the samples as the reader returned them."""
    is_reported = False
    for sample in samples:
        if isinstance(sample, _Piped):
            if not is_reported:
                report(NO_ROOM.format(sample.reason))
            is_reported, sample = True, sample.unpacked()
        yield sample


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the loader's workers; their deaths are noticed only when the next batch is read.

    torch's handler of SIGCHLD would raise wherever the main thread is, for example in a step.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    with _signals_held_back(), _no_collection():  # workers undo both at their start
        samples = iter(loader)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    return samples


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Delay SIGINT and SIGTERM to this thread until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection within the block."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def _alive(samples: Iterator[Any], report: Callable[[str], None]) -> Iterator[Any]:
    """Yield the samples; raise ValueError if a worker has died or returns nothing for long."""
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
            # a worker may die while it sends a batch: then a socket breaks
            except (RuntimeError, EOFError, OSError) as error:
                if watch.fault is not None:
                    raise watch.fault from None
                if str(error).startswith("Caught "):
                    raise
                if stopped := _limit(error, "batches of worker processes"):
                    raise stopped from None
                reason = first_line(error)
                raise ValueError(
                    f"data.num_workers: expected worker processes that live, got: {reason} (is "
                    "there enough memory? lower --data.num_workers or --data.prefetch, then "
                    "resume with --resume)"
                ) from None
            yield sample
    finally:
        watch.close()


class _Watch:
    """Watches workers in a thread while the main thread waits for a batch.

    A thread, because the wait may be within a system call. fault: the error to end the run with;
    workers that return nothing for long are killed, which ends the wait for them.
    """

    def __init__(self, samples: Any, report: Callable[[str], None]) -> None:
        self.fault: ValueError | None = None
        self._samples, self._report = samples, report
        self._is_waiting, self._num_looks = False, 0
        self._ended = threading.Event()
        # a stopped worker does not end: waiting for it at exit would never end
        self._wake = Finalize(self, _send, (samples._workers, signal.SIGCONT), exitpriority=0)
        self._thread = threading.Thread(target=self._look, name="workers", daemon=True)
        self._thread.start()

    def next(self) -> Any:
        """Wait for the next sample and return it."""
        self._num_looks, self._is_waiting = 0, True
        try:
            return next(self._samples)
        finally:
            self._is_waiting = False

    def close(self) -> None:
        """End the thread; stopped workers are continued, so that they can end."""
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
                    f"{self._described()}; check them, the disk and the network, then resume "
                    "with --resume"
                )
                _send(self._samples._workers, signal.SIGKILL)

    def _described(self) -> str:
        """The process numbers of the workers, and of those that are stopped."""
        pids = [worker.pid for worker in self._samples._workers]
        asleep = [str(pid) for pid in pids if _is_asleep(pid)]
        words = f"worker processes {', '.join(map(str, pids))}"
        if asleep:
            words += f", of which {', '.join(asleep)} stopped (kill -CONT continues them)"
        return words


def _send(workers: Sequence[Any], number: signal.Signals) -> None:
    """Send a signal to the workers that are alive."""
    for worker in workers:
        if worker.is_alive():
            with suppress(ProcessLookupError):
                os.kill(worker.pid, number)


def _is_asleep(pid: int) -> bool:
    """True if a signal has stopped the process; False if that is unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def _limit(error: Exception, where: str) -> ValueError | None:
    """The error for a limit of this process that was reached; None for any other error."""
    for words, number in LIMITS.items():
        if words in str(error):
            error = OSError(number, os.strerror(number))
            break
    return machine_error(error, "data.num_workers", where)


def _live_and_die_with_main(_: int) -> None:
    """Set up signals and garbage collection of a worker, at its start."""
    # Inherited objects must not be collected: the destructor of a DALI pipeline waits for threads
    # that only the main process has.
    gc.freeze()
    gc.enable()
    _end_in_silence()
    if sys.platform != "linux":  # the sender of a signal is unknown
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return
    # Blocked and not ignored: ignored signals cannot be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    """End this process when the main one has ended or has sent SIGTERM.

    torch and, at exit, multiprocessing send SIGTERM to workers that do not end by themselves, and
    then wait for them without limit.
    """
    main, parent = multiprocessing.parent_process(), os.getppid()
    # getppid changes sooner, but the parent may have ended before this was called
    while main is not None and main.is_alive() and os.getppid() == parent:
        came = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
        if came is not None and came.si_pid == main.pid:
            break
    os._exit(0)


def _end_in_silence() -> None:
    """Print no traceback if the main process ends while a batch is sent to it."""
    hook = sys.excepthook

    def unless_it_ended(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            hook(kind, error, traceback)

    sys.excepthook = unless_it_ended
