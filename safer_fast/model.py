"""The network: a timm vision transformer that takes pixels, cut into a prefix and a suffix."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from timm.models.convit import ConVit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from safer_fast.checkpoint import load_weights, read_normalisation
from safer_fast.config import ModelConfig
from safer_fast.cut import STEM, Column, ConvitColumn, RotaryColumn, SwinColumn, Whole


class RobustModel(nn.Module):
    """A classifier of pixels in [0, 1] whose layers are known and whose blocks can be run apart.

    `forward(images)` takes float images [B, C, H, W] in [0, 1], normalises them, and returns
    float32 logits [B, K]. `prefix(images, cut)` followed by `suffix(features, cut)` is the same
    function bit for bit; `cut` is the index of the first block of the suffix, STEM for a suffix
    that is the whole network. Names of layers and parameters are timm's (relative to `network`).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        compute_dtype: torch.dtype = torch.float32,
        norms: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.compute_dtype = compute_dtype
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self._parts = _cut(network)
        self.layers = find_layers(network, norms)
        """Each layer's name and the names of its parameters, in order of definition."""

    def forward(self, images: Tensor) -> Tensor:
        return self.suffix(self.prefix(images, STEM), STEM)

    def prefix(self, images: Tensor, cut: int) -> Tensor:
        """Features [B, N, D] that enter block `cut`; for STEM the normalised images themselves."""
        with self._autocast():
            x = (images - self.mean) / self.std
            if cut == STEM:
                return x
            x = self._parts.stem(x)
            for index in range(cut):
                assert not self._parts.blocks[index].training, "the prefix must not be random"
                x = self._parts.block(index, x)
            return x

    def suffix(self, features: Tensor, cut: int) -> Tensor:
        """Logits [B, K] from the features that enter block `cut`."""
        with self._autocast():
            for index in range(cut, self.num_blocks):
                features = self.block(features, index)
            return self._parts.tail(features).float()

    def block(self, features: Tensor, index: int) -> Tensor:
        """Features that leave block `index`; STEM stands for everything below the first block."""
        with self._autocast():
            if index == STEM:
                return self._parts.stem(features)
            return self._parts.block(index, features)

    @property
    def num_blocks(self) -> int:
        """Blocks at which the network can be cut; 0 where it cannot be."""
        return len(self._parts.blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, from the image to the head; the whole network where it cannot be cut."""
        return list(self._parts.blocks) or [self.network]

    def block_of(self, name: str) -> int:
        """Block of a layer or parameter: STEM below the blocks, `num_blocks` for norm and head."""
        return self._parts.block_of(name)

    def cut_of(self, names: Iterable[str]) -> int:
        """The deepest cut below which none of the named layers or parameters lies."""
        return min(self.block_of(name) for name in names)

    def random_modules(self, names: Iterable[str]) -> list[nn.Module]:
        """Modules to put into training mode while the named parameters are trained.

        Everything from the cut upwards, if anything there behaves differently in training; batch
        norms only if their own weights are among `names`: frozen ones keep their statistics.
        """
        names = set(names)
        cut = self.cut_of(names)
        above = [
            (name, module)
            for name, module in self.network.named_modules()
            if self.block_of(name) >= cut and not _is_frozen_batch_norm(name, module, names)
        ]
        if not any(_is_random(module) for _, module in above):
            return []
        return [module for _, module in above]

    def _autocast(self) -> Any:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.mean.device.type, self.compute_dtype, cache_enabled=False)


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    image_size: int,
    num_channels: int = 3,
    compute_dtype: torch.dtype = torch.float32,
    norms: bool = False,
) -> RobustModel:
    """The timm model that `config` names, in eval mode on the CPU, with normalisation inside.

    Raises ValueError for a name timm does not know, a network that is no transformer, arguments or
    sizes it does not take, weights that cannot be had, and weights of another model.
    """
    _check_name(config.name)
    arguments = {"drop_path_rate": config.drop_path_rate, **config.arguments}
    if config.patch_size is not None:
        arguments["patch_size"] = config.patch_size
    network: Any = _create(config, num_classes, num_channels, image_size, arguments)
    _check_transformer(config.name, network)
    network.model_args = {"img_size": image_size, **arguments}
    normalisation = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    if config.checkpoint is not None:
        load_weights(network, config.checkpoint)
        normalisation = read_normalisation(config.checkpoint) or normalisation
    mean, std = (_for_channels(values, num_channels) for values in normalisation)
    return RobustModel(network, mean, std, compute_dtype, norms).eval()


def find_layers(network: nn.Module, norms: bool = False) -> dict[str, tuple[str, ...]]:
    """Layers of a network by name, each with the names of its parameters, in order of definition.

    A layer is a module that owns a weight matrix (linear or 2-d convolution). With `norms`, the
    norms defined between a layer and the one before it belong to it.
    """
    layers: dict[str, tuple[str, ...]] = {}
    waiting: list[str] = []
    for name, module in network.named_modules():
        own = [
            f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)
        ]
        if isinstance(module, nn.Linear | nn.Conv2d):
            layers[name] = (*own, *waiting)
            waiting = []
        elif norms and "Norm" in type(module).__name__:
            waiting += own
    return layers


def save_timm_config(model: RobustModel, path: Path, image_size: int) -> None:
    """`path` describes the model in timm's Hub format, with its arguments, size, mean and std."""
    network: Any = model.network
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    save_config_for_hf(
        network,
        str(path),
        model_config={
            "model_args": network.model_args,
            "pretrained_cfg": {
                "input_size": (len(mean), image_size, image_size),
                "mean": mean,
                "std": std,
                "num_classes": network.num_classes,
            },
        },
    )


@contextmanager
def training_mode(modules: Sequence[nn.Module], keeps_statistics: bool = False) -> Iterator[None]:
    """Puts just these modules (not their children) into training mode for a while.

    With `keeps_statistics` batch norms normalise by the batch but do not learn from it: the second
    pass over a batch must not count it again.
    """
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = norms if keeps_statistics else []
    momenta = [norm.momentum for norm in norms]
    for module in modules:
        module.training = True
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for module in modules:
            module.training = False
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _cut(network: nn.Module) -> Whole:
    """The parts of the network; one part where timm's own forward pass is not the known one."""
    families: list[tuple[Any, type[Whole]]] = [
        (VisionTransformer, Column),
        (Eva, RotaryColumn),
        (ConVit, ConvitColumn),
        (SwinTransformer, SwinColumn),
    ]
    for family, parts in families:
        if (
            isinstance(network, family)
            and type(network).forward_features is family.forward_features
        ):
            has_random_tokens = getattr(network, "patch_drop", None) is not None and isinstance(
                network, Eva
            )
            return Whole(network) if has_random_tokens else parts(network)
    return Whole(network)


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name[:8]}*")[:3]
        hint = f" (there are {', '.join(close)})" if close else ""
        raise ValueError(f"model.name: expected a model of timm, got {name!r}{hint}")


