"""Settings of the choice of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safer_fast.config import ranges
from safer_fast.config.ranges import above_zero, at_least, ranged
from safer_fast.config.settings.types import Names


@dataclass
class SelectionConfig:
    """Choice of the layers that SAFER fine-tunes."""

    criterion: str = "sharpness"
    """Score that ranks the layers: sharpness, gradient-norm, criticality, random, least-sharp; all:
    every parameter, norms and embeddings too; or one of your own (docs/extending.md)."""
    fraction: float = ranged(0.05, ranges.FRACTION)
    """Share of the layers that is selected, in (0, 1]; at least one layer."""
    every_epochs: int = ranged(10, at_least(0, ranges.EPOCHS))
    """Epochs between two selections; 0: select once."""
    warmup_epochs: int = ranged(0, at_least(0, ranges.EPOCHS))
    """Epochs of ordinary adversarial training of all parameters before SAFER; part of --epochs."""
    layers: Names | None = None
    """Explicit layer names or patterns (`blocks.1?.attn.*`) in place of a ranking."""
    norms: bool = False
    """Select with each layer the norms right before it."""
    radius: Literal["absolute", "relative"] = "absolute"
    """absolute: a layer is perturbed by rho; relative: by rho times the norm of its weights."""
    rho: float | None = ranged(None, above_zero(ranges.FACTOR))
    """Radius of the perturbation that measures sharpness; default: sam.rho, or 0.05 for 0."""
    from_block: int = ranged(0, at_least(0, ranges.EDGE))
    """Only layers of this block and above (and the head) are candidates; above 0 the blocks below
    can be skipped in a SAM pass."""
    candidates: Names | None = None
    """Only layers of these names or patterns are candidates: `blocks.*` leaves out patch embedding
    and head; default: all."""
    num_images: int = ranged(512, at_least(1, ranges.IMAGES))
    """Number of training images that the scores are measured on."""
    lora_rank: int = ranged(0, at_least(0, ranges.EDGE))
    """Train low-rank factors of this rank beside the selected layers (LoRA, by PEFT) in place of
    their weights; they are merged into the weights at the next selection and at the end; 0: train
    the weights themselves."""
    adapter: Literal["lora", "dora"] = "lora"
    """Kind of the factors. dora: the norm of each row of weights is trained too, apart from its
    direction, which the factors change."""

    @property
    def takes_all(self) -> bool:
        """True if every parameter is trained, without a selection."""
        return self.criterion == "all" and self.layers is None
