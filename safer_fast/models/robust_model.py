"""RobustModel: pixels in, logits out, with blocks that run separately as prefix and suffix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from safer_fast.config.attack_names import ThreatModel
from safer_fast.models.exact_savings import (
    TokenBlock,
    normalisation_in_patches,
    takes_patches,
    to_patches,
)
from safer_fast.models.families import STEM, Uncut
from safer_fast.models.pixels import check_images, check_size, check_values
from safer_fast.models.text_head import TextHead
from safer_fast.runtime.device import allow_recompiling

BATCHES_CHECKED = 3
"""Batches on a GPU that are looked at: each waits for the device."""


class RobustModel(nn.Module):
    """A timm classifier of pixels in [0, 1], with its layers by name and its blocks run separately.

    `forward(images)` takes float images [B, C, H, W] in [0, 1], normalises them, and returns
    float32 logits [B, K]; a tower returns embeddings [B, D], or zero-shot logits with `text`.
    `prefix(images, cut)` followed by `suffix(features, cut)` is the same function bit for bit;
    `cut` is the index of the first block of the suffix, STEM for a suffix that is the whole
    network. Names of layers and parameters are timm's (relative to `network`).
    """

    mean: Tensor
    std: Tensor
    mean_in_patches: Tensor
    std_in_patches: Tensor

    def __init__(
        self,
        parts: Uncut,
        mean: Sequence[float],
        std: Sequence[float],
        compute_dtype: torch.dtype = torch.float32,
        norms: bool = False,
    ) -> None:
        super().__init__()
        self.network = parts.network
        self.compute_dtype = compute_dtype
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self._blocks = parts
        self.patch_size: int | None = None
        """Edge of a patch in pixels if `arrange` puts pixels in patch order, else None."""
        self.feature_dtype: torch.dtype | None = None
        """Dtype of the features that enter the first block; None: as the stem returns them."""
        self.notes: list[str] = []
        """Lines on how the weights it was built with were changed to fit."""
        self.class_names: list[str] = []
        """Names of the classes in the order of the logits, of a model that `load_model` returns."""
        self.image_size: int | None = None
        """Edge in pixels of the images that it was built for or, of such a model, trained on."""
        self.threat_model: ThreatModel | None = None
        """The ball that it was trained against, of such a model."""
        self.unchecked_batches: int | None = None
        """Batches on a GPU whose pixels `forward` will look at, of such a model; None: it looks at
        none, nor on a CPU."""
        self.new_layers: list[str] = []
        """Layers missing in the weights it was built with, such as a head for other classes."""
        self.layers = find_layers(self.network, norms)
        """Names of the parameters of each layer, by name, in order of definition."""
        self.text: TextHead | None = None
        """Zero-shot classifier of the network's embeddings; None: its outputs are given as is."""

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.mean, is_arranged=self.patch_size is not None)
        if self.unchecked_batches is not None:
            self._check_pixels(images)
        if self.image_size is None:
            return self.suffix(self.prefix(images, 0), 0)
        try:
            return self.suffix(self.prefix(images, 0), 0)
        except (AssertionError, RuntimeError, ValueError) as error:
            check_size(images, self.image_size, error)
            raise

    def check_pixels(self) -> None:
        """Let `forward` raise ValueError for values far outside [0, 1], as in images of 0..255.

        On a CPU it looks at every batch, on a GPU at the first ones.
        """
        self.unchecked_batches = BATCHES_CHECKED

    def _check_pixels(self, images: Tensor) -> None:
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore
        if is_traced or not images.numel():
            return
        if images.device.type != "cpu":
            is_captured = images.is_cuda and torch.cuda.is_current_stream_capturing()
            if not self.unchecked_batches or is_captured:
                return
            self.unchecked_batches -= 1
        check_values(images)

    def enable_savings(self, names: Iterable[str], image_size: int) -> list[str]:
        """Enable `patch-order` and `class-token` (see exact_savings.py), before `.to(device)`.

        Returns a line for each of them that does not apply to this network.
        """
        notes = []
        if "patch-order" in names:
            embedding = getattr(self.network, "patch_embed", None)
            if self.num_blocks and takes_patches(embedding, image_size):
                self._use_patch_order(embedding.proj.kernel_size[0])  # type: ignore[union-attr]
            else:
                notes.append("patch-order: off (the patch embedding is no plain matrix product)")
        if "class-token" in names:
            num_tokens = self._blocks.num_tokens_read
            if self.num_blocks and num_tokens:
                block = TokenBlock(self._blocks.blocks[-1], num_tokens).eval()
                self._blocks.blocks = [*self._blocks.blocks[:-1], block]
            else:
                notes.append("class-token last block: off (the head reads more than class tokens)")
        return notes

    def take_sizes(self, sizes: Sequence[int]) -> None:
        """Take images of these smaller edges too, once on the device; see `Uncut.take_sizes`."""
        self._blocks.take_sizes(sizes)

    def arrange(self, images: Tensor) -> Tensor:
        """Arrange images as a step keeps them: as patches [B, N, C p p], or unchanged."""
        return images if self.patch_size is None else to_patches(images, self.patch_size)

    def prefix(self, images: Tensor, cut: int) -> Tensor:
        """Compute features [B, N, D] that enter block `cut`; for STEM the normalised images.

        images: [B, C, H, W], or as `arrange` returns them.
        """
        with self._autocast():
            if cut == STEM:
                return self._normalised(images)
            x = self._features(images)
            for index in range(cut):
                assert not self._blocks.blocks[index].training, "the prefix must not be random"
                x = self._blocks.block(index, x)
            return x

    def suffix(self, features: Tensor, cut: int) -> Tensor:
        """Compute logits [B, K] from the features that enter block `cut`."""
        with self._autocast():
            for index in range(cut, self.num_blocks):
                features = self.block(features, index)
            outputs = self._blocks.tail(features).float()
        return outputs if self.text is None else self.text(outputs)

    def with_text(self, text: TextHead) -> RobustModel:
        """Return a model that shares everything with this one, and gives zero-shot logits."""
        other = copy(self)
        other._modules = dict(self._modules)
        other.text = text
        return other

    @property
    def width(self) -> int:
        """Number of outputs of the network: classes, or numbers of an embedding."""
        network: Any = self.network
        return int(network.num_classes or network.num_features)

    def block(self, features: Tensor, index: int) -> Tensor:
        """Compute the features that leave block `index`; STEM: everything below the first block."""
        with self._autocast():
            if index == STEM:
                return self._stem(features)
            return self._blocks.block(index, features)

    @property
    def num_blocks(self) -> int:
        """Number of blocks; 0 if the network is not divided."""
        return len(self._blocks.blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, from the image to the head; the whole network if it is not divided."""
        return list(self._blocks.blocks) or [self.network]

    @property
    def inner_layers(self) -> list[str]:
        """Names of the layers in blocks; of a network without blocks, of all but first and last."""
        if self.num_blocks:
            return [name for name in self.layers if 0 <= self.block_of(name) < self.num_blocks]
        known: Mapping[str, Any] = getattr(self.network, "pretrained_cfg", None) or {}
        ends = [known.get(kind) or () for kind in ("first_conv", "classifier")]
        outer = {name for end in ends for name in ([end] if isinstance(end, str) else end)}
        return [name for name in self.layers if name not in outer]

    def block_of(self, name: str) -> int:
        """Return the block of a layer or parameter: STEM below, `num_blocks` for norm and head."""
        return self._blocks.block_of(name)

    def names_of(self, parameters: Iterable[nn.Parameter]) -> list[str]:
        """Return the names of parameters of the network, in order of definition."""
        chosen = {id(parameter) for parameter in parameters}
        members = self.network.named_parameters()
        return [name for name, parameter in members if id(parameter) in chosen]

    def cut_of(self, names: Iterable[str]) -> int:
        """Return the deepest cut with none of the named layers or parameters below it."""
        return min(self.block_of(name) for name in names)

    def random_modules(self, names: Iterable[str]) -> list[nn.Module]:
        """Return the modules to put into training mode while the named parameters are trained.

        All modules from the cut upwards, if any of them computes something else in training; batch
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

    @contextmanager
    def without_savings(self) -> Iterator[None]:
        """Run the network's own modules within the context, so that hooks on layers are called."""
        blocks = self._blocks.blocks
        self._blocks.blocks = [b.inner if isinstance(b, TokenBlock) else b for b in blocks]
        try:
            yield
        finally:
            self._blocks.blocks = blocks

    def _normalised(self, images: Tensor) -> Tensor:
        if images.ndim == 3:
            return (images - self.mean_in_patches) / self.std_in_patches
        return (images - self.mean) / self.std

    def _features(self, images: Tensor) -> Tensor:
        """Features that enter the first block."""
        x = self._normalised(images)
        return RobustModel._stem(self, x)  # as written: it is compiled as a part of this

    def _stem(self, x: Tensor) -> Tensor:
        features = self._blocks.stem(x)
        return features if self.feature_dtype is None else features.to(self.feature_dtype)

    def _use_patch_order(self, patch_size: int) -> None:
        self.patch_size = patch_size
        for name in ("mean", "std"):
            values = normalisation_in_patches(getattr(self, name), patch_size)
            self.register_buffer(f"{name}_in_patches", values, persistent=False)

    def _autocast(self) -> Any:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.mean.device.type, self.compute_dtype, cache_enabled=False)


