"""Settings of the measurement of accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field

from safer_fast.config import ranges
from safer_fast.config.ranges import at_least, ranged
from safer_fast.config.settings.types import Names


@dataclass
class EvaluationConfig:
    """Measurement of accuracy during and after training."""

    every_epochs: int = ranged(1, at_least(1, ranges.EPOCHS))
    """Epochs between two evaluations on the validation split; the last epoch always has one."""
    steps: int = ranged(10, at_least(1, ranges.ITERATIONS))
    """PGD steps of the evaluation during training."""
    max_images: int | None = ranged(1000, at_least(1, ranges.IMAGES))
    """Validation images of the evaluation during training, the same at each, stratified by class;
    null: all."""
    attacks: Names = field(default_factory=lambda: Names(["clean", "pgd-20"]))
    """Final figures: clean, fgsm, pgd-K, cw or cw-K, at attack.epsilon."""
    final_images: int | None = ranged(None, at_least(1, ranges.IMAGES))
    """Images of the final figures, stratified by class, of the test split or else the validation
    split; default: all."""
    batch_size: int | None = ranged(None, at_least(1, ranges.IMAGES))
    """Images of an evaluation at a time, at most, over all ranks; default: batch_size. More keep
    the machine busier and take more memory; accuracies change by rounding at most."""
    patience: int | None = ranged(None, at_least(1, ranges.EPOCHS))
    """End the run after this many evaluations at full epsilon without a better robust accuracy, in
    its last stage; default: never."""
    sentinel_images: int = ranged(128, at_least(0, ranges.IMAGES))
    """Training images on which every evaluation compares the training attack with PGD-20, to notice
    catastrophic overfitting; 0: none."""
