"""A way to take the step that benchmarks compare: whole, and in stages that can be timed apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from bench.measure import Run, timed
from bench.memory import peak_memory_mib
from safer_fast.models.flops import count
from safer_fast.runtime.cuda_graphs import WARM_UP as CALLS_BEFORE_RECORDING

WARM_UP = 2


@dataclass
class Implementation:
    """One implementation of the step, its process-wide settings, and what it can be made faster by.

    The stages in their order are one step; each finds what the one before it has left. `compile`
    and `capture` do nothing where an implementation has no use for them.
    """

    step: Run
    stages: dict[str, Run]
    compile: Run = lambda: None
    capture: Run = lambda: None
    surroundings: Callable[[], AbstractContextManager[None]] = nullcontext
    counted: dict[str, float] = field(default_factory=dict)
    """Operations of each stage of one step."""
    peak_memory_mib: float | None = None

    def prepare(self, device: torch.device, is_compiled: bool, is_captured: bool) -> None:
        """Operations are counted and memory is measured; what is left is to warm up and time it.

        Operations of compiled code cannot be counted, memory of captured code cannot be measured:
        both are those of the same code before.
        """
        with self.surroundings():
            self.counted = {name: count(run)[0] for name, run in self.stages.items()}
            if is_compiled:
                self.compile()
            self.step()
            self.peak_memory_mib = peak_memory_mib(self.step, device)
        if is_captured:
            self.capture()

    def times_ms(self, device: torch.device) -> dict[str, float]:
        """Milliseconds of each stage of a step, and of a whole one right after it as `step`.

        Stages do not overlap, so their sum is at least the time of a whole step. Process-wide
        settings change between implementations: the stages also bring memory into the state in
        which this one leaves it.
        """
        with self.surroundings():
            times = {name: timed(run, device)[0] for name, run in self.stages.items()}
            return times | {"step": timed(self.step, device)[0]}


def warm_up(is_captured: bool) -> int:
    """Number of calls before the timed ones: every recording has been made by then."""
    return CALLS_BEFORE_RECORDING + 1 if is_captured else WARM_UP
