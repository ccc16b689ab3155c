"""One writer for a run folder: a lock on this machine, and signs of life for other machines."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from safer_fast.runs.layout import RunFolder
from safer_fast.runs.lock_file import (
    Owner,
    claim,
    close_lock,
    is_at,
    is_held_here,
    is_of_this_machine,
    note_held,
    open_lock,
    read_owner,
    try_lock,
    write_owner,
)

WAIT_S = 5.0
"""Wait for an owner that is about to end."""
BEAT_S = 15.0
LEASE_S = 120.0
"""Time without a sign of life after which an owner on another machine has lost the folder."""
SETTLE_S = 1.0
"""Time that a claim must stand where another machine may make one at the same time."""
LOOK_S = 0.1

_GUARD = threading.Lock()


class RunLock:
    """Keeps a run folder to this process until the block ends; a context manager.

    The file `run.lock` in the folder is locked, and names its owner. The operating system releases
    it when the process ends, however it does. Where locks do not reach another machine, or the file
    system has none, the owner's signs of life count: see `LEASE_S`. A process that finds its folder
    taken over ends at once. `report` gets a note when it waits or takes a folder over.
    """

    def __init__(self, report: Callable[[str], None] = print) -> None:
        self._report = report
        self._path: Path | None = None
        self._descriptor, self._pid = -1, 0
        self._owner: Owner | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, folder: Path) -> None:
        """Make the folder this process's own; do nothing where it is so already.

        Raise ValueError, one line that names the owner, where another process writes it.
        """
        path = RunFolder(folder).lock.absolute()
        if self._path == path:
            return
        assert self._path is None, f"{self._path} is held"
        try:
            self._descriptor, self._owner = _Attempt(path, self._report).succeed()
        except OSError as error:
            raise ValueError(
                f"--output: expected a folder that can be locked, got {folder}: "
                f"{error.strerror or error}"
            ) from None
        self._path, self._pid = path, os.getpid()
        self._ended.clear()
        self._thread = threading.Thread(target=self._live, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the folder and remove the lock file."""
        if self._path is None or self._pid != os.getpid():
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with _GUARD, suppress(OSError):
            if is_at(self._descriptor, self._path):
                os.unlink(self._path)
        close_lock(self._descriptor)
        self._path = None

    def _live(self) -> None:
        """Give signs of life; end the process where another has taken the folder over."""
        while not self._ended.wait(BEAT_S):
            try:
                other = self._beat()
            except OSError:  # a full or vanished disk: the next beat may succeed
                continue
            if other is not None:
                folder = self._path.parent if self._path is not None else ""
                taken = f"error: {folder} was taken over by {other}: this process ends"
                with suppress(OSError, AttributeError, ValueError):
                    sys.stderr.write(f"{taken}\n")
                    sys.stderr.flush()
                # files are written whole or not at all, and another process owns these by now
                os._exit(2)

    def _beat(self) -> Owner | None:
        """Write a sign of life; return the other owner that is named in the file, if any."""
        assert self._owner is not None
        assert self._path is not None
        if not is_at(self._descriptor, self._path):  # somebody removed it
            if not self._path.parent.is_dir():
                return None
            self._begin_again(self._path)
        found = read_owner(self._descriptor)
        if found is not None and found.claim != self._owner.claim:
            return found
        self._owner = replace(self._owner, beats=self._owner.beats + 1)
        write_owner(self._descriptor, self._owner)
        return None

    def _begin_again(self, path: Path) -> None:
        """Make a file again that somebody removed, and lock it unless another process was first."""
        assert self._owner is not None
        with _GUARD:
            descriptor, is_new = open_lock(path)
            if is_new:
                write_owner(descriptor, self._owner)
            try_lock(descriptor)
            note_held(descriptor)
            close_lock(self._descriptor)
            self._descriptor = descriptor


class _Attempt:
    """Attempts to lock a file, until that succeeds or there is no hope."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._deadline = time.monotonic() + WAIT_S
        self._silent: Owner | None = None  # of another machine, and watched
        self._silent_from = self._patience = self._age = 0.0
        self._is_sure = True  # that no other machine can claim the file in the same moment

    def succeed(self) -> tuple[int, Owner]:
        """Return the descriptor that holds the lock, and its owner, this process."""
        while True:
            with _GUARD:
                descriptor = self._locked()
            if descriptor is None:
                time.sleep(LOOK_S)
                continue
            owner = claim(descriptor)
            if not self._is_sure:
                time.sleep(SETTLE_S)
            if (other := read_owner(descriptor)) in (owner, None):
                return descriptor, owner
            close_lock(descriptor)
            raise self._refusal(other)

    def _locked(self) -> int | None:
        """A descriptor with the lock, None to try again; raise ValueError where that is useless."""
        if is_held_here(self._path):
            # opening the file and closing it again would end the lock of this process
            raise self._refusal(None)
        descriptor, is_new = open_lock(self._path)
        is_locked = try_lock(descriptor)
        owner = read_owner(descriptor)
        is_ours = is_locked is not False and is_at(descriptor, self._path)
        if is_ours and self._is_free(descriptor, owner, is_locked):
            self._is_sure = is_locked is True and (is_new or is_of_this_machine(owner))
            note_held(descriptor)
            return descriptor
        os.close(descriptor)
        if is_locked is False and time.monotonic() > self._deadline:
            raise self._refusal(owner)
        return None

    def _is_free(self, descriptor: int, owner: Owner | None, is_locked: bool | None) -> bool:
        """True where the owner named in the file, if any, is gone; raise ValueError if it lives."""
        if owner is None or (is_locked and is_of_this_machine(owner)):
            return True
        now, folder = time.monotonic(), self._path.parent
        if self._silent is None:
            age = max(0.0, time.time() - os.fstat(descriptor).st_mtime)
            # clocks of two machines differ: the file is watched for a while in any case
            self._patience = max(1.5 * BEAT_S, LEASE_S - age)
            self._age = age + self._patience
            self._silent, self._silent_from = owner, now
            words = "its file system has no locks" if is_locked is None else "a lock on it is free"
            self._report(
                f"{folder}: {words}, but {owner}, wrote it and gave its last sign of life "
                f"{age:.0f} s ago; waits {self._patience:.0f} s for the next"
            )
        if owner != self._silent:
            raise self._refusal(owner)
        if now - self._silent_from < self._patience:
            return False
        self._report(f"{folder}: taken over from {owner}, silent for {self._age:.0f} s")
        return True

    def _refusal(self, owner: Owner | None) -> ValueError:
        """The error that names the owner."""
        someone = "this process" if is_held_here(self._path) else "another process"
        return ValueError(
            f"--output: expected a folder that no other run writes, got {self._path.parent}, which "
            f"is written by {owner or someone}; end that run first, or wait for its end"
        )
