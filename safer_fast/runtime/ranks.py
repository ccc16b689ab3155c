"""Several processes that train one model: started by torchrun, each on its part of every batch."""

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

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 64
"""What the sizes of arenas are multiples of."""
BETWEEN_LOOKS_S = 0.02
SILENCE = re.compile("time[d-]? ?out", re.IGNORECASE)
TELLING_S = 10.0
"""How long others wait for the one that tells of a mistake; torchrun ends them sooner."""
ANSWER_S = 1800.0
"""How long a rank waits for the others: one that is stopped, or hangs, answers never."""
_is_alone = False
"""True where this process has looked for the others in vain: none of them speaks for it."""


@dataclass
class Ranks:
    """What one process knows of all: its number from 0, and how many there are.

    Alone, every method is what it would be over one process, and costs nothing. Raises
    ConnectionError where another process has ended.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    _asked: tuple[Any, Tensor] | None = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """`values` hold their sums over all ranks; on a GPU the host does not wait."""
        if self.num_ranks > 1:
            import torch.distributed as dist

            with self._together():
                dist.all_reduce(values)
        return values

    def average_(self, values: Sequence[Tensor]) -> None:
        """`values` hold their means over all ranks, by one sum of all of them."""
        if self.num_ranks == 1 or not values:
            return
        import torch

        flat = self.sum_(torch.cat([value.flatten() for value in values])) / self.num_ranks
        means = torch.split(flat, [value.numel() for value in values])
        for value, mean in zip(values, means, strict=True):
            value.copy_(mean.view_as(value))

    def mean_weights(self, weights: Tensor) -> Tensor:
        """What each image counts for in a mean over all ranks, of weights [B] over this one alone.

        Each image counts alike, or not at all.
        """
        if self.num_ranks == 1:
            return weights
        counts = weights > 0
        return counts / self.sum_(counts.sum().float()).clamp(min=1)

    def gather(self, values: Tensor) -> Tensor:
        """The values [n] of all ranks, [num_ranks, n], on every rank."""
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
        """The first rank's value, of what JSON knows, on every rank."""
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

    def agree(self, wishes: list[int]) -> list[int]:
        """The largest of each wish over all ranks when this was last called, the same on each.

        What is wished for now is sent while the work goes on, so that nobody waits for it.
        """
        if self.num_ranks == 1:
            return wishes
        import torch
        import torch.distributed as dist

        answer = self.last_wishes() or [0] * len(wishes)
        values = torch.tensor(wishes)
        with self._together():
            work = dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True)
        self._asked = work, values
        return answer

    def last_wishes(self) -> list[int] | None:
        """What was agreed on and not yet told, None where nobody asked."""
        if self._asked is None:
            return None
        (work, values), self._asked = self._asked, None
        with self._together():
            work.wait()
        agreed: list[int] = values.tolist()
        return agreed

    def check_alike(self, weights: Tensor, when: str) -> None:
        """Raises FloatingPointError unless all ranks hold the same bits; waits for the device."""
        if self.num_ranks == 1:
            return
        sums = self.gather(_checksum(weights)[None]).flatten().tolist()
        if different := [rank for rank, value in enumerate(sums) if value != sums[0]]:
            raise FloatingPointError(
                f"the weights of ranks 0 and {different[0]} differ {when}: expected the same bits "
                "on all; machines of one kind with the same versions are needed"
            )

    def check_same(self, text: str, flag: str, what: str) -> None:
        """Raises ValueError, on all ranks alike, unless all have the same ASCII text."""
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
        with _lost(self.rank):
            yield


@contextmanager
def connected(wants_gpu: bool = True) -> Iterator[Ranks]:
    """All processes that torchrun has started, connected until the end; alone without torchrun.

    wants_gpu: each takes a GPU of its machine where there is one, and sums go over NCCL; what lies
    on the CPU goes over gloo. Raises ValueError where a machine has fewer GPUs than processes.
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
        if num_local > torch.cuda.device_count():  # all of the machine say so, not only the last
            raise ValueError(
                f"--nproc-per-node: expected at most {torch.cuda.device_count()} processes, one "
                f"for each GPU of the machine, got {num_local}"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
        # segments that grow and registered graph memory do not go together
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    most = timedelta(seconds=ANSWER_S)
    with _lost(int(os.environ.get("RANK", "0"))), _alone():
        common, rank, _ = next(rendezvous("env://", timeout=most))
        store = _meet(common, rank, num_ranks)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=most)
    has_failed = False
    try:
        yield Ranks(rank, num_ranks, local_rank)
    except Exception:
        has_failed = True  # others may be in the midst of a sum: they end when this process has
        raise
    finally:
        if not has_failed:
            dist.destroy_process_group()


@contextmanager
def _lost(rank: int) -> Iterator[None]:
    """Turns errors of torch where other ranks do not answer into ConnectionError of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if not SILENCE.search(reason):
            raise ConnectionError(f"rank {rank}: another rank has ended ({reason})") from error
        raise ConnectionError(
            f"rank {rank}: expected an answer of all ranks within {ANSWER_S:g} s, got none: one is "
            f"stopped or hangs ({reason}); end it, then go on with --resume auto"
        ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Notes a failure to meet the others."""
    global _is_alone
    try:
        yield
    except Exception:
        _is_alone = True
        raise


def _meet(store: Any, rank: int, num_ranks: int) -> Any:
    """A part of the store that only these processes, all alive, know of.

    torchrun keeps its store when it starts processes anew, with the addresses of those that have
    ended. So the first calls, all answer, and go on once their own answer is among those it has.
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
        time.sleep(BETWEEN_LOOKS_S)
    raise ConnectionError(f"rank {rank}: the first rank has not called")


def is_under_torchrun() -> bool:
    """Whether torchrun has started this process, and passes on to it what signals it gets."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_quiet() -> bool:
    """Whether another process tells what has gone wrong: of several, the first to ask this does.

    Before they are connected the first of each machine does: all read the same command and files.
    The others give it time, because torchrun ends all as soon as one has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    if _is_alone:
        return False
    if not _is_connected():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            return False
        time.sleep(TELLING_S)
        return True
    import torch.distributed as dist

    try:
        told: int = dist.distributed_c10d._get_default_store().add("told", 1)
    except RuntimeError:  # whoever kept the count has ended
        return False
    return told > 1


def _is_connected() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _checksum(values: Tensor) -> Tensor:
    """A number that differs where bits of float32 do, but for coincidences; 0-d int64."""
    import torch

    columns = values.view(torch.int32).view(-1, COLUMNS).sum(0)  # as int64, without a copy
    return (columns * torch.arange(1, COLUMNS + 1, device=values.device)).sum()
