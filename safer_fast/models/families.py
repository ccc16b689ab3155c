"""How families of transformers run in parts: below the blocks, block by block, above them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safer_fast.models.exact_savings import embed_patches

STEM = -1
"""Index of everything below the first block, where layers are numbered by block."""


class Uncut:
    """A network that cannot be cut: no blocks, all of it is the tail.

    The other families give the same function in parts: `tail(block(n-1, ... block(0, stem(x))))`,
    and say which block a layer or parameter belongs to.
    """

    blocks: Sequence[nn.Module] = ()

    def __init__(self, network: Any, num_tokens_read: int = 0) -> None:
        self.network = network
        self.num_tokens_read = num_tokens_read
        """How many leading tokens are all that the head reads of a plain ViT; 0 elsewhere."""

    def stem(self, x: Tensor) -> Tensor:
        return x

    def embed(self, x: Tensor) -> Tensor:
        """The patch embedding of images [B, C, H, W], or of patches [B, N, C p p]."""
        embedding = self.network.patch_embed
        features: Tensor = embed_patches(embedding, x) if x.ndim == 3 else embedding(x)
        return features

    def block(self, index: int, x: Tensor) -> Tensor:
        raise AssertionError("a network without blocks has no block to run")

    def tail(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def block_of(self, name: str) -> int:
        return STEM


class VitParts(Uncut):
    """ViT, DeiT: patch embedding, tokens and positions; `blocks`; norm and head."""

    def __init__(self, network: Any, num_tokens_read: int = 0) -> None:
        super().__init__(network, num_tokens_read)
        self.blocks = list(network.blocks)

    def stem(self, x: Tensor) -> Tensor:
        network = self.network
        x = network.patch_drop(network._pos_embed(self.embed(x)))
        features: Tensor = network.norm_pre(x)
        return features

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
    """EVA-02 and DINOv3 ViTs: every block also takes the rotary position embedding."""

    def stem(self, x: Tensor) -> Tensor:
        network = self.network
        x, _ = network._pos_embed(self.embed(x))
        features: Tensor = network.norm_pre(x)
        return features

    def block(self, index: int, x: Tensor) -> Tensor:
        rope = self._rope()
        if rope is not None and self.network.rope_mixed:
            rope = rope[index]
        features: Tensor = self.blocks[index](x, rope=rope)
        return features

    def _rope(self) -> Any:
        network = self.network
        if network.rope is None:
            return None
        if hasattr(network.rope, "feat_shape") and not network.dynamic_img_size:
            return network.rope.get_embed()
        return network.rope.get_embed(shape=network.patch_embed.grid_size)


class ConvitParts(VitParts):
    """ConViT: the class token joins after the gated blocks."""

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
        """Positions made from bf16 weights would be bf16, and be multiplied in another order."""
        attention, num_patches = block.attn, x.shape[1]
        known = attention.rel_indices
        if known.shape[1] != num_patches or known.device != x.device:
            positions = attention.get_rel_indices(num_patches)
            attention.rel_indices = positions.to(torch.promote_types(positions.dtype, torch.float))


class SwinParts(Uncut):
    """Swin: the blocks of all stages in one row; downsampling goes with the block after it."""

    def __init__(self, network: Any, num_tokens_read: int = 0) -> None:
        super().__init__(network, num_tokens_read)
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
