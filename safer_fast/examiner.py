"""How good the weights of a run in progress are, on the splits that are not trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safer_fast.attack import placed_start
from safer_fast.config import Config
from safer_fast.data import Batch, Data, Loader, as_pixels
from safer_fast.data.seeds import derive_seed
from safer_fast.engine import Engine
from safer_fast.evaluate import Accuracy, ThreatModel, evaluate
from safer_fast.run_log import RunLog
from safer_fast.schedule import radii_at
from safer_fast.sentinel import AttackGap, count_right
from safer_fast.stopping import Stops

SEED_OFFSET = 1_000_003


class Examiner:
    """Evaluates weights that lie in a vector like the masters; ranks share the images."""

    def __init__(
        self, config: Config, engine: Engine, data: Data, log: RunLog, stops: Stops
    ) -> None:
        self.config, self.engine, self.data = config, engine, data
        self.log, self.stops = log, stops
        self._watched: list[Batch] | None = None

    def on_validation(self, source: Tensor) -> tuple[float, float]:
        """Robust and clean accuracy on as many validation images as are asked for."""
        settings = self.config.evaluation
        attacks = ["clean", f"pgd-{settings.steps}"]
        clean, robust = self._accuracies(
            self.data.validation, attacks, source, "validation", settings.max_images
        )
        return robust.accuracy, clean.accuracy

    def finally_(self, weights: str, source: Tensor) -> list[dict[str, Any]]:
        """The final figures of what is called `weights`, on the test split if there is one."""
        loader = self.data.test or self.data.validation
        split = "test" if self.data.test is not None else "validation"
        attacks = self.config.evaluation.attacks
        results = self._accuracies(loader, attacks, source, f"{split}, weights {weights}")
        return [{"split": split, "weights": weights, **vars(result)} for result in results]

    def attack_gap(self, epoch: int) -> AttackGap | None:
        """What the training attack of this epoch leaves right, and PGD-20, on training images.

        They are the same each time. None where nothing attacks, or nothing is to be watched.
        """
        config, device = self.config.attack, self.engine.runtime.device
        epsilon, step_size = radii_at(config, epoch)
        num_images = self.config.evaluation.sentinel_images
        if not (num_images and epsilon and config.steps):
            return None
        if self._watched is None:
            batches = self.data.train.probe(num_images, 0)
            self._watched = [batch.to(device) for batch in batches]
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        attack: dict[str, Any] = {"epsilon": epsilon, "step_size": step_size, "norm": config.norm}
        for batch in self.stops.watch(self._watched):
            images, radius = as_pixels(batch.images), torch.full((), epsilon, device=device)
            start = placed_start(
                images, radius, config.norm, position=batch.position, seed_of=self._seed_of
            )
            count = partial(count_right, self.engine.model, steps=config.steps, **attack)
            counts[:2] += self._in_parts(count, images, batch.labels, start)
            counts[2] += batch.num_images
        self.engine.ranks.sum_(counts)
        return AttackGap.from_counts(counts[:2], int(counts[2]))

    def _seed_of(self, number: int) -> int:
        return derive_seed(self.config.seed, "sentinel", number)

    def _in_parts(
        self, count: Callable[..., Tensor], images: Tensor, labels: Tensor, start: Tensor
    ) -> Tensor:
        """The counts [2] over as many images at a time as memory holds."""
        total = torch.zeros(2, dtype=torch.int64, device=images.device)

        def count_all(size: int) -> None:
            total.zero_()
            parts = (torch.split(whole, size) for whole in (images, labels, start))
            for some, classes, places in zip(*parts, strict=True):
                total.add_(count(some, classes, start=places))

        if len(images):
            self.engine.evaluation_batch.run(len(images), count_all)
        return total

    def _accuracies(
        self,
        loader: Loader,
        attacks: list[str],
        source: Tensor,
        label: str,
        limit: int | None = None,
    ) -> list[Accuracy]:
        """The network reads the masters again afterwards, also where the run is stopped."""
        threat = ThreatModel(self.config.attack.norm, float(self.config.attack.epsilon))
        arenas = self.engine.arenas
        arenas.load_compute(source)
        batches = self.stops.watch(loader.epoch(1, limit=limit))
        try:
            return evaluate(
                self.engine.model,
                iter(self.log.bar(batches, len(loader) if limit is None else None, label)),
                attacks,
                threat,
                seed=self.config.seed + SEED_OFFSET,
                micro_batch=self.engine.evaluation_batch,
                ranks=self.engine.ranks,
            )
        finally:
            arenas.load_compute()
