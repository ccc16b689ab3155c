"""Work that a frozen transformer can skip without changing its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class TokenBlock(nn.Module):
    """A pre-norm ViT block that computes its first `num_tokens` output tokens alone.

    Keys and values are computed for all tokens, queries, projection and MLP for these alone:
    [B, N, D] -> [B, num_tokens, D]. The weights are the block's own.
    """

    def __init__(self, block: Any, num_tokens: int) -> None:
        super().__init__()
        self.inner = block
        self.num_tokens = num_tokens

    def forward(self, x: Tensor) -> Tensor:
        block = self.inner
        attended = self._attend(block.attn, block.norm1(x))
        x = x[:, : self.num_tokens] + block.drop_path1(block.ls1(attended))
        features: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return features

    def _attend(self, attention: Any, x: Tensor) -> Tensor:
        heads, size = attention.num_heads, attention.head_dim
        width, (batch, num_tokens, _) = heads * size, x.shape
        weight, bias = attention.qkv.weight, attention.qkv.bias
        query_bias, other_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        queries = functional.linear(x[:, : self.num_tokens], weight[:width], query_bias)
        others = functional.linear(x, weight[width:], other_bias)
        queries = queries.reshape(batch, self.num_tokens, heads, size).transpose(1, 2)
        others = others.reshape(batch, num_tokens, 2, heads, size).permute(2, 0, 3, 1, 4)
        keys, values = others.unbind(0)
        x = functional.scaled_dot_product_attention(
            attention.q_norm(queries),
            attention.k_norm(keys),
            values,
            dropout_p=attention.attn_drop.p if attention.training else 0.0,
        )
        x = x.transpose(1, 2).reshape(batch, self.num_tokens, width)
        attended: Tensor = attention.proj_drop(attention.proj(attention.norm(x)))
        return attended


def to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Rearrange images [B, C, H, W] as patches [B, N, C p p], row by row, each as C, p, p."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.view(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def from_patches(patches: Tensor, patch_size: int, channels: int, size: int) -> Tensor:
    """Invert `to_patches` for square images: patches [B, N, C p p] to [B, C, size, size]."""
    count = size // patch_size
    x = patches.view(-1, count, count, channels, patch_size, patch_size)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, size, size)


def embed_patches(embedding: Any, patches: Tensor, is_flat: bool = False) -> Tensor:
    """Compute timm's PatchEmbed from the patches [B, N, C p p] of images, as a matrix product.

    is_flat: return [B, N, D], also where the embedding itself returns a grid of its full size.
    """
    projection = embedding.proj
    x = functional.linear(patches, projection.weight.flatten(1), projection.bias)  # [B, N, D]
    if not (is_flat or embedding.flatten):
        rows, columns = embedding.grid_size
        x = x.view(x.shape[0], rows, columns, -1)
    features: Tensor = embedding.norm(x)
    return features


def takes_patches(embedding: Any, image_size: int) -> bool:
    """Return true if a patch embedding is one matrix product for square images of this size."""
    projection = getattr(embedding, "proj", None)
    if not isinstance(projection, nn.Conv2d) or not hasattr(embedding, "grid_size"):
        return False
    kernel = projection.kernel_size
    is_plain = projection.stride == kernel and projection.groups == 1 and kernel[0] == kernel[1]
    is_unpadded = projection.padding == (0, 0) and projection.dilation == (1, 1)
    pads = getattr(embedding, "dynamic_img_pad", False)
    return is_plain and is_unpadded and not pads and image_size % kernel[0] == 0


def normalisation_in_patches(values: Tensor, patch_size: int) -> Tensor:
    """Repeat per-channel values [1, C, 1, 1] for patches, [1, 1, C p p]."""
    return torch.repeat_interleave(values.flatten(), patch_size * patch_size).view(1, 1, -1)
