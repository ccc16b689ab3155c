"""Probe: training images to score layers on, and the training attack on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safer_fast.attacks.pgd import AttackLoss, cross_entropy, pgd, placed_start
from safer_fast.attacks.radii import radii_at
from safer_fast.config.schema import Config
from safer_fast.data import Loader, as_pixels
from safer_fast.runtime.seeds import derive_seed

Watched = Callable[[Iterable[Any]], Iterator[Any]]


class Probe:
    """At most `selection.num_images` training images, unaugmented, and the attack on them.

    The images, and the start of the attack, depend on the seed, `number` and their positions
    alone. watch: passes batches, and the layers to score, through one by one. loss: of outputs and
    labels, which the attack raises. labels: (images, labels) -> those that the loss takes.
    """

    def __init__(
        self,
        config: Config,
        loader: Loader,
        number: int,
        watch: Watched = iter,
        *,
        loss: AttackLoss = cross_entropy,
        labels: Callable[[Tensor, Tensor], Tensor] = lambda _, labels: labels,
    ) -> None:
        self.config, self.loader, self.number, self.watch = config, loader, number, watch
        self.loss, self._labels = loss, labels
        self._position = 0

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 [B, C, H, W] in [0, 1] and labels on the device; B may be 0."""
        for batch in self.watch(self.loader.probe(self.config.selection.num_images, self.number)):
            self._position = batch.position
            batch = batch.to(device)
            images = as_pixels(batch.images)
            yield images, self._labels(images, batch.labels)

    def start(self, images: Tensor) -> Tensor:
        """Start of the attack on the images of the last batch."""
        epsilon = torch.full((), float(self.config.attack.epsilon), device=images.device)
        seed_of = partial(derive_seed, self.config.seed, "probe attack", self.number)
        norm = self.config.attack.norm
        return placed_start(images, epsilon, norm, position=self._position, seed_of=seed_of)

    def attack(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The images of the last batch after the training attack at its full strength."""
        config = self.config.attack
        if config.is_none:
            return images
        epsilon, step_size = radii_at(config, self.config.epochs)
        return pgd(
            model,
            images,
            labels,
            epsilon=epsilon,
            step_size=step_size,
            steps=config.most_steps,
            norm=config.norm,
            start=self.start(images),
            objective=self.loss,
            check_tensors=False,
        )
