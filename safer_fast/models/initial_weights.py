"""Weights of other trainers: read without executing code, and adapted to the network."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safer_fast.models.weights_file import load_tensors
from safer_fast.models.weights_source import Source, as_flags

Weights = dict[str, Tensor]
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Suffixes of files that torch.save writes."""
# Keys under which trainers save weights, averages first.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "backbone.")
_ANCHOR = "patch_embed.proj.weight"
# Errors that timm's functions raise for weights of another network.
_NOT_TO_BE_RESAMPLED = (AttributeError, LookupError, RuntimeError, ValueError, AssertionError)


class Fitted(NamedTuple):
    """Result of adapting weights: a line for each change, and the layers that the weights lack."""

    notes: list[str]
    new_layers: list[str]


def read_weights(file: Path) -> tuple[Weights, list[str]]:
    """Read the tensors of a file by the network's names, and a line on what was left out.

    `.pth`, `.pt` and `.bin` are read as tensors alone: code in them is not executed. Raises
    ValueError, one line, for a file that is damaged, contains code, or no tensors.
    """
    if file.suffix.lower() not in PICKLED:
        return _without_prefix(load_tensors(file), file)
    content, notes = _unpickle(file), []
    while key := next((key for key in _KEYS if isinstance(_item(content, key), Mapping)), None):
        content = content[key]
        if key.endswith("_ema"):
            notes.append(f"model.checkpoint: the average of the weights ({key}) is taken")
    tensors = content.items() if isinstance(content, Mapping) else ()
    weights = {str(name): value for name, value in tensors if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"model.checkpoint: expected tensors by name in {file}, got none")
    weights, more = _without_prefix(weights, file)
    return weights, notes + more


def load_source(
    network: nn.Module,
    source: Source,
    resample: Callable[[Weights], Weights],
    adapt_channels: Callable[[Tensor, int], Tensor],
) -> Fitted:
    """Load the weights of a file into the network, adapted by `fit_weights`.

    Raises ValueError, one line, for a file that does not load and for weights of another network,
    with the flags that would build it.
    """
    weights, notes = read_weights(source.weights)
    hint = as_flags(source.settings) if source.settings else _shape_hint(weights)
    try:
        fitted = fit_weights(network, weights, resample, adapt_channels)
    except ValueError as error:
        raise ValueError(
            "model.checkpoint: expected the weights of this network, got those of another: "
            f"{source.weights} {error}; give {hint}"
        ) from None
    return fitted._replace(notes=notes + fitted.notes)


def fit_weights(
    network: nn.Module,
    weights: Weights,
    resample: Callable[[Weights], Weights],
    adapt_channels: Callable[[Tensor, int], Tensor],
) -> Fitted:
    """Load weights into the network, adapted to its names and sizes.

    resample: returns weights with the network's names and sizes. adapt_channels: returns the weight
    of the first convolution for a number of channels. A head for another number of classes is left
    out. Raises ValueError, one line, for weights of another network.
    """
    expected = network.state_dict()
    computed = {name for name, _ in network.named_buffers()} - expected.keys()
    given = weights
    weights = {name: tensor for name, tensor in weights.items() if name not in computed}
    if not _is_same(expected, weights):
        with suppress(*_NOT_TO_BE_RESAMPLED):  # names and shapes are compared below
            weights = resample(dict(weights))
    weights = dict(weights)
    for name in _names(network, "first_conv"):
        kernel = weights.get(f"{name}.weight")
        wanted = expected.get(f"{name}.weight")
        if kernel is not None and wanted is not None and kernel.shape[1:2] != wanted.shape[1:2]:
            weights[f"{name}.weight"] = adapt_channels(kernel, wanted.shape[1])
    notes = _changes(given, weights)
    heads = _leave_out_heads(network, expected, weights)
    _check_same(expected, weights)
    network.load_state_dict(weights)
    return Fitted([*notes, *heads.values()], list(heads))


def _unpickle(file: Path) -> Any:
    """Read a file of torch.save that contains tensors and plain values alone."""
    try:
        # checkpoints of timm's trainer contain the arguments of its command line
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        # torch raises many kinds of errors for damaged files
        names = _globals_in(file)
        why = f"asks for {', '.join(names[:3])}, which is not run"
        if not names:
            why = "is damaged or no such file"
        raise ValueError(
            f"model.checkpoint: expected tensors alone, got {file}, which {why}"
        ) from None


