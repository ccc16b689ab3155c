"""Training figures: step and epoch lines of metrics.jsonl, and of the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from safer_fast.attacks.radii import radii_at
from safer_fast.config.schema import Config
from safer_fast.data import Batch, Data
from safer_fast.evaluation.accuracy import Accuracy
from safer_fast.evaluation.overfitting import AttackGap
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runtime.timing import DataWait
from safer_fast.training.engine import Engine
from safer_fast.training.health import health_figures
from safer_fast.training.schedule import Stage
from safer_fast.training.step import Step
from safer_fast.training.validation import validation_figures

STEP_PARTS = ("data", "attack", "ascent", "descent", "update")
MOST_WAIT = 0.1
"""Share of an epoch's time above which its line says that it waited for data."""


class TrainingLog:
    """Writes the step and epoch lines of a run to its log.

    num_images: images of this rank in the epoch so far.
    """

    def __init__(self, config: Config, log: RunLog, engine: Engine, data: Data) -> None:
        self.config, self.log, self.engine, self.data = config, log, engine, data
        self.num_steps = config.epochs * len(data.train)
        self._steps_taken, self._seconds, self.num_images = 0.0, 0.0, 0

    def begin_epoch(self) -> None:
        """Start the clock of the epoch, and its count of images."""
        self._waits, self._logged = DataWait(self.engine.runtime.device), time.monotonic()
        self.num_images, self._num_batches = 0, 0

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on; count their images, and time the wait for each."""
        for batch in self._waits.watch(batches):
            self.num_images += batch.num_images
            self._num_batches += 1
            yield batch

    def write(
        self, step: Step, epoch: int, num_steps: int, learning_rate: float, is_last: bool
    ) -> dict[str, float]:
        """Write a line on the steps since the last one; return their sums.

        The only place in the training loop that waits for the device. is_last: the line of the
        epoch follows.
        """
        sums = self._take(step)
        figures = step_figures(sums, step.health.is_sharpness_aware)
        if self.engine.tower.teacher is not None:
            figures["robust_accuracy"] = None
        figures |= step.attack.audited | self._attack_figures(step.attack.steps)
        figures["learning_rate"] = learning_rate
        self.log.write("step", epoch=epoch, step=num_steps, **figures)
        self._steps_taken += sums["timed_steps"]
        self._seconds += sums["seconds"]
        left_s = self._seconds / max(self._steps_taken, 1) * (self.num_steps - num_steps)
        accuracy = figures["robust_accuracy"]
        shown = {
            **({} if accuracy is None else {"robust": f"{accuracy:.3f}"}),
            "images/s": f"{figures['images_per_second']:.0f}",
            "run": f"{timedelta(seconds=round(left_s))} left",
        }
        line = f"step {num_steps}/{self.num_steps}  loss {figures['loss']:.4f}"
        self.log.show(line, shown, only_on_terminals=is_last)
        return sums

    def epoch_figures(self, step: Step, epoch: int, totals: Mapping[str, float]) -> dict[str, Any]:
        """Training figures of an epoch, from the sums of its step lines; see `epoch_figures`."""
        figures = epoch_figures(
            totals,
            epsilon=radii_at(self.config.attack, epoch)[0],
            num_images=self.data.train.images_per_epoch,
            peak_memory_mib=self.engine.runtime.peak_memory_mib(),
            is_sharpness_aware=step.health.is_sharpness_aware,
        )
        if self.engine.tower.teacher is not None:
            figures["train_robust_accuracy"] = None
        steps = totals.get("attack_steps", step.attack.steps)
        return figures | self._attack_figures(int(steps))

    def _attack_figures(self, steps: int) -> dict[str, Any]:
        """Iterations of the last attack, and the strength that audits found of so many, or null."""
        chosen = self.engine.audit.steps
        strength = None if chosen is None or not steps else chosen.strength
        return {"attack_steps": steps, "attack_strength": strength}

    def end_epoch(
        self,
        stage: Stage,
        epoch: int,
        num_steps: int,
        figures: Mapping[str, Any],
        accuracies: tuple[Accuracy, Accuracy] | None,
        gap: AttackGap | None,
    ) -> None:
        """Write the line of an epoch.

        figures: of training. accuracies: clean and robust, on the validation split, None where it
        was not evaluated. gap: the check for catastrophic overfitting, None without.
        """
        of_images = self.data.validation.num_images
        clean, robust = accuracies or (None, None)
        validation = validation_figures(clean, robust, of_images)
        values = {**figures, **validation, **gap_figures(gap)}
        self.log.write("epoch", epoch=epoch, step=num_steps, **values)
        epochs = self.config.epochs
        self.log.say(epoch_line(epoch, epochs, stage.name, figures, validation, gap))

    def _take(self, step: Step) -> dict[str, float]:
        """Sums of the steps since the last line, with their times; resets them."""
        sums = step.health.sums.take(self.engine.ranks.sum_)
        sums["steps"] = sums["skipped"] + sums["taken"]
        # a resumed run has sums of steps that another process has taken, and timed
        share = min(self._num_batches / max(sums["steps"], 1), 1.0)
        sums |= {f"timed_{name}": share * sums[name] for name in ("steps", "images")}
        self._num_batches = 0
        now = time.monotonic()
        sums |= {"waited": self._waits.take(), "seconds": now - self._logged}
        sums["audit_seconds"] = self.engine.audit.take_seconds()
        self._logged = now
        seconds = step.timer.take() | {"data": sums["waited"]}
        return sums | {f"{name}_seconds": seconds.get(name, 0.0) for name in STEP_PARTS}


def step_figures(sums: Mapping[str, float], is_sharpness_aware: bool) -> dict[str, Any]:
    """Compute the figures of a step line from the sums of its steps."""
    counted = max(sums["images"], 1)  # there are none if all were unreadable
    return {
        "loss": sums["loss"] / counted,
        "robust_accuracy": sums["correct"] / counted,
        "skipped_steps": int(sums["skipped"]),
        "images_per_second": sums["timed_images"] / max(sums["seconds"], 1e-9),
        **health_figures(sums, is_sharpness_aware),
        "stage_ms": stage_times(sums),
    }


def stage_times(sums: Mapping[str, float]) -> dict[str, float]:
    """Mean milliseconds of a step's stages; data: the wait for its batch.

    ascent: the first pass, with the prefix, and the perturbation; descent: the second pass, or the
    only one.
    """
    steps = max(sums.get("timed_steps", sums["steps"]), 1)
    return {name: 1e3 * sums[f"{name}_seconds"] / steps for name in STEP_PARTS}


def epoch_figures(
    totals: Mapping[str, float],
    *,
    epsilon: float,
    num_images: int,
    peak_memory_mib: float,
    is_sharpness_aware: bool,
) -> dict[str, Any]:
    """Compute the training figures of an epoch of `num_images` images from its summed step lines.

    Images that no step has counted were unreadable. Raises ValueError if all were.
    """
    if not totals["images"]:
        raise ValueError(
            "data.path: expected an image that can be read in every epoch, got none of "
            f"{num_images}; the checkpoints from before are kept, for --resume auto"
        )
    counted, elapsed = max(totals["images"], 1), totals["seconds"]
    health = health_figures(totals, is_sharpness_aware)
    success = health["attack_success"]
    return {
        "train_loss": totals["loss"] / counted,
        "train_robust_accuracy": totals["correct"] / counted,
        "train_start_accuracy": None if success is None else 1 - success[0],
        "learning_rate": totals["learning_rate"],
        "epsilon": epsilon,
        "images_per_second": totals.get("timed_images", totals["images"]) / elapsed,
        "data_wait_fraction": totals["waited"] / elapsed,
        "audit_fraction": totals.get("audit_seconds", 0.0) / elapsed,
        "peak_memory_mib": peak_memory_mib,
        "skipped_steps": int(totals["skipped"]),
        "skipped_images": num_images - int(totals["images"]),
        **health,
        "stage_ms": stage_times(totals),
    }


def gap_figures(gap: AttackGap | None) -> dict[str, Any]:
    """Figures on catastrophic overfitting of an epoch's event, null without a check."""
    return {
        "training_attack_accuracy": None if gap is None else gap.training_attack_accuracy,
        "pgd_20_accuracy": None if gap is None else gap.pgd_20_accuracy,
        "catastrophic_overfitting": None if gap is None else gap.is_catastrophic,
    }


