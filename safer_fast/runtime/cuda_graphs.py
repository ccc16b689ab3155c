"""Phases of a step recorded as CUDA graphs: Python runs once, its kernels are replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from safer_fast.config.messages import first_line

Phase = Callable[[], None]
"""Work on tensors with fixed addresses; nothing but their values may change between calls."""
Key = tuple[Hashable, ...]
"""Name of a phase, and everything it depends on except the values of tensors."""
WARM_UP = 3
"""Eager calls, or steps, before a phase is recorded: libraries and compilers initialise in them."""


class Recorder(Protocol):
    """Warms up and records phases."""

    def warm_up(self, phase: Phase) -> None:
        """Run the phase under the conditions of a recording."""

    def record(self, phase: Phase) -> Phase:
        """Record the phase without executing it; returns a function that replays it."""

    def apart(self) -> Recorder:
        """Return a recorder whose recordings share no memory with those of this one."""


class Replays:
    """Calls phases: eagerly at first, then from a recording, if there is a recorder.

    A phase that cannot be recorded stays eager; `report` receives a line with the reason.
    """

    def __init__(
        self, recorder: Recorder | None = None, report: Callable[[str], None] = print
    ) -> None:
        self._recorder, self._report = recorder, report
        self._num_calls: dict[Key, int] = {}
        self._in_step: set[Key] | None = None  # phases of the present step, None outside of one
        self._recordings: dict[Key, Phase] = {}
        self._refused: set[Hashable] = set()

    def __call__(self, key: Key, phase: Phase) -> None:
        """Do the work of `phase`, which must be the same in every call with this key."""
        if key in self._recordings:
            self._recordings[key]()
        elif self._recorder is None or key[0] in self._refused:
            phase()
        elif self._is_warm(key):
            self._record(self._recorder, key, phase)
        else:
            self._recorder.warm_up(phase)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count calls with the same key within the context as one, so that all its phases warm up.

        None is recorded before: memory of recordings is of no use to phases that warm up.
        """
        self._in_step = set()
        try:
            yield
        finally:
            for key in self._in_step:
                self._num_calls[key] = self._num_calls.get(key, 0) + 1
            self._in_step = None

    def forget(self, *names: str) -> bool:
        """Drop the recordings of these phases, or of all phases if none is named; true if any."""
        num_recordings = len(self._recordings)
        for known in (self._num_calls, self._recordings):
            for key in [key for key in known if not names or key[0] in names]:
                del known[key]
        if self._in_step is not None:
            self._in_step = {key for key in self._in_step if names and key[0] not in names}
        return len(self._recordings) < num_recordings

    def apart(self) -> Replays:
        """Return an object of the same kind, whose recordings and their memory are its own."""
        return Replays(self._recorder and self._recorder.apart(), self._report)

    @property
    def can_record(self) -> bool:
        """True with a recorder: then tensors of a phase must outlive its calls."""
        return self._recorder is not None

    @property
    def recorded(self) -> list[Key]:
        """Keys of the phases that are replayed."""
        return list(self._recordings)

    def _is_warm(self, key: Key) -> bool:
        """Count a call; true if enough of them, or of steps, came before it."""
        num_calls = self._num_calls.get(key, 0)
        if self._in_step is None:
            self._num_calls[key] = num_calls + 1
        else:
            self._in_step.add(key)
        return num_calls >= WARM_UP

    def _record(self, recorder: Recorder, key: Key, phase: Phase) -> None:
        try:
            self._recordings[key] = recorder.record(phase)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                self._recordings.clear()  # all together do not fit, whatever else is freed
                raise torch.OutOfMemoryError(str(error)) from error
            self._refused.add(key[0])
            reason = first_line(error)
            self._report(f"CUDA graph of {key[0]}: off ({reason})")
            phase()
            return
        self._recordings[key]()


class CudaRecorder:
    """Records CUDA graphs, all on one side stream and in one pool of memory.

    Results that outlive a graph must be in tensors created outside it: all graphs reuse the memory
    of the pool. stream: the side stream; default: a new one.
    """

    def __init__(self, device: torch.device, stream: Any = None) -> None:
        self._stream: Any = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._live: WeakSet[Any] = WeakSet()

    def apart(self) -> CudaRecorder:
        """See `Recorder.apart`: another pool, on the same stream, for which libraries are warm."""
        return CudaRecorder(self._stream.device, self._stream)

    def warm_up(self, phase: Phase) -> None:
        """See `Recorder.warm_up`: libraries keep workspaces for each stream."""
        waiting = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(waiting)
        with torch.cuda.stream(self._stream):
            phase()
        waiting.wait_stream(self._stream)

    def record(self, phase: Phase) -> Phase:
        """See `Recorder.record`; threads of loaders may call CUDA during it."""
        if not self._live:  # a memory pool is freed with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                phase()
        except BaseException:
            # torch 2.11 would go on to allocate in the pool, where uploaded batches are never freed
            # (https://github.com/pytorch/pytorch/issues/180395); torch 2.14 has stopped by itself
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)
            raise
        finally:  # a failed capture does not restore the stream
            torch.cuda.set_stream(stream)
        self._live.add(graph)
        replay: Phase = graph.replay
        return replay


class Buffers:
    """Tensors with fixed addresses, by name and shape, that recordings read and write."""

    def __init__(self) -> None:
        self._tensors: dict[Key, Tensor] = {}

    def hold(self, name: str, value: Tensor) -> Tensor:
        """Copy a value to the buffer of this name, shape and dtype, and return the buffer."""
        return self.reserve(name, value.shape, value.dtype, value.device).copy_(value)

    def reserve(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the buffer of this name, shape and dtype, with whatever it holds."""
        key = (name, tuple(shape), dtype, device)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape, dtype=dtype, device=device)
        return self._tensors[key]

    def hold_all(self, name: str, values: Iterable[Tensor]) -> list[Tensor]:
        """Copy several values to a buffer each, and return the buffers."""
        return [self.hold(f"{name} {index}", value) for index, value in enumerate(values)]


class PartBuffers:
    """Tensors with fixed addresses for the parts of a batch, which are of one size at a time."""

    def __init__(self) -> None:
        self._kept: dict[torch.Size, tuple[int, Buffers, list[Tensor]]] = {}

    def hold(
        self, shape: torch.Size, size: int, compute: Callable[[], list[Tensor]], *, anew: bool
    ) -> list[Tensor]:
        """The buffers of a batch of this shape in parts of this size; those of others are freed.

        They are filled with what `compute` returns, if they are new or `anew` asks for it.
        """
        known, buffers, parts = self._kept.get(shape, (size, Buffers(), []))
        if known != size:
            buffers, parts = Buffers(), []
        self._kept[shape] = size, buffers, parts
        if anew or not parts:
            parts = buffers.hold_all("part", compute())
            self._kept[shape] = size, buffers, parts
        return parts


def _is_out_of_memory(error: BaseException | None) -> bool:
    """True if the error, or one that caused it, is an out-of-memory error."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
