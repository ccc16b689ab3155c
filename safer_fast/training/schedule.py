"""Schedule of a run: stages, selections, evaluations, radii and learning rate by epoch and step."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import NamedTuple

from safer_fast.attacks.radii import radii_at
from safer_fast.config.schema import Config, OptimConfig
from safer_fast.config.unused import unused_settings


@dataclass(frozen=True)
class Stage:
    """Epochs with one schedule: stage `warm-up` trains everything, stage `safer` the selection."""

    name: str
    first_epoch: int
    last_epoch: int
    learning_rate: float

    @property
    def num_epochs(self) -> int:
        """Number of epochs of the stage."""
        return self.last_epoch - self.first_epoch + 1

    def selects_at(self, epoch: int, every_epochs: int) -> bool:
        """Return true if layers are selected right before this epoch."""
        past = epoch - self.first_epoch
        return past == 0 or (self.name == "safer" and every_epochs > 0 and past % every_epochs == 0)


def stage_of(config: Config, epoch: int) -> Stage:
    """Return the stage of an epoch, numbered from 1."""
    warmup = config.selection.warmup_epochs
    if epoch <= warmup:
        return Stage("warm-up", 1, warmup, config.optim.learning_rate)
    peak = config.optim.safer_learning_rate or config.optim.learning_rate
    return Stage("safer", warmup + 1, config.epochs, peak)


class RunPlan:
    """Plan of a run's epochs: stages, and epochs with a selection or an evaluation."""

    def __init__(self, config: Config) -> None:
        self._config = config

    @property
    def stages(self) -> list[Stage]:
        """The stages, in order."""
        return list(dict.fromkeys(self.stage_of(epoch) for epoch in (1, self._config.epochs)))

    def stage_of(self, epoch: int) -> Stage:
        """Return the stage of an epoch, numbered from 1."""
        return stage_of(self._config, epoch)

    def selects_before(self, epoch: int) -> bool:
        """Return true if the epoch begins with a selection of layers, or of all in the warm-up."""
        return self.stage_of(epoch).selects_at(epoch, self._config.selection.every_epochs)

    def evaluates_after(self, epoch: int) -> bool:
        """Return true if the epoch ends with an evaluation on the validation split."""
        every, last = self._config.evaluation.every_epochs, self._config.epochs
        return epoch % every == 0 or epoch == last

    def counts_for_patience(self, epoch: int) -> bool:
        """Return true if an evaluation counts against patience: last stage, full epsilon."""
        attack = self._config.attack
        is_full = epoch > attack.clean_epochs + attack.epsilon_warmup_epochs
        return is_full and self.stage_of(epoch).last_epoch == self._config.epochs


class StepSettings(NamedTuple):
    """Settings of one step: radii and number of iterations of its attack, and learning rate."""

    epsilon: float
    step_size: float
    attack_steps: int
    learning_rate: float


def settings_at(
    config: Config,
    stage: Stage,
    epoch: int,
    index: int,
    num_batches: int,
    attack_steps: int | None = None,
) -> StepSettings:
    """Return the settings of step `index` (from 0) of an epoch of `num_batches` steps.

    attack_steps: iterations that audits have chosen; default: the most.
    """
    steps = config.attack.most_steps if attack_steps is None else attack_steps
    epsilon, step_size = radii_at(config.attack, epoch - 1 + index / num_batches, steps)
    done = (epoch - stage.first_epoch) * num_batches + index
    total = stage.num_epochs * num_batches
    rate = learning_rate_at(config.optim, stage.learning_rate, done, total, num_batches)
    return StepSettings(epsilon, step_size, steps if epsilon > 0 else 0, rate)


def weaknesses(config: Config) -> list[str]:
    """Lines on ramps that the run is too short for, and on settings that have no effect."""
    attack, optim, lines = config.attack, config.optim, []
    reached = radii_at(attack, config.epochs)[0]
    if attack.steps and reached < attack.epsilon * (1 - 1e-6):
        lines.append(
            f"attack.epsilon: reaches {reached:.4g} of {attack.epsilon:.4g} by the end of "
            f"--epochs {config.epochs}, for --attack.clean_epochs {attack.clean_epochs} and "
            f"--attack.epsilon_warmup_epochs {attack.epsilon_warmup_epochs} come first"
        )
    if attack.steps and attack.epsilon and attack.step_size is not None and not attack.step_size:
        lines.append("attack.step_size: 0 leaves every attack at its random start")
    for stage in RunPlan(config).stages:
        if stage.num_epochs < optim.warmup_epochs:
            lines.append(
                f"optim.warmup_epochs: {optim.warmup_epochs:g} are more than the "
                f"{stage.num_epochs} of stage {stage.name}, whose learning rate reaches "
                f"{stage.num_epochs / optim.warmup_epochs:.0%} of its peak"
            )
    lines += unused_settings(config)
    return lines


def learning_rate_at(
    config: OptimConfig, peak: float, step: int, num_steps: int, steps_per_epoch: int
) -> float:
    """Return the learning rate of step `step` (from 0) in a stage of `num_steps` steps."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
        low = min(config.min_learning_rate, peak)
        return low + (peak - low) * (1 + cos(pi * progress)) / 2
    if config.schedule == "step":
        passed = sum(step >= milestone * num_steps for milestone in config.milestones)
        return float(peak * config.decay**passed)
    return peak
