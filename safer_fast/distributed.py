"""Several processes that train one model: started by torchrun, each on its part of every batch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

COLUMNS = 64
"""What the sizes of arenas are multiples of."""

if TYPE_CHECKING:  # torch is imported when there is something to compute: --help does not wait
    from torch import Tensor


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

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConnectionError(f"rank {self.rank}: another rank has ended ({reason})") from error


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

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if wants_gpu and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node: expected at most {torch.cuda.device_count()} processes, one "
                f"for each GPU of the machine, got {os.environ.get('LOCAL_WORLD_SIZE')}"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
        # segments that grow and registered graph memory do not go together
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    dist.init_process_group(backend)
    try:
        yield Ranks(dist.get_rank(), num_ranks, local_rank)
    finally:
        dist.destroy_process_group()


def is_quiet() -> bool:
    """Whether a process is to leave a message to the first one: all have found the same mistake."""
    return int(os.environ.get("RANK", "0")) > 0 and not _is_connected()


def _is_connected() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _checksum(values: Tensor) -> Tensor:
    """A number that differs where bits of float32 do, but for coincidences; 0-d int64."""
    import torch

    columns = values.view(torch.int32).view(-1, COLUMNS).sum(0)  # as int64, without a copy
    return (columns * torch.arange(1, COLUMNS + 1, device=values.device)).sum()
