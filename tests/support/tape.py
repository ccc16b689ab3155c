"""A recorder of phases that works on a CPU: it keeps to the rules of a CUDA graph.

While it records, nothing that is computed stays; a replay runs the operations that were recorded on
the very tensors of then, and no Python of the phase. What a phase bakes in shows as wrong numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Operation:
    """One call, with the tensors it read, wrote and gave."""

    func: Any
    args: Any
    kwargs: Any
    outputs: list[Tensor]

    def __call__(self) -> None:
        """Call it again; copy new tensors to where those of the recording lie."""
        results = _tensors(self.func(*self.args, **self.kwargs))
        for kept, result in zip(self.outputs, results, strict=True):
            if not _share(kept, result):
                kept.copy_(result)


@dataclass
class TapeRecorder:
    """Records on a tape in place of a CUDA graph; see `safer_fast.runtime.cuda_graphs.Recorder`."""

    num_warm_ups: int = 0
    tapes: list[list[Operation]] = field(default_factory=list)

    def apart(self) -> "TapeRecorder":
        return TapeRecorder()

    def warm_up(self, phase: Callable[[], None]) -> None:
        self.num_warm_ups += 1
        phase()

    def record(self, phase: Callable[[], None]) -> Callable[[], None]:
        tape = _Tape()
        with _unchanged(tape), tape:
            phase()
        self.tapes.append(tape.operations)

        def replay() -> None:
            with torch.no_grad():
                for operation in tape.operations:
                    operation()

        return replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            whole = tensor.untyped_storage()
            if whole.data_ptr() not in self.before:
                flat = torch.tensor([], dtype=torch.uint8).set_(whole)
                self.before[whole.data_ptr()] = flat, flat.clone()
        result = func(*args, **kwargs)
        self.operations.append(Operation(func, args, kwargs, _tensors(result)))
        return result


@contextmanager
def _unchanged(tape: _Tape) -> Iterator[None]:
    """Restore memory and random numbers afterwards."""
    random_state = torch.get_rng_state()
    try:
        yield
    finally:
        for memory, content in tape.before.values():
            memory.copy_(content)
        torch.set_rng_state(random_state)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments that the operation writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
