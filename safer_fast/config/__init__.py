"""Settings: their types, ranges and help, and what a user types turned into a Config."""

from safer_fast.config.commands import (
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    SelectConfig,
)
from safer_fast.config.schema import (
    AttackConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    Names,
    ObjectiveConfig,
    OptimConfig,
    Radius,
    RuntimeConfig,
    SAMConfig,
    SelectionConfig,
)

__all__ = [
    "AttackConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "LogConfig",
    "ModelConfig",
    "Names",
    "ObjectiveConfig",
    "OptimConfig",
    "Radius",
    "RuntimeConfig",
    "SAMConfig",
    "SelectConfig",
    "SelectionConfig",
]
