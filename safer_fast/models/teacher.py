"""Teacher: the frozen original of a network that is trained, for its embeddings of clean images."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from safer_fast.models.robust_model import RobustModel, compile_blocks
from safer_fast.models.weights_file import load_weights, save_weights
from safer_fast.runtime.cuda_graphs import Buffers, Replays
from safer_fast.runtime.micro_batch import MicroBatch


class Teacher:
    """A copy of a model as it is now, which stays as it is.

    Args:
        model: is copied, with its device, dtype and savings; its arrangement of pixels is shared.
        savings: with `stored-bf16` layers are stored in the model's compute dtype.
        micro_batch: how many images are in the network at a time.
        replays: runs it, recorded where it can.
        is_compiled: compile its blocks, whose code is that of equal blocks.
    """

    def __init__(
        self,
        model: RobustModel,
        savings: Iterable[str] = (),
        *,
        micro_batch: MicroBatch | None = None,
        replays: Replays | None = None,
        is_compiled: bool = False,
    ) -> None:
        self.model = deepcopy(model).requires_grad_(False)
        self.micro_batch = micro_batch or MicroBatch("teacher")
        self.replays, self.buffers = replays or Replays(), Buffers()
        self._weights: dict[str, Tensor] | None = {
            name: value.detach().cpu().clone() for name, value in model.network.state_dict().items()
        }
        if "stored-bf16" in savings:
            for module in self.model.network.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(model.compute_dtype)
        if is_compiled:
            compile_blocks(self.model)

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images [B, C, H, W] in [0, 1], in a buffer of the next call."""
        held = self.buffers.hold("images", self.model.arrange(images))
        shape = len(held), self.model.width
        embeddings = self.buffers.hold("embeddings", self.model.mean.new_zeros(()).expand(shape))

        def embed_part(part: slice, pixels: Tensor) -> None:
            own = self.buffers.hold("part", pixels)
            into = self.buffers.hold("embedded part", embeddings[part])

            def embed() -> None:
                into.copy_(self.model(own))

            self.replays(("teacher", own.shape), embed)
            embeddings[part].copy_(into)

        with torch.no_grad():
            self.micro_batch.in_parts(embed_part, held)
        return embeddings

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images [B, C, H, W] in [0, 1], never recorded nor compiled."""
        embeddings = images.new_empty(len(images), self.model.width)

        def embed_part(part: slice, images: Tensor) -> None:
            embeddings[part] = self.model(self.model.arrange(images))

        with torch.compiler.set_stance("force_eager"):
            self.micro_batch.in_parts(embed_part, images)
        return embeddings

    def save(self, path: Path) -> None:
        """Write its weights, with timm's names, once; raises ValueError naming a file it cannot."""
        assert self._weights is not None, "they are kept until they are written"
        save_weights(self._weights, path)

    def forget_weights(self) -> None:
        """Free the float32 weights that `save` writes."""
        self._weights = None


def load_original(model: RobustModel, path: Path) -> None:
    """Load what `Teacher.save` wrote into a model; raises ValueError naming a file that is lost."""
    if not path.is_file():
        raise ValueError(f"{path}: expected the weights of the original network, got no file")
    load_weights(model.network, path)
