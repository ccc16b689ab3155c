"""Settings of files that a run leaves: checkpoints and logs."""

from __future__ import annotations

from dataclasses import dataclass

from safer_fast.config import ranges
from safer_fast.config.ranges import above_zero, at_least, ranged


@dataclass
class CheckpointConfig:
    """Checkpoints to resume a stopped or killed run from; they do not change what is computed."""

    every_steps: int | None = ranged(None, at_least(1, ranges.STEPS))
    """Steps between two checkpoints; default: every_minutes decides alone."""
    every_minutes: float | None = ranged(10.0, above_zero(10**7, smallest=1e-9))
    """Minutes between two checkpoints; null: every_steps decides alone."""
    keep: int = ranged(2, at_least(1, 10**6))
    """Number of newest checkpoints to keep."""
    grace_s: float = ranged(25.0, above_zero(10**7, smallest=1e-3))
    """Seconds from the first SIGINT or SIGTERM after which the run ends even without a checkpoint;
    torchrun and most schedulers kill after 30."""


@dataclass
class LogConfig:
    """Further loggers of a run; metrics.jsonl and TensorBoard's event file are always written."""

    wandb: bool = False
    """Send the metrics to Weights & Biases too, where it is installed (pip install wandb); its own
    variables such as WANDB_PROJECT and WANDB_MODE=offline apply."""
