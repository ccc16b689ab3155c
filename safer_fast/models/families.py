"""Families of transformers, each divided into a stem, blocks and a tail that run separately."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import isqrt
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from safer_fast.models.exact_savings import embed_patches, takes_patches

STEM = -1
"""Index that stands for everything below the first block, where layers are numbered by block."""


def split_into_blocks(network: Any) -> Uncut:
    """Divide a timm network by the row of FAMILIES for its class, or the nearest base class.

    A network without a row, or with a forward pass other than that class's, stays undivided.
    """
    for kind in type(network).__mro__:
        parts = FAMILIES.get(_full_name(kind))
        if parts is not None:
            is_known = type(network).forward_features is kind.forward_features  # type: ignore[attr-defined]
            return parts(network) if is_known and parts.suits(network) else Uncut(network)
    return Uncut(network)


class Uncut:
    """A network that is not divided: it has no blocks, and all of it is the tail.

    A family is a subclass that computes the same function in parts,
    `tail(block(n-1, ... block(0, stem(x))))`, and knows the block of each layer and parameter.
    """

    blocks: Sequence[nn.Module] = ()
    num_tokens_read = 0
    """Number of leading tokens that the head reads of a plain ViT; 0 for other networks."""
    compiles_stem = True
    """False for a stem that changes its modules, which torch.compile would break into pieces."""

    def __init__(self, network: Any) -> None:
        self.network = network

    @classmethod
    def suits(cls, network: Any) -> bool:
        """Return true if a network of the family, with its forward pass, can be divided."""
        return True

    def stem(self, x: Tensor) -> Tensor:
        """Features that enter the first block, of normalised images."""
        return x

    def embed(self, x: Tensor) -> Tensor:
        """Patch embedding of images [B, C, H, W], or of patches [B, N, C p p]."""
        embedding = self.network.patch_embed
        features: Tensor = embed_patches(embedding, x) if x.ndim == 3 else embedding(x)
        return features

    def block(self, index: int, x: Tensor) -> Tensor:
        """Features that leave block `index`, from those that enter it."""
        raise AssertionError("a network without blocks has no block to run")

    def tail(self, x: Tensor) -> Tensor:
        """Logits [B, K], from the features that leave the last block."""
        logits: Tensor = self.network(x)
        return logits

    def block_of(self, name: str) -> int:
        """Block of a layer or parameter; STEM below the blocks, their number above them."""
        return STEM

    def take_sizes(self, sizes: Sequence[int]) -> None:
        """Take images of these smaller edges too; ValueError where the network cannot."""
        if sizes:
            self._refuse_sizes("is built for one size")

    def _refuse_sizes(self, reason: str) -> NoReturn:
        raise ValueError(
            "--data.resolution_schedule: expected a ViT, DeiT or EVA, whose positions can be "
            f"resampled, got {type(self.network).__name__}, which {reason}"
        )


class VitParts(Uncut):
    """ViT and DeiT: patch embedding, tokens and positions; `blocks`; norm and head."""

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.blocks = list(network.blocks)
        self.num_tokens_read = _num_tokens_read(network)
        self.resampling: dict[int, Tensor] = {}
        """Matrices [n, N] from the positions of all N patches to those of n, by n."""

    def stem(self, x: Tensor) -> Tensor:
        network = self.network
        x = network.patch_drop(self.with_positions(x))
        features: Tensor = network.norm_pre(x)
        return features

    def with_positions(self, x: Tensor, **replaced: Any) -> Any:
        """Return what timm's `_pos_embed` makes of the patches of images of any size taken.

        replaced: values that stand in for attributes of the network meanwhile.
        """
        network = self.network
        matrix = self.resampling.get(self._num_patches(x)) if self.resampling else None
        if matrix is None:
            x = self.embed(x)
        else:
            replaced |= {"pos_embed": self._resampled(matrix), "dynamic_img_size": False}
            x = self._embed_smaller(x)
        if not replaced:
            return network._pos_embed(x)
        return type(network)._pos_embed(_InPlaceOf(network, replaced), x)

    def take_sizes(self, sizes: Sequence[int]) -> None:
        embedding = self.network.patch_embed
        for size in sizes:
            if not takes_patches(embedding, size):
                patches = f"patches of {getattr(embedding, 'patch_size', ['?'])[0]} pixels"
                words = f"sizes that the network's {patches} divide, got {size}"
                raise ValueError(f"--data.resolution_schedule: expected {words}")
            edge = size // embedding.patch_size[0]
            matrix = resampling_matrix(embedding.grid_size, edge)
            self.resampling[edge * edge] = matrix.to(embedding.proj.weight.device)

    def _num_patches(self, x: Tensor) -> int:
        if x.ndim == 3:
            return x.shape[1]
        edge = self.network.patch_embed.patch_size[0]
        return int((x.shape[2] // edge) * (x.shape[3] // edge))

    def _embed_smaller(self, x: Tensor) -> Tensor:
        """Patch embedding of images that timm's would refuse for their size."""
        embedding = self.network.patch_embed
        if x.ndim == 3:
            return embed_patches(embedding, x, is_flat=True)
        features: Tensor = embedding.norm(embedding.proj(x).flatten(2).transpose(1, 2))
        return features

    def _resampled(self, matrix: Tensor) -> Tensor | None:
        """Position embeddings [1, p + n, D] of p tokens, which stay, and of n patches."""
        network = self.network
        if network.pos_embed is None:
            return None
        num_tokens = 0 if network.no_embed_class else network.num_prefix_tokens
        with torch.autocast(matrix.device.type, enabled=False):
            tokens, patches = network.pos_embed.split((num_tokens, matrix.shape[1]), dim=1)
            return torch.cat((tokens, matrix @ patches), dim=1)

    def block(self, index: int, x: Tensor) -> Tensor:
        features: Tensor = self.blocks[index](x)
        return features

    def tail(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network.forward_head(self.network.norm(x))
        return logits

    def block_of(self, name: str) -> int:
        first, _, rest = name.partition(".")
        if first == "blocks" and rest:
            return int(rest.partition(".")[0])
        is_tail = first in ("norm", "fc_norm", "attn_pool", "head", "head_dist", "head_drop")
        return len(self.blocks) if is_tail else STEM


class EvaParts(VitParts):
    """EVA-02 and DINOv3 ViTs, whose blocks also take the rotary position embedding."""

    compiles_stem = False

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self._ropes: dict[tuple[object, ...], Tensor] = {}
        self._smaller_ropes: dict[int, Any] = {}

    @classmethod
    def suits(cls, network: Any) -> bool:
        """Return true unless patches are dropped, and with them rotary positions."""
        return network.patch_drop is None

    def stem(self, x: Tensor) -> Tensor:
        # what timm would compute of the rope here, `block` computes
        x, _ = self.with_positions(x, rope=None)
        features: Tensor = self.network.norm_pre(x)
        return features

    def block(self, index: int, x: Tensor) -> Tensor:
        rope = self._rope(x.shape[1] - self.network.num_prefix_tokens)
        if rope is not None and self.network.rope_mixed:
            rope = rope[index]
        features: Tensor = self.blocks[index](x, rope=rope)
        return features

    def take_sizes(self, sizes: Sequence[int]) -> None:
        rope = self.network.rope
        is_random = getattr(rope, "aug_active", False)
        if sizes and rope is not None and (is_random or next(rope.parameters(), None) is not None):
            self._refuse_sizes("has rotary positions that are learned or random")
        super().take_sizes(sizes)
        for num_patches in self.resampling if rope is not None else ():
            smaller = deepcopy(rope)
            if hasattr(smaller, "update_feat_shape"):
                smaller.update_feat_shape([isqrt(num_patches)] * 2)
            self._smaller_ropes[num_patches] = smaller

    def _rope(self, num_patches: int) -> Any:
        network = self.network
        rope = self._smaller_ropes.get(num_patches, network.rope)
        if rope is None:
            return None
        if hasattr(rope, "feat_shape") and not network.dynamic_img_size:
            return rope.get_embed()
        is_smaller = num_patches in self._smaller_ropes
        grid = (isqrt(num_patches),) * 2 if is_smaller else tuple(network.patch_embed.grid_size)
        is_random = rope.training and getattr(rope, "aug_active", False)
        is_learned = next(rope.parameters(), None) is not None
        if is_random or is_learned or torch.compiler.is_compiling():
            return rope.get_embed(shape=grid)
        buffer = next(rope.buffers())
        key = (grid, buffer.device, buffer.dtype)
        if key not in self._ropes:
            # timm computes it from positions on the CPU, and a copy to the GPU cannot be recorded
            with torch.inference_mode(False):
                self._ropes[key] = rope.get_embed(shape=grid)
        return self._ropes[key]


class ConvitParts(VitParts):
    """ConViT, whose class token joins after the gated blocks."""

    compiles_stem = False

    def take_sizes(self, sizes: Sequence[int]) -> None:
        Uncut.take_sizes(self, sizes)

    def stem(self, x: Tensor) -> Tensor:
        network = self.network
        x = self.embed(x)
        for block in self.blocks[: network.local_up_to_layer]:
            self._keep_positions_fp32(block, x)
        if network.use_pos_embed:
            x = x + network.pos_embed
        features: Tensor = network.pos_drop(x)
        return features

    def block(self, index: int, x: Tensor) -> Tensor:
        if index == self.network.local_up_to_layer and self.network.cls_token is not None:
            x = torch.cat((self.network.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return super().block(index, x)

    def _keep_positions_fp32(self, block: Any, x: Tensor) -> None:
        """Set relative positions in fp32; those derived from bf16 weights would be bf16."""
        attention, num_patches = block.attn, x.shape[1]
        known = attention.rel_indices
        if known.shape[1] != num_patches or known.device != x.device:
            positions = attention.get_rel_indices(num_patches)
            attention.rel_indices = positions.to(torch.promote_types(positions.dtype, torch.float))


class SwinParts(Uncut):
    """Swin: the blocks of all stages in sequence; downsampling is part of the block after it."""

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.places = [
            (stage, index)
            for stage, layer in enumerate(network.layers)
            for index in range(len(layer.blocks))
        ]
        self.blocks = [network.layers[stage].blocks[index] for stage, index in self.places]

    def stem(self, x: Tensor) -> Tensor:
        return self.embed(x)

    def block(self, index: int, x: Tensor) -> Tensor:
        stage, place = self.places[index]
        if place == 0:
            x = self.network.layers[stage].downsample(x)
        features: Tensor = self.blocks[index](x)
        return features

    def tail(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network.forward_head(self.network.norm(x))
        return logits

    def block_of(self, name: str) -> int:
        words = name.split(".")
        if words[0] == "layers" and len(words) > 2:
            place = int(words[3]) if words[2] == "blocks" and len(words) > 3 else 0
            return self.places.index((int(words[1]), place))
        return len(self.blocks) if words[0] in ("norm", "head") else STEM


_VIT = "timm.models.vision_transformer.VisionTransformer"
_DISTILLED = "timm.models.deit.VisionTransformerDistilled"
FAMILIES: dict[str, type[Uncut]] = {
    _VIT: VitParts,
    "timm.models.eva.Eva": EvaParts,
    "timm.models.convit.ConVit": ConvitParts,
    "timm.models.swin_transformer.SwinTransformer": SwinParts,
}
"""Families by the full name of the class of their networks, which may have subclasses."""


class _InPlaceOf:
    """A network with other values of some attributes."""

    def __init__(self, network: Any, replaced: dict[str, Any]) -> None:
        self._network, self._replaced = network, replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        return getattr(self._network, name)


def resampling_matrix(grid: Sequence[int], edge: int) -> Tensor:
    """Compute the matrix [edge edge, N] that resamples N values on a grid as timm resamples them.

    It is bicubic and antialiased. As a matrix product its gradient has the same bits each time.
    """
    count = grid[0] * grid[1]
    basis = torch.eye(count).view(1, count, *grid)
    smaller = functional.interpolate(basis, size=(edge, edge), mode="bicubic", antialias=True)
    return smaller.view(count, edge * edge).t().contiguous()


def _num_tokens_read(network: Any) -> int:
    """Number of leading tokens that the head of a plain ViT reads; 0 if it reads others."""
    name, block = _full_name(type(network)), network.blocks[-1]
    is_plain = _full_name(type(block)) == "timm.models.vision_transformer.Block"
    if name not in (_VIT, _DISTILLED) or not is_plain:
        return 0
    if type(block.attn).__name__ != "Attention" or getattr(block.attn, "gate", None) is not None:
        return 0
    if name == _DISTILLED:
        return 2
    return int(network.global_pool == "token" and network.attn_pool is None)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