def epoch_line(
    epoch: int,
    epochs: int,
    stage: str,
    figures: Mapping[str, Any],
    accuracies: Mapping[str, Any],
    gap: AttackGap | None = None,
) -> str:
    """Format the line of an epoch: training figures, validation accuracies if any, warnings."""
    validation = ""
    if accuracies["clean_accuracy"] is not None:
        validation = (
            f"  validation clean {accuracies['clean_accuracy']:.3f} "
            f"robust {accuracies['robust_accuracy']:.3f}"
        )
    if accuracies.get("embedding_distance") is not None:
        validation = (
            f"  validation distance clean {accuracies['clean_embedding_distance']:.4g} "
            f"attacked {accuracies['embedding_distance']:.4g}"
        )
    accuracy = figures["train_robust_accuracy"]
    kind = "robust" if figures.get("attack_steps", 1) else "clean"
    training = "" if accuracy is None else f"  train {kind} {accuracy:.3f}"
    return (
        f"epoch {epoch:>3}/{epochs} {stage:<7}  loss {figures['train_loss']:.4f}"
        f"{training}{validation}  "
        f"epsilon {figures['epsilon']:.4f}{_attack(figures)}  "
        f"lr {figures['learning_rate']:.2e}  "
        f"{figures['images_per_second']:.0f} images/s{_trouble(figures, accuracies, gap)}"
    )


def _attack(figures: Mapping[str, Any]) -> str:
    """Iterations of the attack, their strength and the cost of audits, where audits choose them."""
    if figures.get("attack_strength") is None:
        return ""
    strength, share = figures["attack_strength"], figures["audit_fraction"]
    return f" by PGD-{figures['attack_steps']} (strength {strength:.3f}, audits {share:.1%})"


def _trouble(
    figures: Mapping[str, float], accuracies: Mapping[str, Any], gap: AttackGap | None
) -> str:
    """Warnings about an epoch or its data."""
    found = ""
    if accuracies["num_not_finite"]:
        found += f"  LOGITS NOT FINITE on {accuracies['num_not_finite']} validation images"
    if accuracies["gradient_masking"]:
        found += f"  GRADIENT MASKING suspected ({'; '.join(accuracies['gradient_masking'])})"
    if gap is not None and gap.is_catastrophic:
        found += (
            f"  CATASTROPHIC OVERFITTING (training images: {gap.training_attack_accuracy:.3f} "
            f"under the training attack, {gap.pgd_20_accuracy:.3f} under PGD-20)"
        )
    if figures["data_wait_fraction"] > MOST_WAIT:
        found += f"  waited {figures['data_wait_fraction']:.0%} for data (data.num_workers?)"
    if figures["skipped_images"]:
        found += f"  {figures['skipped_images']:.0f} images left out"
    return found
