"""Settings of the commands that take a run: typed dataclasses like those of config.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from safer_fast.config import Criterion, Names, Radius


@dataclass
class EvaluateConfig:
    """What is evaluated."""

    run: str
    """Run folder."""
    attacks: Names = field(default_factory=lambda: Names(["clean", "fgsm", "pgd-20"]))
    """Attacks, comma-separated: clean, fgsm, pgd-K."""
    epsilon: Radius | None = None
    """Radius of the ball; default: the run's."""
    weights: str = "last"
    """last or best."""
    path: str | None = None
    """Data to evaluate on, in any format of --data.path; default: the run's test split."""
    num_images: int | None = None
    """Use only the first images; default: all."""
    batch_size: int = 256
    """Images per batch, at most."""
    seed: int = 0
    """Seed of the random starts."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass
class SelectConfig:
    """How layers are scored."""

    run: str
    """Run folder."""
    criterion: Criterion = "sharpness"
    """Score that ranks the layers."""
    fraction: float = 0.05
    """Share of the layers that is selected, in (0, 1]; at least one layer."""
    rho: float = 0.05
    """Radius of the perturbation that measures sharpness."""
    radius: Literal["absolute", "relative"] = "absolute"
    """absolute: rho; relative: rho times the norm of the layer's weights."""
    from_block: int = 0
    """Only layers of this block and above (and the head) are candidates."""
    epsilon: Radius | None = None
    """Radius of the attack; default: the run's."""
    steps: int | None = None
    """Steps of the attack; default: the run's."""
    num_images: int = 512
    """Training images that the scores are measured on."""
    weights: str = "last"
    """last or best."""
    seed: int = 0
    """Seed of the images, the attack and the random criterion."""
    device: str = "auto"
    """auto, cpu or cuda."""
    output: str | None = None
    """File to write; default: selection.json in the run folder."""
