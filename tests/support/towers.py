"""Small CLIP, SigLIP and DINO towers with random weights in files, and text embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file

WIDTH, PROJECTED = 32, 24
SIZES: dict[str, Any] = {"embed_dim": WIDTH, "depth": 3, "num_heads": 2}
TOWERS = {
    "clip": "vit_base_patch16_clip_224",
    "siglip": "vit_base_patch16_siglip_224",
    "dinov2": "vit_small_patch14_dinov2",
}
"""Names of timm by the kind of a tower."""


def save_tower(folder: Path, kind: str = "clip", image_size: int = 8) -> list[str]:
    """Save weights of a small tower of grey images; return the flags that train it."""
    torch.manual_seed(3)
    projected = PROJECTED if kind == "clip" else 0
    network = timm.create_model(
        TOWERS[kind], img_size=image_size, in_chans=1, patch_size=4, num_classes=projected, **SIZES
    )
    for name, value in network.named_parameters():
        # else blocks of a new DINOv2 scale to nothing, and outputs are nearly the same
        torch.nn.init.normal_(value, std=0.3) if "gamma" not in name else value.data.fill_(1.0)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)
    return [
        f"--model.name={TOWERS[kind]}",
        f"--model.checkpoint={file}",
        "--model.patch_size=4",
        f"--model.arguments={json.dumps(SIZES)}",
    ]


def width_of(kind: str) -> int:
    """Numbers of an embedding of such a tower."""
    return PROJECTED if kind == "clip" else WIDTH


def save_texts(file: Path, kind: str = "clip", names: list[str] | None = None) -> Path:
    """Save text embeddings of ten digits, as .npz or .safetensors by the file's ending."""
    embeddings = np.random.default_rng(5).normal(size=(10, width_of(kind))).astype(np.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npz":
        named = {} if names is None else {"class_names": np.array(names)}
        np.savez(file, embeddings=embeddings, **named)
    else:
        metadata = None if names is None else {"class_names": json.dumps(names)}
        save_file({"embeddings": torch.from_numpy(embeddings)}, file, metadata)
    return file