def find_layers(network: nn.Module, norms: bool = False) -> dict[str, tuple[str, ...]]:
    """Find the layers of a network, in order; return the names of each layer's parameters.

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


def state_of(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a network, with its parameters replaced by `weights`, by name.

    Buffers that a network computes when it is built, such as masks and rotary frequencies, are no
    part of it.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        name: weights[names[id(value)]] if id(value) in names else value.detach().clone()
        for name, value in network.state_dict(keep_vars=True).items()
    }


@contextmanager
def training_mode(modules: Sequence[nn.Module], keeps_statistics: bool = False) -> Iterator[None]:
    """Put just these modules (not their children) into training mode within the context.

    With `keeps_statistics` batch norms normalise by the batch but do not update their statistics:
    the second pass over a batch must not count it again.
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


def _is_random(module: nn.Module) -> bool:
    """Return true if the module computes something else in training mode than in eval mode."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    rate = getattr(module, "p", None) or getattr(module, "drop_prob", None) or 0.0
    return isinstance(rate, float) and rate > 0


def _is_frozen_batch_norm(name: str, module: nn.Module, trained: set[str]) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" not in trained


def compile_blocks(model: RobustModel) -> None:
    """Compile each block by itself, on its first call; identical blocks share the code.

    So is the stem, with the normalisation of pixels, where its family allows it. Norm and head run
    as written: of a class token they move next to nothing.
    """
    allow_recompiling()
    for block in model.blocks:
        block.compile(dynamic=False)
    if model.num_blocks and model._blocks.compiles_stem:
        for name in ("_features", "_stem"):
            setattr(model, name, torch.compile(getattr(model, name), dynamic=False))
