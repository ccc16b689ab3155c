"""Radii of an attack in each epoch, when they rise in a ramp."""

from __future__ import annotations

from safer_fast.attacks.pgd import default_step_size
from safer_fast.config.schema import AttackConfig


def radii_at(
    config: AttackConfig, epochs_done: float, steps: int | None = None
) -> tuple[float, float]:
    """Epsilon and step size after `epochs_done` epochs, a fraction within one; 0 without an attack.

    steps: iterations of the attack, whose default step size depends on them; default: the most.
    """
    if config.is_none:
        return 0.0, 0.0
    share = 1.0
    if config.epsilon_warmup_epochs or config.clean_epochs:
        since = epochs_done - config.clean_epochs
        share = min(max(since / max(config.epsilon_warmup_epochs, 1e-9), 0.0), 1.0)
    step_size = config.step_size
    if step_size is None:
        step_size_at_full = default_step_size(
            config.epsilon, config.most_steps if steps is None else steps
        )
    else:
        step_size_at_full = float(step_size)
    return share * config.epsilon, share * step_size_at_full
