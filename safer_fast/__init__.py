"""Fast adversarial training of vision transformers with SAFER; see `python -m safer_fast.train`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safer_fast.attacks.named import register_attack
    from safer_fast.attacks.pgd import pgd
    from safer_fast.models.build import build_model
    from safer_fast.selection.criteria import register_criterion
    from safer_fast.selection.scoring import rank_layers, select_layers
    from safer_fast.train import train_model
    from safer_fast.training.objectives import Formula, register_objective
    from safer_fast.training.sam import SharpnessAware

__version__ = "0.1.0"
__all__ = [
    "Formula",
    "SharpnessAware",
    "build_model",
    "pgd",
    "rank_layers",
    "register_attack",
    "register_criterion",
    "register_objective",
    "select_layers",
    "train_model",
]

_HOMES = {
    "Formula": "safer_fast.training.objectives",
    "SharpnessAware": "safer_fast.training.sam",
    "build_model": "safer_fast.models.build",
    "pgd": "safer_fast.attacks.pgd",
    "rank_layers": "safer_fast.selection.scoring",
    "register_attack": "safer_fast.attacks.named",
    "register_criterion": "safer_fast.selection.criteria",
    "register_objective": "safer_fast.training.objectives",
    "select_layers": "safer_fast.selection.scoring",
    "train_model": "safer_fast.train",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `--help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
