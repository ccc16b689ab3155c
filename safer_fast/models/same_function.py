"""Comparison of two networks beyond their weights: heads, activations, epsilons."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from safer_fast.config.schema import ModelConfig
from safer_fast.models.weights_source import Source, as_flags

# Attributes that may differ between networks of the same function in evaluation, or are adapted:
# sizes of images, patches and windows, channels and classes, dropout, initial values, kernels.
_ADAPTED = {
    *("training", "img_size", "patch_size", "grid_size", "num_patches", "kernel_size", "stride"),
    *("window_size", "window_area", "shift_size", "target_shift_size", "input_resolution"),
    *("feat_shape", "in_chans", "in_channels", "num_classes", "init_values", "weight_init_mode"),
    *("p", "drop_prob", "drop_rate", "drop_path_rate", "inplace", "fused_attn", "strict_img_size"),
    *("dynamic_img_size", "dynamic_img_pad", "grad_checkpointing", "output_fmt", "reduction"),
    *("scale_by_keep", "always_partition", "distilled_training"),
}
_POOLING = "arguments.global_pool"
_PLAIN = (int, float, bool, str, type(None))


def compare_described(
    network: nn.Module,
    config: ModelConfig,
    source: Source,
    build_described: Callable[[], nn.Module | None],
    classifiers: Collection[str],
) -> list[str]:
    """Compare a network with the one its weights were trained in; return a line per difference.

    network: as built from `config`. build_described: builds the network that the weights were
    trained in, for the same images; None if that fails. Raises ValueError, one line, if the two
    compute different functions.
    """
    described = source.settings
    changes = _changes(config, described) if described else {}
    if described and not changes.keys() - {"patch_size"}:
        return list(changes.values())
    other = build_described() if described else None
    if other is None:
        return [
            f"model.checkpoint: no config.json beside {source.weights} names a network of timm: "
            "names and shapes were compared, heads, activations and the like were not"
        ]
    difference = first_difference(other, network, classifiers)
    if difference is not None:
        raise ValueError(
            f"model.checkpoint: expected the weights of this network, got those of another: "
            f"{difference} as for {source.weights}; give {as_flags(described)}"
        )
    # timm writes the pooling of a network down even where it is the network's own
    is_silent = "global_pool" not in config.arguments
    return [line for key, line in changes.items() if not (is_silent and key == _POOLING)]


def first_difference(
    network: nn.Module, other: nn.Module, left_out: Collection[str] = ()
) -> str | None:
    """Describe the first part of `other` that computes something else than in `network`, or None.

    left_out: names of parts that are not compared. Weights are not read, so both networks may be on
    the meta device.
    """
    mine, others = (_attributes(module, left_out) for module in (network, other))
    for name in dict.fromkeys([*mine, *others]):
        place = name or "the network"
        if name not in others:
            return f"{place} is missing"
        if name not in mine:
            return f"{place} is there"
        (kind, attributes), (other_kind, other_attributes) = mine[name], others[name]
        if kind != other_kind:
            return f"{place} is {other_kind}, not {kind}"
        different = [
            f"{key} of {place} is {other_attributes[key]!r}, not {attributes[key]!r}"
            for key in sorted(attributes.keys() & other_attributes.keys())
            if attributes[key] != other_attributes[key]
        ]
        if different:
            return " and ".join(different[:2])
    return None


def _changes(config: ModelConfig, described: Mapping[str, Any]) -> dict[str, str]:
    """Lines on settings that differ from those of the weights, by name."""
    asked = {"name": config.name.partition(".")[0], "patch_size": config.patch_size}
    mine = asked | {f"arguments.{key}": value for key, value in config.arguments.items()}
    theirs = {key: described[key] for key in asked}
    theirs |= {f"arguments.{key}": value for key, value in described["arguments"].items()}
    return {
        key: f"model.{key}: {_shown(mine, key)}, where the checkpoint has {_shown(theirs, key)}"
        for key in {**mine, **theirs}
        if _plain(mine.get(key)) != _plain(theirs.get(key))
    }


def _shown(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key)
    return "the model's own" if value is None else f"{value}"


def _plain(value: Any) -> Any:
    """Convert a value to what JSON has."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _attributes(
    network: nn.Module, left_out: Collection[str]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and plain attributes of every module that computes something in evaluation."""
    found = {}
    for name, module in network.named_modules():
        kind = type(module).__name__
        if name in left_out or kind == "Identity" or "Drop" in kind:
            continue
        attributes = {key: value for key, value in vars(module).items() if _is_compared(key, value)}
        found[name] = kind, attributes
    return found


def _is_compared(key: str, value: Any) -> bool:
    if key.startswith("_") or key in _ADAPTED:
        return False
    if isinstance(value, tuple | list):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)
