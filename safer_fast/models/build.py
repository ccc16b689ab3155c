"""Networks of timm as RobustModel: built, prepared to run, and described in timm's config.json."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Required, TypedDict, Unpack

import timm
import torch
from timm.layers.patch_embed import PatchEmbed, resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from safer_fast.config.messages import shortened
from safer_fast.config.schema import ModelConfig
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.arguments import check_arguments, unknown_network
from safer_fast.models.families import split_into_blocks
from safer_fast.models.initial_weights import Weights, load_source
from safer_fast.models.pixels import check_taken
from safer_fast.models.robust_model import RobustModel, find_layers
from safer_fast.models.same_function import compare_described
from safer_fast.models.towers import embedding_rows
from safer_fast.models.weights_file import load_weights
from safer_fast.models.weights_source import Source, find_source, say_source

# Arguments by which timm would load a file itself, with its own rules for what is safe.
NO_ARGUMENTS = {"pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
Normalisation = tuple[Sequence[float], Sequence[float]]


class Sizes(TypedDict, total=False):
    """Arguments of `build_model` beside the settings."""

    num_classes: Required[int | None]
    image_size: Required[int]
    num_channels: int
    compute_dtype: torch.dtype
    norms: bool
    normalisation: Normalisation | None


def prepare(
    config: ModelConfig,
    device: torch.device,
    *,
    savings: Iterable[str] = (),
    weights: Source | None = None,
    **sizes: Unpack[Sizes],
) -> tuple[RobustModel, list[str]]:
    """Build a model that is ready to run: its weights, exact savings enabled, on the device.

    weights: a file that replaces the weights of `config`, and must be of the same network. sizes:
    as in `build_model`, whose errors these are too. Returns the model and a line for each saving
    that does not apply to it.
    """
    model = build_model(config, **sizes)
    if weights is not None:
        check_described(model.network, config, weights)
        model.notes = load_weights(model.network, weights.weights)
    notes = model.enable_savings(savings, sizes["image_size"])
    model.to(device)
    return model, notes


def freeze(model: RobustModel, savings: Iterable[str]) -> ParameterArenas:
    """Move the parameters of a model into arenas; none requires gradients any more.

    Layers are stored in the model's compute dtype with the saving stored-bf16, else in float32.
    """
    is_stored = "stored-bf16" in savings
    dtype = model.compute_dtype if is_stored else torch.float32
    return ParameterArenas(model.network, model.layers, dtype)


def build_model(
    config: ModelConfig,
    *,
    num_classes: int | None,
    image_size: int,
    num_channels: int = 3,
    compute_dtype: torch.dtype = torch.float32,
    norms: bool = False,
    normalisation: Normalisation | None = None,
) -> RobustModel:
    """Build the timm model that `config` names, in eval mode on the CPU, with its normalisation.

    It takes float images [B, C, H, W] in [0, 1] and returns float32 logits [B, K].

    >>> settings = ModelConfig(name="vit_tiny_patch16_224", patch_size=8, arguments={"depth": 2})
    >>> build_model(settings, num_classes=3, image_size=32)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3])

    num_classes: None builds a tower, which gives embeddings [B, D]; see `embedding_rows`.
    image_size: edge in pixels. num_channels: 1 or 3. compute_dtype: of matrix products. norms:
    layers include the norms right before them. normalisation: mean and std of the pixels; default:
    those of the weights, or of timm. The model's notes say how the weights of `config.checkpoint`
    were changed to fit. Raises ValueError for a name that timm lacks, a network that is no
    transformer, arguments or sizes it does not take, weights that cannot be read or fetched, and
    weights of another model.
    """
    if not isinstance(config, ModelConfig):
        raise ValueError(f"config: expected ModelConfig, got {shortened(repr(config))}")
    if not timm.is_model(config.name):
        raise unknown_network(config.name, timm.list_models())
    if others := NO_ARGUMENTS & config.arguments.keys():
        raise ValueError(
            f"model.arguments: expected arguments of the network, got {min(others)}; weights are "
            "named by --model.checkpoint"
        )
    arguments = dict(config.arguments)
    if config.patch_size is not None:
        arguments["patch_size"] = config.patch_size
    if num_classes is None:
        num_classes = embedding_rows(config, timm.get_pretrained_cfg_value)
    if arguments.get("num_classes") == num_classes:
        del arguments["num_classes"]
    network: Any = _create(config, num_classes, num_channels, image_size, arguments)
    _check_transformer(config.name, network)
    check_patches(network, image_size, may_leave_rows=True)
    if "img_size" not in network.model_args:
        check_taken(config.name, network, num_channels, image_size)
    own, notes = (network.pretrained_cfg["mean"], network.pretrained_cfg["std"]), []
    new_layers = _new_heads(network) if config.pretrained else []
    if config.checkpoint is not None:
        source = find_source(config.checkpoint)
        notes = [say_source(source, own), *check_described(network, config, source)]
        fitted = load_source(network, source, partial(_resample, network), _adapt_channels)
        notes += fitted.notes
        new_layers = fitted.new_layers
        own = source.normalisation or own
    mean, std = (_for_channels(values, num_channels) for values in normalisation or own)
    model = RobustModel(split_into_blocks(network), mean, std, compute_dtype, norms).eval()
    model.notes, model.new_layers, model.image_size = notes, new_layers, image_size
    return model


def _new_heads(network: Any) -> list[str]:
    """Classifiers missing in timm's own weights, which are for another number of classes."""
    if network.num_classes in (0, network.pretrained_cfg.get("num_classes")):
        return []
    names = network.pretrained_cfg.get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def check_described(network: Any, config: ModelConfig, source: Source) -> list[str]:
    """Compare a network with the description of its weights; return a line for each difference.

    network: as built from `config`. Raises ValueError, one line, if it computes another function
    than the one that the weights were trained in.
    """

    def build_described() -> nn.Module | None:
        if not timm.is_model(source.name or "") or NO_ARGUMENTS & source.arguments.keys():
            return None
        sizes = ("num_classes", "in_chans", "img_size")
        arguments = {key: network.model_args[key] for key in sizes if key in network.model_args}
        if patch_size := config.patch_size or source.patch_size:
            arguments["patch_size"] = patch_size
        try:
            return _outline(source.name or "", **arguments | source.arguments)
        except (TypeError, AssertionError, ValueError, ArithmeticError, LookupError, RuntimeError):
            return None

    return compare_described(network, config, source, build_described, _classifiers(network))


