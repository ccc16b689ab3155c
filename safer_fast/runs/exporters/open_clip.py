"""Export of an image tower to open_clip: its weights, with the names of open_clip's models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safer_fast.config.commands import ExportConfig

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun

FILE = "visual.safetensors"
_NAMES = {
    r"patch_embed\.proj\.weight": "conv1.weight",
    r"norm_pre\.(weight|bias)": r"ln_pre.\1",
    r"norm\.(weight|bias)": r"ln_post.\1",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"transformer.resblocks.\1.ln_\2.\3",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"transformer.resblocks.\1.attn.in_proj_\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"transformer.resblocks.\1.attn.out_proj.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"transformer.resblocks.\1.mlp.c_fc.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"transformer.resblocks.\1.mlp.c_proj.\2",
}
_OTHERS = ("cls_token", "pos_embed", "head.weight", "head.bias")
_MOST_ERROR = 1e-5


def write_open_clip(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    """Write the tower's weights for open_clip; an `Exporter`.

    Raises ValueError for a classifier.
    """
    from safer_fast.models.weights_file import save_weights

    if not loaded.is_tower:
        raise ValueError(
            f"--format: expected another than open_clip, which has image towers, for {config.run}, "
            "a classifier, got open_clip"
        )
    save_weights(open_clip_names(loaded.model.network.state_dict()), folder / FILE)
    return (
        f'load it: model.load_state_dict(safetensors.torch.load_file("FOLDER/{FILE}"), '
        "strict=False), into the model of open_clip whose image tower this was"
    )


def open_clip_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of timm's tower with open_clip's names, which timm's own converter reads again.

    A tower that is built as CLIP's gets those of open_clip's own network, `visual.*`; others, such
    as SigLIP's, which are timm's there too, `visual.trunk.*`. CLIP's projection has no bias: one
    that was trained moves to the norm before it, where it has the same effect. Raises ValueError
    where it has not.
    """
    renamed = {name: _renamed(name) for name in weights if name not in _OTHERS}
    if "norm_pre.weight" not in weights or "head.weight" not in weights or None in renamed.values():
        return _of_trunk(weights)
    found = {f"visual.{new}": weights[name] for name, new in renamed.items()}
    projection, bias = weights["head.weight"], weights["head.bias"]
    if bias.any():
        shift = _shift(projection, bias)
        found["visual.ln_post.bias"] = found["visual.ln_post.bias"] + shift
    return found | {
        "visual.class_embedding": weights["cls_token"].flatten(),
        "visual.positional_embedding": weights["pos_embed"].squeeze(0),
        "visual.proj": projection.T.contiguous(),
    }


def _renamed(name: str) -> str | None:
    for pattern, new in _NAMES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return None


def _of_trunk(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a network of timm within open_clip's; its projection lies beside it."""
    trunk = {f"visual.trunk.{n}": t for n, t in weights.items() if not n.startswith("head.")}
    if "head.weight" not in weights:
        return trunk
    if weights["head.bias"].any():
        raise ValueError(
            "--format: expected a projection without bias for open_clip, got one with a bias"
        )
    return trunk | {"visual.head.proj.weight": weights["head.weight"]}


def _shift(projection: Tensor, bias: Tensor) -> Tensor:
    """The change [width] of a projection's input that changes its output by `bias`."""
    exact: Tensor = torch.linalg.pinv(projection.double()) @ bias.double()
    error = (projection.double() @ exact - bias.double()).norm()
    if not error <= _MOST_ERROR * bias.double().norm():
        raise ValueError(
            "--format: expected a projection to at most as many numbers as the tower is wide for "
            f"open_clip, got {list(projection.shape)}"
        )
    shift: Tensor = exact.to(bias.dtype)
    return shift
