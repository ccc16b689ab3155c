"""Settings of the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from safer_fast.config import ranges
from safer_fast.config.ranges import at_least, between, ranged


@dataclass
class ModelConfig:
    """The network: any timm vision transformer."""

    name: str = "vit_small_patch16_224"
    """Model name in timm."""
    pretrained: bool = False
    """Start from timm's pretrained weights, fetched from its hub."""
    checkpoint: str | None = None
    """Start from these weights, in the network that they were trained in: a run folder, a folder of
    the Hugging Face hub or hf-hub:NAME, or a file with timm's names (.safetensors, .pth, .bin).
    Tensors that do not fit the data are adapted: docs/fine-tuning.md."""
    patch_size: int | None = ranged(None, at_least(1, ranges.EDGE))
    """Edge of a patch in pixels; default: the model's own."""
    drop_path_rate: float = ranged(0.0, between(0, 0.99))
    """Stochastic depth rate in [0, 1)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for timm.create_model, e.g. {depth: 4, embed_dim: 64}."""
