"""The folder of a run's checkpoints: whole files, written in the background, verified when read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from safer_fast.runs.checkpoints.file import Checkpoint, Companion, needs_of, read_checkpoint
from safer_fast.runtime.files import (
    check_no_link,
    link_or_copy,
    naming,
    reason,
    replace,
    sync_folder,
)
from safer_fast.runtime.tensor_files import (
    is_verified,
    read_metadata,
    read_tensors,
    snapshot,
    verify,
    write_tensors,
)

_SUFFIX = ".safetensors"
_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})\.safetensors")
_TEMPORARY = re.compile(r"[a-z]+-[0-9]+\.safetensors\.tmp")
# checkpoints can name no other files: no path leads out of the folder
_COMPANION = re.compile(r"(?!step-)[a-z]+-[0-9]+")


class CheckpointFolder:
    """Keeps the newest checkpoints of a run, one file each, written by a background thread.

    Companions are weights that several checkpoints need; their names are a kind and a number, such
    as best-00000120. A failure to write is reported, and training continues. In a run of several
    processes one is the writer and the others only read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        report: Callable[[str], None] = print,
        is_writer: bool = True,
    ) -> None:
        assert keep >= 1, f"expected to keep a checkpoint or more, got {keep}"
        self.last: Path | None = None  # the newest that is verified
        self._folder, self._keep, self._report = folder, keep, report
        self._is_writer, self._is_tidy = is_writer, False
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._newest: futures.Future[None] | None = None
        self._waiting: list[str] = []  # companions queued and not yet written
        self._digests: dict[str, str] = {}  # sha256 of the companions on disk
        self._not_yet_needed: set[str] = set()  # companions that the next checkpoint may need
        self._failed: dict[str, Companion] = {}  # companions to write again
        self._failing: dict[str, str] = {}  # reasons of current failures by task

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        needs: Sequence[str] = (),
        before: Callable[[], None] | None = None,
    ) -> None:
        """Queue a checkpoint for writing; does not wait.

        The tensors must not change any more. `before` is called in the thread, right before it
        writes. A checkpoint is not written if one of the companions it needs is missing by then.
        """
        text, take = json.dumps(dict(state)), snapshot(tensors)
        self._enqueue(partial(self._write_checkpoint, step, text, take, tuple(needs), before))

    def save_companion(
        self, name: str, tensors: Mapping[str, Tensor], *, link: Path | None = None
    ) -> None:
        """Queue a companion for writing, and `link` as another name of it; see `save`.

        A failure is remembered for `try_again`.
        """
        # the tensors are kept until they are written
        self._try(Companion(name, self._path(name), cache(snapshot(tensors)), link))

    def try_again(self) -> None:
        """Queue companions that could not be written again, except outdated ones."""
        for companion in list(self._failed.values()):
            if companion.name not in self._waiting:
                self._try(companion)

    def holds(self, name: str) -> bool:
        """Return true if the companion is written or queued, so that checkpoints may need it."""
        # in this order: the thread sets the digest before it removes the name from the queue
        return name in self._waiting or self._is_there(name)

    @property
    def is_busy(self) -> bool:
        """True while something queued is neither written nor has failed."""
        return self._newest is not None and not self._newest.done()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything queued is written or has failed; return False on timeout."""
        if self._newest is not None:
            futures.wait([self._newest], timeout_s)
        return not self.is_busy

    def latest(
        self,
        refuse: Callable[[Checkpoint], str | None] | None = None,
        spare: Collection[str] = (),
    ) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, has its companions, and is not refused.

        Newer ones that cannot be used are reported, and renamed to *.damaged once one is found that
        can. If none can, all keep their names and ValueError is raised: the next attempt must not
        take the run for a new one. None if there are no checkpoints. refuse: returns a reason
        against a checkpoint, or None. spare: kinds of companions that a checkpoint can do without
        if they are damaged; its `needs` lack them then.
        """
        self.wait()
        with naming(self._folder):
            paths = _checkpoints(self._folder)
        reasons: list[str] = []
        for path in paths:
            try:
                checkpoint = self._read(path, refuse, spare)
            except ValueError as error:
                reasons.append(str(error))
                end = "; the one before is used" if path != paths[-1] else ""
                self._report(f"damaged checkpoint {error}{end}")
                continue
            self._set_aside(paths[: len(reasons)])
            self.resume_from(checkpoint)
            return checkpoint
        if reasons:
            raise ValueError(f"{self._folder}: no checkpoint can be used; the newest: {reasons[0]}")
        return None

    def resume_from(self, checkpoint: Checkpoint) -> None:
        """Set the state of the folder to this checkpoint, whose companions are on disk."""
        self._digests.update(checkpoint.needs)
        self.last = checkpoint.path

    def provide(self, name: str, link: Path) -> None:
        """Make `link` a name, or a copy, of this companion, even if writing it failed before.

        Raises ValueError, naming `link`, if that fails.
        """
        self.wait()
        with naming(link):
            if companion := self._failed.get(name):
                write_tensors(link, companion.take(), {})
            elif not is_verified(link, self._digests.get(name)):
                replace(link, partial(link_or_copy, self._path(name)))

    def read_companion(self, name: str) -> dict[str, Tensor]:
        """Read and verify the tensors of a companion, on the CPU.

        Raises ValueError if it is damaged, or not the one that the checkpoint of `latest` needs.
        """
        path = self._path(name)
        verify(path, self._digests.get(name))
        return read_tensors(path)

    def close(self) -> None:
        """Wait until everything queued is written or has failed; a second call does nothing."""
        self._thread.shutdown()

    def _try(self, companion: Companion) -> None:
        self._waiting.append(companion.name)
        self._enqueue(partial(self._write_companion, companion))

    def _enqueue(self, write: Callable[[], None]) -> None:
        assert self._is_writer, "another process writes the checkpoints"
        self._newest = self._thread.submit(write)

    def _write_checkpoint(
        self,
        step: int,
        state: str,
        take: Callable[[], dict[str, Tensor]],
        needs: Sequence[str],
        before: Callable[[], None] | None,
    ) -> None:
        path = self._folder / _file_name(step)

        def write() -> None:
            missing = [name for name in needs if not self._is_there(name)]
            if missing:
                raise ValueError(f"its companion {missing[0]} is not there")
            if before is not None:
                before()
            digests = json.dumps({name: self._digests[name] for name in needs})
            self._write(path, take, {"step": str(step), "state": state, "needs": digests})
            self.last = path
            self._not_yet_needed -= {n for n in self._not_yet_needed if _is_outdated(n, needs)}

        failure = f"checkpoint at step {step} was not written"
        if self._attempt("writing checkpoints", failure, write):
            prune = partial(self._prune, path)
            self._attempt("removing old checkpoints", "not all that is old was removed", prune)

    def _write_companion(self, companion: Companion) -> None:
        name, path, take, link = companion
        for other in [other for other in self._failed if _is_outdated(other, [name])]:
            del self._failed[other]

        def write() -> None:
            self._digests[name] = self._write(path, take, {})
            self._not_yet_needed.add(name)

        failure = f"companion {name} was not written"
        is_written = False
        try:
            is_written = self._attempt("writing companions", failure, write)
        finally:
            if not is_written:
                self._failed[name] = companion
            self._waiting.remove(name)
        if is_written and link is not None:
            make_link = partial(replace, link, partial(link_or_copy, path))
            self._attempt(f"writing {link.name}", f"{link} was not written", make_link)

    def _attempt(self, task: str, failure: str, action: Callable[[], object]) -> bool:
        """Return true if the action succeeds; report the first of equal failures, and their end."""
        try:
            action()
        except Exception as error:  # of any kind: an error in the thread would be lost
            why = reason(error)
            last = f"the last one is {self.last}" if self.last else "there is none yet"
            if self._failing.get(task) != why:
                self._report(f"{failure}: {why}; training continues, {last}")
            self._failing[task] = why
            return False
        if self._failing.pop(task, None):
            self._report(f"{task} works again")
        return True

    def _write(
        self, path: Path, take: Callable[[], dict[str, Tensor]], metadata: Mapping[str, str]
    ) -> str:
        check_no_link(self._folder)
        with naming(self._folder):
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
                sync_folder(self._folder.parent)
            if not self._is_tidy:
                for name in filter(_TEMPORARY.fullmatch, os.listdir(self._folder)):
                    (self._folder / name).unlink()
                self._is_tidy = True
            return write_tensors(path, take(), metadata)

    def _prune(self, written: Path) -> None:
        others = [path for path in _checkpoints(self._folder) if path != written]
        for path in others[self._keep - 1 :]:
            path.unlink(missing_ok=True)
        kept = [written, *others[: self._keep - 1]]
        needed = {name for path in kept for name in needs_of(path, read_metadata(path))}
        # companions of a kind that neither the run nor its checkpoints use are not ours to remove
        kinds = {_kind(name) for name in needed | set(self._digests)}
        names = [n.removesuffix(_SUFFIX) for n in os.listdir(self._folder) if n.endswith(_SUFFIX)]
        companions = [n for n in names if _COMPANION.fullmatch(n) and _kind(n) in kinds]
        newest = {_kind(name): name for name in sorted(companions, key=_number)}
        for name in set(companions) - needed - self._not_yet_needed - set(newest.values()):
            self._digests.pop(name, None)
            self._path(name).unlink(missing_ok=True)

    def _is_there(self, name: str) -> bool:
        return name in self._digests and self._path(name).is_file()

    def _path(self, companion: str) -> Path:
        if not _COMPANION.fullmatch(companion):
            raise ValueError(f"expected a companion such as best-00000120, got {companion!r}")
        return self._folder / f"{companion}{_SUFFIX}"

    def _read(
        self,
        path: Path,
        refuse: Callable[[Checkpoint], str | None] | None,
        spare: Collection[str],
    ) -> Checkpoint:
        checkpoint, lost = read_checkpoint(path), []
        with naming(path):
            if path.name != _file_name(checkpoint.step):
                raise ValueError(f"it is that of step {checkpoint.step}")
            for name, digest in checkpoint.needs.items():
                if _kind(name) not in spare:
                    verify(self._path(name), digest)
                elif not is_verified(self._path(name), digest):
                    lost.append(name)
        why = refuse(checkpoint) if refuse is not None else None
        if why is not None:
            raise ValueError(f"{path}: {why}")
        if lost:
            self._report(f"{path} is used without {', '.join(lost)}, which is damaged")
        kept = {name: digest for name, digest in checkpoint.needs.items() if name not in lost}
        return dataclasses.replace(checkpoint, needs=kept)

    def _set_aside(self, paths: Sequence[Path]) -> None:
        for path in paths if self._is_writer else ():
            with suppress(OSError):
                path.rename(f"{path}.damaged")


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, newest first; none if there is no folder."""
    try:
        matches = [_STEP.fullmatch(name) for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    steps = sorted((int(match[1]) for match in matches if match), reverse=True)
    return [folder / _file_name(step) for step in steps]


def _file_name(step: int) -> str:
    return f"step-{step:08d}{_SUFFIX}"


def _kind(companion: str) -> str:
    return companion.rpartition("-")[0]


def _number(companion: str) -> int:
    return int(companion.rpartition("-")[2])


def _is_outdated(companion: str, needs: Sequence[str]) -> bool:
    """Return true if this companion, or a later one of its kind, is among the needed ones."""
    same = [name for name in needs if _kind(name) == _kind(companion)]
    return any(_number(companion) <= _number(name) for name in same)
