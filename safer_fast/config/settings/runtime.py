"""Settings of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from safer_fast.config import ranges
from safer_fast.config.ranges import at_least, ranged
from safer_fast.config.settings.types import Names

SAVINGS = ("patch-order", "class-token", "prefix", "stored-bf16")
"""patch-order: pixels are stored in patches during a step, the patch embedding is a matrix product.
class-token: the last block computes only the tokens that the head reads.
prefix: blocks below the first selected layer run once for both SAM passes.
stored-bf16: matrices are stored in bf16 in place of being cast in every forward pass."""


@dataclass
class RuntimeConfig:
    """Use of the machine; no setting changes results beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks; auto: if the run is long enough to win back the time."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture attack iteration, SAM passes and update as CUDA graphs; auto: on CUDA, if the run is
    long enough to win back the time of capturing."""
    attention: Literal["auto", "flash", "fa3", "fa4", "cudnn", "math"] = "auto"
    """Attention kernel; auto: the fastest for the run's shape, timed once and cached. fa3, fa4:
    flash attention of these generations, where flash_attn_3 or flash-attn-4 is installed."""
    deterministic: bool = True
    """Use only kernels that give the same bits each time."""
    tf32: bool = False
    """With --amp off on a GPU: multiply in TF32, faster and to three decimal digits."""
    attack_micro_batch: int | Literal["auto"] = ranged("auto", at_least(1, ranges.IMAGES))
    """Images attacked at a time; auto: all of a batch, fewer if memory does not suffice."""
    train_micro_batch: int | Literal["auto"] = ranged("auto", at_least(1, ranges.IMAGES))
    """Images at a time in the two SAM passes, whose gradients add up; auto: as in the attack."""
    exact_savings: Names = field(default_factory=lambda: Names(SAVINGS))
    """Work to skip without changing results beyond rounding: docs/performance.md."""
    num_threads: int | None = ranged(None, at_least(1, 4096))
    """CPU threads of torch; default: torch's own choice."""
    log_every_steps: int = ranged(50, at_least(1, ranges.STEPS))
    """Steps between two step lines in metrics.jsonl."""
    max_skipped_steps: int = ranged(10, at_least(1, ranges.STEPS))
    """Stop after this many steps in a row were skipped: loss or gradient were not finite."""
