"""Ranks: the processes started by torchrun, each working on its part of every batch."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safer_fast.config.messages import first_line

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 64
"""Sizes of parameter arenas are multiples of this."""
POLL_S = 0.02
SILENCE = re.compile("time[d-]? ?out", re.IGNORECASE)
REPORTING_S = 10.0
"""Seconds that other ranks give the one that reports a mistake; torchrun ends them sooner."""
ANSWER_S = 1800.0
"""Seconds that a rank waits for the others: one that is stopped, or hangs, never answers."""
_is_alone = False
"""True if this process could not connect to the others: none of them reports for it."""


@dataclass
class Ranks:
    """Number of this process, number of all processes, and collective operations over them.

    With a single process all methods work without communication. They raise ConnectionError if
    another process has ended.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    _pending: tuple[Any, Tensor] | None = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """True for rank 0, which writes files and reports."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks, in place; on a GPU the host does not wait."""
        if self.num_ranks > 1:
            import torch.distributed as dist

            with self._together():
                dist.all_reduce(values)
        return values

    def average_(self, values: Sequence[Tensor]) -> None:
        """Average `values` over all ranks, in place, with a single all-reduce."""
        if self.num_ranks == 1 or not values:
            return
        import torch

        flat = self.sum_(torch.cat([value.flatten() for value in values])) / self.num_ranks
        means = torch.split(flat, [value.numel() for value in values])
        for value, mean in zip(values, means, strict=True):
            value.copy_(mean.view_as(value))

    def mean_weights(self, weights: Tensor) -> Tensor:
        """Weights of images in a mean over all ranks, from those in a mean over this one, [B].

        Images with weight above 0 get equal weights.
        """
        if self.num_ranks == 1:
            return weights
        counts = weights > 0
        return counts / self.sum_(counts.sum().float()).clamp(min=1)

    def gather(self, values: Tensor) -> Tensor:
        """Gather the values [n] of all ranks to [num_ranks, n] on every rank."""
        import torch
        import torch.distributed as dist

        if self.num_ranks == 1:
            return values[None].clone()
        every = torch.zeros(self.num_ranks, *values.shape, dtype=values.dtype, device=values.device)
        every[self.rank] = values
        with self._together():
            dist.all_reduce(every)
        return every

    def share(self, value: Any) -> Any:
        """Broadcast a JSON value of rank 0 to all ranks."""
        if self.num_ranks == 1:
            return value
        import torch
        import torch.distributed as dist

        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor(len(content))
        with self._together():
            dist.broadcast(size, 0)
            if not self.is_first:
                content = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(content, 0)
        return json.loads(content.numpy().tobytes())

    def agree(self, values: list[int]) -> list[int]:
        """Element-wise maximum over ranks of the values of the previous call.

        The all-reduce of the present values overlaps with the work until the next call. With one
        process the present values are returned.
        """
        if self.num_ranks == 1:
            return values
        import torch
        import torch.distributed as dist

        answer = self.pending_maximum() or [0] * len(values)
        sent = torch.tensor(values)
        with self._together():
            work = dist.all_reduce(sent, dist.ReduceOp.MAX, async_op=True)
        self._pending = work, sent
        return answer

    def pending_maximum(self) -> list[int] | None:
        """Result of the pending all-reduce of `agree`; None if there is none."""
        if self._pending is None:
            return None
        (work, values), self._pending = self._pending, None
        with self._together():
            work.wait()
        maximum: list[int] = values.tolist()
        return maximum

    def check_same_bits(self, weights: Tensor, when: str) -> None:
        """Raise FloatingPointError unless all ranks hold the same bits; waits for the device."""
        if self.num_ranks == 1:
            return
        sums = self.gather(_checksum(weights)[None]).flatten().tolist()
        if different := [rank for rank, value in enumerate(sums) if value != sums[0]]:
            raise FloatingPointError(
                f"the weights of ranks 0 and {different[0]} differ {when}: expected the same bits "
                "on all; machines of one kind with the same versions are needed"
            )

    def check_same(self, text: str, flag: str, what: str) -> None:
        """Raise ValueError on all ranks unless they have the same ASCII text."""
        if self.num_ranks == 1:
            return
        import torch

        codes = self.gather(torch.tensor(list(text.encode("ascii"))))
        is_other = (codes != codes[0]).any(1).tolist()
        if different := [str(rank) for rank in range(self.num_ranks) if is_other[rank]]:
            many = "s" if len(different) > 1 else ""
            raise ValueError(
                f"{flag}: expected the same {what} on all ranks, got other ones on "
                f"rank{many} {', '.join(different)} than on rank 0"
            )

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Turn the RuntimeError of a failed collective into a ConnectionError."""
        with _lost(self.rank):
            yield


@contextmanager
def connected(wants_gpu: bool = True) -> Iterator[Ranks]:
    """Connect the processes that torchrun has started; a single rank without torchrun.

    wants_gpu: each process takes a GPU of its machine, if there are any, and sums over NCCL;
    tensors on the CPU use gloo. Raises ValueError if a machine has fewer GPUs than processes.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if wants_gpu and torch.cuda.is_available():
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
        if num_local > torch.cuda.device_count():  # on all ranks of the machine
            raise ValueError(
                f"--nproc-per-node: expected at most {torch.cuda.device_count()} processes, one "
                f"for each GPU of the machine, got {num_local}"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
        # expandable segments are incompatible with registered graph memory
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    most = timedelta(seconds=ANSWER_S)
    with _lost(int(os.environ.get("RANK", "0"))), _alone():
        common, rank, _ = next(rendezvous("env://", timeout=most))
        store = _rendezvous(common, rank, num_ranks)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=most)
    has_failed = False
    try:
        yield Ranks(rank, num_ranks, local_rank)
    except Exception:
        has_failed = True  # others may be within a collective: they end with this process
        raise
    finally:
        if not has_failed:
            dist.destroy_process_group()


