"""Fast adversarial training of vision transformers with SAFER.

`train_model`, `load_model` and `evaluate_run` do what the commands do; `pgd`, `rank_layers`,
`select_layers` and `SharpnessAware` are the parts of a training loop of your own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safer_fast.attacks.named import register_attack
    from safer_fast.attacks.pgd import pgd
    from safer_fast.config.attack_names import ThreatModel
    from safer_fast.config.commands import EvaluateConfig
    from safer_fast.config.schema import (
        AttackConfig,
        CheckpointConfig,
        Config,
        DataConfig,
        EvaluationConfig,
        LogConfig,
        ModelConfig,
        ObjectiveConfig,
        OptimConfig,
        RuntimeConfig,
        SAMConfig,
        SelectionConfig,
    )
    from safer_fast.evaluation.entry import evaluate_run
    from safer_fast.models.build import build_model
    from safer_fast.runs.model import load_model
    from safer_fast.selection.criteria import register_criterion
    from safer_fast.selection.scoring import rank_layers, select_layers
    from safer_fast.training.objectives import Formula, register_objective
    from safer_fast.training.run import train_model
    from safer_fast.training.sam import SharpnessAware

__version__ = "0.1.0"
__all__ = [
    "AttackConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "Formula",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RuntimeConfig",
    "SAMConfig",
    "SelectionConfig",
    "SharpnessAware",
    "ThreatModel",
    "build_model",
    "evaluate_run",
    "load_model",
    "pgd",
    "rank_layers",
    "register_attack",
    "register_criterion",
    "register_objective",
    "select_layers",
    "train_model",
]

_HOMES = {
    "AttackConfig": "safer_fast.config.schema",
    "CheckpointConfig": "safer_fast.config.schema",
    "Config": "safer_fast.config.schema",
    "DataConfig": "safer_fast.config.schema",
    "EvaluateConfig": "safer_fast.config.commands",
    "EvaluationConfig": "safer_fast.config.schema",
    "Formula": "safer_fast.training.objectives",
    "LogConfig": "safer_fast.config.schema",
    "ModelConfig": "safer_fast.config.schema",
    "ObjectiveConfig": "safer_fast.config.schema",
    "OptimConfig": "safer_fast.config.schema",
    "RuntimeConfig": "safer_fast.config.schema",
    "SAMConfig": "safer_fast.config.schema",
    "SelectionConfig": "safer_fast.config.schema",
    "SharpnessAware": "safer_fast.training.sam",
    "ThreatModel": "safer_fast.config.attack_names",
    "build_model": "safer_fast.models.build",
    "evaluate_run": "safer_fast.evaluation.entry",
    "load_model": "safer_fast.runs.model",
    "pgd": "safer_fast.attacks.pgd",
    "rank_layers": "safer_fast.selection.scoring",
    "register_attack": "safer_fast.attacks.named",
    "register_criterion": "safer_fast.selection.criteria",
    "register_objective": "safer_fast.training.objectives",
    "select_layers": "safer_fast.selection.scoring",
    "train_model": "safer_fast.training.run",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `--help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Public names, imported or not, without what this file needs itself."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
