"""Settings of the loss, of sharpness-aware minimization and of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safer_fast.config import ranges
from safer_fast.config.ranges import above_zero, at_least, between, ranged


@dataclass
class ObjectiveConfig:
    """The loss on adversarial examples."""

    name: str = "pgd-at"
    """pgd-at: cross-entropy; trades, mart: with a regulariser towards the clean prediction. For
    towers such as CLIP's (docs/towers.md), fare: squared distance to the clean embedding of the
    original network, without labels; tecoa: cross-entropy over text embeddings. Or the name of one
    of your own (docs/extending.md)."""
    beta: float = ranged(6.0, at_least(0, ranges.FACTOR))
    """Weight of the TRADES or MART regulariser."""
    label_smoothing: float = ranged(0.0, between(0, 0.99))
    """Label smoothing of the cross-entropy, in [0, 1)."""
    text_embeddings: str | None = None
    """fare, tecoa: .safetensors or .npz file with a text embedding of each class, `embeddings`
    [K, D], for zero-shot logits; tecoa needs it; fare takes it for accuracies alone."""
    temperature: float = ranged(0.01, above_zero(ranges.FACTOR))
    """Zero-shot logits are cosine similarities divided by it; CLIP's own is 0.01."""


@dataclass
class SAMConfig:
    """Sharpness-aware minimization over the selected layers."""

    rho: float = ranged(0.05, at_least(0, ranges.FACTOR))
    """Radius of the weight perturbation; 0: no second pass."""
    adaptive: bool = False
    """ASAM: perturbation in proportion to each weight's size."""
    layerwise: bool = False
    """One radius for each layer (see selection.radius) instead of one for all together."""
    sync: Literal["global", "local"] = "global"
    """Gradient by which each rank of torchrun perturbs the weights. global: of the whole batch, so
    that the number of ranks does not matter; local: of its own part of it (as SAM's authors do),
    which saves one of two all-reduces."""


@dataclass
class OptimConfig:
    """The optimizer and its schedule; each stage (warm-up, SAFER) runs the whole schedule."""

    name: Literal["adamw", "sgd", "muon", "apex-adam", "apex-sgd", "apex-lamb"] = "adamw"
    """torch's fused AdamW or SGD; muon: Muon for the matrices of blocks and AdamW for the rest, by
    AdamW's rate and decay (docs/method.md); or NVIDIA apex's fused optimizers if apex is built."""
    learning_rate: float = ranged(1e-3, above_zero(ranges.FACTOR))
    """Peak learning rate."""
    safer_learning_rate: float | None = ranged(None, above_zero(ranges.FACTOR))
    """Peak learning rate of the SAFER stage; default: learning_rate."""
    weight_decay: float = ranged(0.05, at_least(0, ranges.FACTOR))
    """Decay of weight matrices; norms, biases and embeddings are not decayed."""
    momentum: float = ranged(0.9, between(0, 0.9999))
    """Momentum of SGD, in [0, 1)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Running-average coefficients of Adam and LAMB."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Shape of the learning rate after its warm-up."""
    warmup_epochs: float = ranged(0.0, at_least(0, ranges.EPOCHS))
    """Epochs over which the learning rate of a stage rises linearly from 0."""
    milestones: tuple[float, ...] = (0.875, 0.95)
    """step: shares of the stage after which the learning rate is multiplied by decay."""
    decay: float = ranged(0.1, between(0, 1, "a factor"))
    """step: factor at each milestone."""
    min_learning_rate: float = ranged(0.0, at_least(0, ranges.FACTOR))
    """cosine: learning rate at the end."""
    clip_norm: float | None = ranged(None, above_zero(10**9))
    """Clip the gradient to this norm; default: no clipping."""
    ema_decay: float | None = ranged(None, between(0, 0.999999))
    """Average the weights with this decay per step, evaluate and export that; default: not."""
