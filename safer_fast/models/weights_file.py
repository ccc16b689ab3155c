"""Weights on disk: safetensors with timm's names, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from safer_fast.runtime.files import naming
from safer_fast.runtime.tensor_files import verify_if_signed, write_tensors

WEIGHTS = "model.safetensors"
BEST_WEIGHTS = "best.safetensors"
MODEL_CONFIG = "config.json"


def load_weights(network: nn.Module, file: Path) -> list[str]:
    """Load the weights of a .safetensors file whose names and shapes are exactly the network's.

    Returns a line on tensors that were ignored. Raises ValueError, naming the file, if it is
    missing, damaged or of another model.
    """
    weights = load_tensors(file)
    passed = _computed(network, weights, file)
    weights = {name: tensor for name, tensor in weights.items() if name not in passed}
    _check_same_tensors(network.state_dict(), weights, file)
    network.load_state_dict(weights)
    if not passed:
        return []
    more = f" and {len(passed) - 1} more" if len(passed) > 1 else ""
    return [f"weights: {file} also has {passed[0]}{more}, which the network computes: passed by"]


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, on the CPU, and verify its sha256 if it has one.

    Raises ValueError naming the file if it is damaged.
    """
    try:
        verify_if_signed(file)
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model.checkpoint: expected safetensors, got {file}, which does not load ({error})"
        ) from None


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to `path`, whole or not at all.

    Raises ValueError naming it if it cannot be written.
    """
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with naming(path):
        write_tensors(path, contents, {})


def _computed(network: nn.Module, weights: Mapping[str, Tensor], file: Path) -> list[str]:
    """Names of tensors in a file that the network computes itself when it is built.

    Earlier versions wrote them. Raises ValueError for one that this network computes differently.
    """
    state, buffers = network.state_dict(), dict(network.named_buffers())
    names = [name for name in weights if name in buffers and name not in state]
    for name in names:
        own, got = buffers[name], weights[name]
        # some are placeholders until the first images are seen
        if own.shape == got.shape and not torch.allclose(own, got.to(own), equal_nan=True):
            raise ValueError(
                f"model.checkpoint: expected the weights of this model, got those of another: "
                f"{file} has another {name}"
            )
    return names


def _check_same_tensors(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], file: Path
) -> None:
    missing = [name for name in expected if name not in got]
    extra = [name for name in got if name not in expected]
    if missing or extra:
        raise ValueError(
            f"model.checkpoint: expected the weights of this model, got those of another: {file} "
            f"lacks {missing[:2] or 'nothing'} and has {extra[:2] or 'nothing'} besides"
        )
    for name, tensor in expected.items():
        if tensor.shape != got[name].shape:
            raise ValueError(
                f"model.checkpoint: expected {name} of shape {list(tensor.shape)}, "
                f"got {list(got[name].shape)} in {file}"
            )