@contextmanager
def _lost(rank: int) -> Iterator[None]:
    """Turn an error of torch about ranks that do not answer into a ConnectionError of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        if not SILENCE.search(reason):
            raise ConnectionError(f"rank {rank}: another rank has ended ({reason})") from error
        raise ConnectionError(
            f"rank {rank}: expected an answer of all ranks within {ANSWER_S:g} s, got none: one is "
            f"stopped or hangs ({reason}); end it, then resume with --resume auto"
        ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Record a failure to connect to the others, for `is_quiet`."""
    global _is_alone
    try:
        yield
    except Exception:
        _is_alone = True
        raise


def _rendezvous(store: Any, rank: int, num_ranks: int) -> Any:
    """A prefix of the store that only these processes, all alive, use.

    When torchrun restarts processes, its store keeps the addresses of those that have ended.
    Therefore rank 0 publishes a new name, every rank answers, and each continues once its own
    answer is among those that rank 0 has read.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    own, called = uuid4().hex, ""
    if rank == 0:
        store.set("call", own)
        answers = [store.get(f"{own} answer {other}").decode() for other in range(1, num_ranks)]
        store.set(f"{own} met", " ".join(answers))
        return PrefixStore(own, store)
    deadline = time.monotonic() + store.timeout.total_seconds()
    while time.monotonic() < deadline:
        if (call := store.get("call").decode()) != called:
            called = call
            store.set(f"{called} answer {rank}", own)
        if store.check([f"{called} met"]) and own in store.get(f"{called} met").decode().split():
            return PrefixStore(called, store)
        time.sleep(POLL_S)
    raise ConnectionError(f"rank {rank}: rank 0 has not called")


def is_under_torchrun() -> bool:
    """True if torchrun has started this process and forwards its signals."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_quiet() -> bool:
    """True if another process reports a mistake: of several ranks, the first to call this does.

    Before they are connected, local rank 0 of each machine reports: all read the same command and
    files. The others give it time, because torchrun ends all as soon as one has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    if _is_alone:
        return False
    if not _is_connected():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            return False
        time.sleep(REPORTING_S)
        return True
    import torch.distributed as dist

    try:
        num_calls: int = dist.distributed_c10d._get_default_store().add("reports", 1)
    except RuntimeError:  # the process with the store has ended
        return False
    return num_calls > 1


def _is_connected() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _checksum(values: Tensor) -> Tensor:
    """A checksum of the bits of float32 values, 0-d int64."""
    import torch

    columns = values.view(torch.int32).view(-1, COLUMNS).sum(0)  # as int64, without a copy
    return (columns * torch.arange(1, COLUMNS + 1, device=values.device)).sum()
