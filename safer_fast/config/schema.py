"""Every setting of a run: typed dataclasses, one level of groups, each with unit and meaning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from safer_fast.config import ranges
from safer_fast.config.ranges import at_least, ranged
from safer_fast.config.settings.attack import AttackConfig
from safer_fast.config.settings.data import DataConfig
from safer_fast.config.settings.evaluation import EvaluationConfig
from safer_fast.config.settings.model import ModelConfig
from safer_fast.config.settings.runs import CheckpointConfig, LogConfig
from safer_fast.config.settings.runtime import SAVINGS, RuntimeConfig
from safer_fast.config.settings.selection import SelectionConfig
from safer_fast.config.settings.training import ObjectiveConfig, OptimConfig, SAMConfig
from safer_fast.config.settings.types import Names, Radius

__all__ = [
    "SAVINGS",
    "AttackConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LogConfig",
    "ModelConfig",
    "Names",
    "ObjectiveConfig",
    "OptimConfig",
    "Radius",
    "RuntimeConfig",
    "SAMConfig",
    "SelectionConfig",
]


@dataclass
class Config:
    """A whole run."""

    amp: Literal["off", "bf16"] = "off"
    """bf16: matrices are stored and multiplied in bfloat16, masters and sums kept in float32."""
    seed: int = ranged(0, ranges.SEED)
    """Seed of everything random."""
    epochs: int = ranged(40, at_least(1, ranges.EPOCHS))
    """All epochs, selection.warmup_epochs among them."""
    batch_size: int = ranged(64, at_least(1, ranges.IMAGES))
    """Images per step, at most: an epoch is divided into the fewest equal batches."""
    output: str | None = None
    """Run folder; default: runs/<date>-<model>-<data>; an existing non-empty one is refused unless
    resumed."""
    resume: Literal["never", "auto", "must"] = "never"
    """Resume the run in --output from its newest checkpoint. auto: start a new run if there is
    none; must: a missing checkpoint is an error."""
    dry_run: bool = False
    """Take 20 steps of each stage, a minute of them at most, print speed, memory, operations and
    the time the run would need, and write nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    sam: SAMConfig = field(default_factory=SAMConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain nested dictionaries, ready for YAML or JSON."""
        return asdict(self)