def timm_config(
    model: RobustModel, image_size: int, short_side: int, class_names: list[str]
) -> dict[str, Any]:
    """Content of config.json in timm's Hub format, from which timm builds the model again.

    short_side: pixels that the short side of an image is resized to before the centre crop. Origin,
    license, papers, tag and preprocessing of timm's own weights of the architecture are left out.
    """
    network: Any = model.network
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    known = network.pretrained_cfg
    pool = getattr(network, "global_pool", None)
    return {
        "architecture": known["architecture"],
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        **({"global_pool": pool} if isinstance(pool, str) and pool else {}),
        "label_names": class_names,
        "model_args": network.model_args,
        "pretrained_cfg": {
            "input_size": [len(mean), image_size, image_size],
            "fixed_input_size": bool(known.get("fixed_input_size")),
            "interpolation": "bilinear",
            "crop_pct": _crop_share(image_size, short_side),
            "crop_mode": "center",
            "mean": mean,
            "std": std,
            "num_classes": network.num_classes,
            # layers that timm adapts to other numbers of channels and classes
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }


def _crop_share(image_size: int, short_side: int) -> float:
    """Return the crop_pct from which timm, which divides and rounds down, gets this short side."""
    shares = (image_size / pixels for pixels in (short_side, short_side + 0.5))
    return next(share for share in shares if math.floor(image_size / share) == short_side)


def check_patches(network: Any, image_size: int, may_leave_rows: bool = False) -> None:
    """Raise ValueError unless patches cover the images, or with `may_leave_rows` fit into them."""
    embedding = getattr(network, "patch_embed", None)
    if not isinstance(embedding, PatchEmbed) or embedding.dynamic_img_pad:
        return
    edge = max(embedding.patch_size)
    left = [image_size % size for size in embedding.patch_size]
    if edge > image_size or (any(left) and not may_leave_rows):
        fitting = [size for size in range(1, image_size + 1) if image_size % size == 0]
        sizes = {max(image_size // edge, 1) * edge, (image_size // edge + 1) * edge}
        raise ValueError(
            f"--model.patch_size: expected a divisor of {image_size}, the pixels of an edge, got "
            f"{edge}, which leaves {max(left)} rows unread; give one of "
            f"{', '.join(map(str, fitting))}, or "
            f"--data.image_size {' or '.join(map(str, sorted(sizes)))}"
        )


def _create(
    config: ModelConfig,
    num_classes: int,
    num_channels: int,
    image_size: int,
    arguments: dict[str, Any],
) -> nn.Module:
    # offline, a user would see nothing but the hub's warnings about retries
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    def create(**sizes: Any) -> nn.Module:
        given = {"num_classes": num_classes, "in_chans": num_channels, **sizes}
        is_pretrained = config.pretrained and config.checkpoint is None
        # two dictionaries, so that an argument given twice is refused
        network: nn.Module = timm.create_model(
            config.name, pretrained=is_pretrained, **given, **arguments
        )
        network.model_args = given | arguments  # type: ignore[assignment]
        return network

    # some architectures take images of any size, or no rate for dropping paths
    optional = {"img_size": image_size, "drop_path_rate": config.drop_path_rate}
    if config.drop_path_rate or "drop_path_rate" in arguments:
        arguments = {"drop_path_rate": optional.pop("drop_path_rate"), **arguments}
    try:
        while True:
            try:
                return create(**optional)
            except TypeError as error:
                if not (unknown := [name for name in optional if f"'{name}'" in str(error)]):
                    raise
                del optional[unknown[0]]
    except (TypeError, AssertionError, ValueError, ZeroDivisionError, LookupError) as error:
        _check_transformer(config.name, _outline(config.name))
        check_arguments(config, timm.model_entrypoint(config.name).__module__, str(error))
        raise ValueError(
            f"model: {config.name} takes no {num_channels}x{image_size}x{image_size} images with "
            f"patch_size {config.patch_size} and arguments {config.arguments}: {error}"
        ) from error
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise ValueError(
                f"model: {config.name} cannot be built with arguments {config.arguments} for "
                f"{image_size}x{image_size} images: {error}"
            ) from error
        raise ValueError(
            f"model.pretrained: weights of {config.name} could not be fetched from timm's hub; go "
            f"online once or give --model.checkpoint FILE ({type(error).__name__})"
        ) from error


def _for_channels(values: Sequence[float], num_channels: int) -> list[float]:
    if len(values) == num_channels:
        return list(values)
    return [sum(values) / len(values)] * num_channels


def _check_transformer(name: str, network: nn.Module) -> None:
    if not any(isinstance(layer, nn.Linear) for layer in _hidden_layers(network)):
        raise ValueError(
            f"model.name: expected a vision transformer with attention and MLP layers, "
            f"got {name}, which has none"
        )


def _resample(network: Any, weights: Weights) -> Weights:
    """Rename weights to timm's current names, and resize patch and position embeddings."""
    own = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if own is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about copies inside timm
            filtered: Weights = own(weights, network)
        return filtered
    weights = dict(weights)
    kernel, positions = weights["patch_embed.proj.weight"], weights.get("pos_embed")
    size = list(network.patch_embed.proj.weight.shape[-2:])
    if list(kernel.shape[-2:]) != size:
        weights["patch_embed.proj.weight"] = resample_patch_embed(kernel, size)
    if positions is not None and positions.shape != network.pos_embed.shape:
        grid = list(network.patch_embed.grid_size)
        weights["pos_embed"] = resample_abs_pos_embed(
            positions, grid, num_prefix_tokens=network.pos_embed.shape[1] - grid[0] * grid[1]
        )
    return weights


def _adapt_channels(kernel: Tensor, num_channels: int) -> Tensor:
    """Adapt the kernel of a first convolution to a number of channels, if timm can."""
    if kernel.shape[1] == 1:
        return kernel.repeat(1, num_channels, 1, 1) / num_channels
    try:
        return adapt_input_conv(num_channels, kernel)
    except NotImplementedError:
        return kernel  # the caller refuses its shape


def _outline(name: str, **arguments: Any) -> nn.Module:
    """Build a network on the meta device, or on the CPU where timm cannot."""
    try:
        with torch.device("meta"):
            network: nn.Module = timm.create_model(name, **arguments)
    except RuntimeError:
        # up to 1.0.20 timm reads values of tensors while it builds
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(name, **arguments)
    return network


def _classifiers(network: Any) -> set[str]:
    names = network.pretrained_cfg.get("classifier", ())
    return {names} if isinstance(names, str) else set(names)


def _hidden_layers(network: Any) -> list[nn.Module]:
    heads = _classifiers(network)
    return [network.get_submodule(name) for name in find_layers(network) if name not in heads]