def _create(
    config: ModelConfig,
    num_classes: int,
    num_channels: int,
    image_size: int,
    arguments: dict[str, Any],
) -> nn.Module:
    # offline, the hub's own retries would be all that a user sees
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    def create(**sizes: Any) -> nn.Module:
        network: nn.Module = timm.create_model(
            config.name,
            pretrained=config.pretrained,
            num_classes=num_classes,
            in_chans=num_channels,
            **sizes,
            **arguments,
        )
        return network

    try:
        try:
            return create(img_size=image_size)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            return create()  # an architecture for images of any size
    except (TypeError, AssertionError, ValueError, ZeroDivisionError) as error:
        with torch.device("meta"):
            _check_transformer(config.name, timm.create_model(config.name))
        raise ValueError(
            f"model: {config.name} takes no {num_channels}x{image_size}x{image_size} images with "
            f"patch_size {config.patch_size} and arguments {config.arguments}: {error}"
        ) from error
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
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


def _hidden_layers(network: Any) -> list[nn.Module]:
    classifiers = network.pretrained_cfg.get("classifier", ())
    heads = {classifiers} if isinstance(classifiers, str) else set(classifiers)
    return [network.get_submodule(name) for name in find_layers(network) if name not in heads]


def _is_random(module: nn.Module) -> bool:
    """Whether the module computes something else in training mode than in eval mode."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    rate = getattr(module, "p", None) or getattr(module, "drop_prob", None) or 0.0
    return isinstance(rate, float) and rate > 0


def _is_frozen_batch_norm(name: str, module: nn.Module, trained: set[str]) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" not in trained