def _globals_in(file: Path) -> list[str]:
    """Functions and classes that a pickle would import, and a file of tensors does not need."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:
        return []


def _item(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, Mapping) else None


def _without_prefix(weights: Weights, file: Path) -> tuple[Weights, list[str]]:
    """Strip prefixes of names; return the network's weights and a line on tensors beside it."""
    while weights and (
        prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in weights)), None)
    ):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    anchors = [name.removesuffix(_ANCHOR) for name in weights if name.endswith(_ANCHOR)]
    # models of two towers are left to timm
    if len(anchors) != 1 or not anchors[0].endswith(_PREFIXES) or "visual." in anchors[0]:
        return weights, []
    inner = {name: tensor for name, tensor in weights.items() if name.startswith(anchors[0])}
    others = [name for name in weights if name not in inner]
    notes = [f"model.checkpoint: left out of {file.name}: {_listed(others)}"] if others else []
    return {name.removeprefix(anchors[0]): tensor for name, tensor in inner.items()}, notes


def _shared_prefix(weights: Weights) -> str:
    """The prefix that all names share, or an empty string."""
    shared = (prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in weights))
    return next(shared, "") if weights else ""


def _is_same(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    return expected.keys() == weights.keys() and all(
        tensor.shape == weights[name].shape for name, tensor in expected.items()
    )


def _names(network: Any, kind: str) -> list[str]:
    """Names of the first convolutions, or the classifiers, of a timm network."""
    names = network.pretrained_cfg.get(kind) or ()
    return [names] if isinstance(names, str) else list(names)


def _changes(given: Weights, weights: Weights) -> list[str]:
    """Lines on tensors that were resized, and on those that were left out."""
    changed = [
        f"{name} {list(given[name].shape)} to {list(tensor.shape)}"
        for name, tensor in weights.items()
        if name in given and given[name].shape != tensor.shape
    ]
    kept = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    left_out = [
        name
        for name, tensor in given.items()
        if name not in weights and tensor.untyped_storage().data_ptr() not in kept
    ]
    notes = [f"model.checkpoint: made to fit: {_listed(changed)}"] if changed else []
    return notes + ([f"model.checkpoint: left out: {_listed(left_out)}"] if left_out else [])


def _leave_out_heads(network: nn.Module, expected: Weights, weights: Weights) -> dict[str, str]:
    """Keep the network's classifiers if the weights have other classes; return lines by name."""
    notes = {}
    for name in _names(network, "classifier"):
        wanted, got = expected.get(f"{name}.weight"), weights.get(f"{name}.weight")
        if getattr(network, "num_classes", None) == 0:
            left_out = [key for key in weights if key.startswith(f"{name}.")]
            for key in left_out:
                del weights[key]
            continue
        if wanted is None or (got is not None and got.shape[0] == wanted.shape[0]):
            continue
        own = {key for key in expected if key.startswith(f"{name}.")}
        given = sorted(key for key in weights if key.startswith(f"{name}."))
        for key in given:
            del weights[key]
        weights |= {key: expected[key].clone() for key in own}
        what = f"{', '.join(given)} ({got.shape[0]} classes) left out, " if got is not None else ""
        notes[name] = f"model.checkpoint: {what}{name} is new, for {wanted.shape[0]} classes"
    return notes


def _check_same(expected: Weights, weights: Weights) -> None:
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    if missing or extra:
        raise ValueError(
            f"lacks {_listed(missing) or 'nothing'} and has {_listed(extra) or 'nothing'} besides"
        )
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"has {name} of shape {list(weights[name].shape)}, not {list(tensor.shape)}"
            )


def _listed(names: list[str]) -> str:
    """Format the first names, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shape_hint(weights: Mapping[str, Tensor]) -> str:
    """Guess the flags for weights of a plain vision transformer from their names and shapes."""
    numbers = [name.split(".")[1] for name in weights if name.startswith("blocks.")]
    depth = 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)
    if not depth or _ANCHOR not in weights:
        return "--model.name and --model.arguments of the network that they are of"
    width = weights[_ANCHOR].shape[0]
    return f"--model.name, or --model.arguments '{{depth: {depth}, embed_dim: {width}}}'"
