"""Settings of the threat model and of the attack in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safer_fast.config import ranges
from safer_fast.config.ranges import at_least, between, ranged
from safer_fast.config.settings.types import Radius


@dataclass
class AttackConfig:
    """The threat model and the attack that training runs against."""

    name: Literal["pgd", "apgd"] = "pgd"
    """pgd; apgd: Auto-PGD, which halves the step of each image where it overshoots and keeps the
    worst point. It needs a number of steps, and takes one more forward pass than that."""
    loss: Literal["objective", "cross-entropy", "margin", "dlr"] = "objective"
    """Loss that the attack raises. objective: the cross-entropy, unless the objective has another
    (trades, fare); margin: of the highest other logit over that of the label (Carlini and Wagner);
    dlr: the margin over the distance of the highest and the third highest logit (AutoAttack)."""
    norm: Literal["linf", "l2"] = "linf"
    """Shape of the ball around each image."""
    epsilon: Radius = ranged(Radius(8 / 255), ranges.EPSILON)
    """Radius of the ball; pixels are in [0, 1]."""
    steps: int | Literal["auto"] = ranged("auto", at_least(0, ranges.ITERATIONS))
    """Iterations of PGD; 1 is FGSM-RS, 0 is clean training. auto: as few as attack nearly as well
    as PGD-20, by audits while training. The papers train with 10."""
    strength: float = ranged(0.99, between(0, 1))
    """auto: least loss after the attack, as a share of that after PGD-20 from the same start."""
    max_steps: int = ranged(10, at_least(1, ranges.ITERATIONS))
    """auto: most iterations, and their number until the first audit."""
    step_size: Radius | None = ranged(None, ranges.STEP_SIZE)
    """Length of one step; default: 1.25 epsilon for one step, 2.5 epsilon / steps for more."""
    clean_epochs: int = ranged(0, at_least(0, ranges.EPOCHS))
    """Epochs at epsilon 0 before the ramp."""
    epsilon_warmup_epochs: int = ranged(0, at_least(0, ranges.EPOCHS))
    """Epochs after the clean ones over which epsilon, and step_size with it, rises from 0."""
    precision: Literal["auto", "amp", "bf16", "fp8"] = "auto"
    """Precision of the attack in training, nowhere else. amp: that of --amp. bf16: features between
    blocks too, which amp keeps in fp32; audited, with amp in its place where it is weaker. fp8: as
    bf16, and the large matrices of the blocks are multiplied in FP8; for GPUs that have it (Hopper,
    Ada), simulated on a CPU. auto: bf16 on a GPU with --amp bf16, else amp."""
    fp8_from: int | Literal["auto"] = ranged("auto", at_least(0, 2**40))
    """With fp8, matrices of fewer elements stay in bf16; auto: on a GPU those that a timing, made
    once, shows no faster; on a CPU those of less than 2^21."""
    audit_every: int = ranged(250, at_least(1, ranges.STEPS))
    """Steps between two audits of steps auto, bf16 and fp8: a stronger attack on a few images."""
    audit_images: int = ranged(64, at_least(1, ranges.IMAGES))
    """Images of an audit, on each rank; of steps auto at most a quarter of a batch."""
    audit_ratio: float = ranged(0.98, between(0, 1))
    """Least loss after bf16 or fp8, as a share of that in amp; below it amp is used; 0: never."""

    @property
    def most_steps(self) -> int:
        """Iterations of the attack at its full strength."""
        return self.max_steps if self.steps == "auto" else self.steps

    @property
    def is_none(self) -> bool:
        """True in clean training: there are no iterations, or the radius is 0."""
        return not self.most_steps or not self.epsilon

    def named(self, steps: int) -> str:
        """Name the attack of so many iterations, as in APGD-2."""
        return f"{self.name.upper()}-{steps}"
