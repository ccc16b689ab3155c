"""Accuracy of the weights of a run in progress, on the splits that are not trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safer_fast.attacks.named import ThreatModel, attack_by_name
from safer_fast.attacks.pgd import placed_start
from safer_fast.attacks.radii import radii_at
from safer_fast.config.commands import EvaluateConfig
from safer_fast.config.schema import Config, EvaluationConfig
from safer_fast.data import Batch, Data, Loader, as_pixels
from safer_fast.evaluation.accuracy import Accuracy, evaluate
from safer_fast.evaluation.overfitting import AttackGap, count_right
from safer_fast.runs.gallery import gallery_strip, make_gallery, write_gallery
from safer_fast.runs.layout import RunFolder
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.runtime.seeds import derive_seed
from safer_fast.runtime.signals import Stops
from safer_fast.training.engine import Engine

SEED_OFFSET = 1_000_003
NUM_IMAGES_SHOWN = 8  # images of the gallery


def attack_shown(config: EvaluationConfig) -> str:
    """The attack of the gallery: the last PGD of the final figures, else PGD-20."""
    own = [name for name in config.attacks if name.startswith("pgd-")]
    return (own or ["pgd-20"])[-1]


def validation_figures(
    clean: Accuracy | None = None, robust: Accuracy | None = None, of_images: int | None = None
) -> dict[str, Any]:
    """Keys of an epoch's event about the validation split, null where it was not evaluated.

    of_images: all of the split.
    """
    if clean is None or robust is None:
        names = ["clean_accuracy", "robust_accuracy", "validation_loss", "num_not_finite"]
        names += ["gradient_masking", "validation_images", "of_validation_images"]
        return dict.fromkeys(names)
    if robust.embedding_distance is not None:
        figures = dict.fromkeys(validation_figures()) | {
            "clean_embedding_distance": clean.embedding_distance,
            "embedding_distance": robust.embedding_distance,
            "num_not_finite": max(clean.num_not_finite, robust.num_not_finite),
        }
        return figures | {"validation_images": robust.num_images, "of_validation_images": of_images}
    return {
        "validation_images": robust.num_images,
        "of_validation_images": of_images,
        "clean_accuracy": clean.accuracy,
        "robust_accuracy": robust.accuracy,
        "validation_loss": robust.loss,
        "num_not_finite": max(clean.num_not_finite, robust.num_not_finite),
        "gradient_masking": list(robust.gradient_masking),
    }


class Validator:
    """Evaluates weights that lie in a vector laid out as the masters; ranks share the images."""

    def __init__(
        self, config: Config, engine: Engine, data: Data, log: RunLog, stops: Stops
    ) -> None:
        self.config, self.engine, self.data = config, engine, data
        self.log, self.stops = log, stops
        self._watched: list[Batch] | None = None

    def on_validation(self, source: Tensor) -> tuple[Accuracy, Accuracy]:
        """Clean and robust accuracy on `evaluation.max_images` validation images."""
        settings = self.config.evaluation
        attacks = ["clean", f"pgd-{settings.steps}"]
        clean, robust = self._accuracies(
            self.data.validation,
            attacks,
            source,
            "validation",
            settings.max_images,
            seed=self.config.seed + SEED_OFFSET,
            attacks_wrong=True,  # the validation loss is that of all images under the attack
        )
        return clean, robust

    def final_accuracies(self, weights: str, source: Tensor) -> list[dict[str, Any]]:
        """Evaluate weights under the final attacks, on the test split if there is one.

        weights: their name in the rows that are returned, one for each attack. The figures are what
        `python -m safer_fast.evaluate RUN` measures with its default seed, on as many images.
        """
        loader = self.data.test or self.data.validation
        split = "test" if self.data.test is not None else "validation"
        attacks = self.config.evaluation.attacks
        label, seed = f"{split}, weights {weights}", EvaluateConfig.seed
        limit = self.config.evaluation.final_images
        results = self._accuracies(loader, attacks, source, label, limit, seed=seed)
        facts = {"split": split, "weights": weights, "of_images": loader.num_images}
        seeds = [None if result.attack == "clean" else seed for result in results]
        return [
            facts | row_of(result) | {"seed": drawn}
            for result, drawn in zip(results, seeds, strict=True)
        ]

    def show_images(self, source: Tensor, folder: Path, step: int) -> None:
        """Write a few attacked images of the final split to the run's gallery and its log.

        Rank 0 does that with its own images; if it has none there is no gallery, nor for a tower
        that classifies nothing.
        """
        loader = self.data.test or self.data.validation
        if not self.engine.ranks.is_first or self.engine.tower.judge is not None:
            return
        batch = next(iter(loader.epoch(1, limit=NUM_IMAGES_SHOWN)), None)
        if batch is None or not batch.num_images:
            return
        batch, count = batch.to(self.engine.runtime.device), min(NUM_IMAGES_SHOWN, batch.num_images)
        name, config = attack_shown(self.config.evaluation), self.config.attack
        threat = ThreatModel(config.norm, float(config.epsilon))
        images, labels = as_pixels(batch.images)[:count], batch.labels[:count]
        place, model = (self._seed_of, batch.position), self.engine.tower.classifier
        with self.engine.reading(source), self.engine.evaluating() as attack:
            attack.multiple = 1
            attacked = attack_by_name(name, attack, images, labels, threat.epsilon, place)
            gallery = make_gallery(model, images, labels, attacked)
        split = "test" if self.data.test is not None else "validation"
        try:
            write_gallery(
                gallery,
                RunFolder(folder).gallery,
                class_names=self.data.class_names,
                attack=name,
                epsilon=threat.epsilon,
                weights="last",
                split=split,
            )
        except ValueError as error:  # pictures are no reason to end a run
            self.log.say(f"the gallery is left as it is: {error}")
        self.log.add_image("gallery", *gallery_strip(gallery), step=step)

    def attack_gap(self, epoch: int) -> AttackGap | None:
        """Accuracy under the training attack of this epoch and under PGD-20, on training images.

        The images are the same each time. None without an attack or without `sentinel_images`, and
        for a tower that classifies nothing.
        """
        config, device = self.config.attack, self.engine.runtime.device
        steps = self.engine.audit.attack_steps
        epsilon, step_size = radii_at(config, epoch, steps)
        num_images = self.config.evaluation.sentinel_images
        if not (num_images and epsilon and steps) or self.engine.tower.judge is not None:
            return None
        if self._watched is None:
            batches = self.data.train.probe(num_images, 0)
            self._watched = [batch.to(device) for batch in batches]
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        attack: dict[str, Any] = {"epsilon": epsilon, "step_size": step_size, "norm": config.norm}
        with self.engine.evaluating() as recorded:
            if recorded.replays.can_record:  # else as written, with the bits of earlier versions
                attack["attack"], recorded.multiple = recorded, 1
            for batch in self.stops.watch(self._watched):
                images, radius = as_pixels(batch.images), torch.full((), epsilon, device=device)
                start = placed_start(
                    images, radius, config.norm, position=batch.position, seed_of=self._seed_of
                )
                count = partial(count_right, self.engine.tower.classifier, steps=steps, **attack)
                parts = recorded.micro_batch
                counts[:2] += _count_in_parts(parts, count, images, batch.labels, start)
                counts[2] += batch.num_images
            counts = self.engine.ranks.sum_(counts).cpu()
            return AttackGap.from_counts(counts[:2], int(counts[2]))

    def _seed_of(self, number: int) -> int:
        return derive_seed(self.config.seed, "sentinel", number)

    def _accuracies(
        self,
        loader: Loader,
        attacks: list[str],
        source: Tensor,
        label: str,
        limit: int | None = None,
        **settings: Any,
    ) -> list[Accuracy]:
        """Evaluate the weights of `source`; the network reads the masters again afterwards."""
        threat = ThreatModel(self.config.attack.norm, float(self.config.attack.epsilon))
        batches = self.stops.watch(loader.epoch(1, limit=limit))
        with self.engine.reading(source), self.engine.evaluating() as attack:
            judge = self.engine.tower.judge
            return evaluate(
                self.engine.tower.classifier,
                self.log.bar(batches, len(loader) if limit is None else None, label),
                attacks,
                threat,
                attack=attack,
                ranks=self.engine.ranks,
                is_compiled=self.engine.runtime.is_compiled,
                teacher=judge and judge.embed,
                **settings,
            )


def row_of(result: Accuracy) -> dict[str, Any]:
    """Figures by name: of an accuracy, or of an embedding distance with null for the accuracy."""
    row = dict(vars(result))
    distance = row.pop("embedding_distance")
    return row if distance is None else row | {"accuracy": None, "embedding_distance": distance}


def _count_in_parts(
    parts: MicroBatch, count: Callable[..., Tensor], images: Tensor, labels: Tensor, start: Tensor
) -> Tensor:
    """Sum of the counts [2] over parts of as many images as memory holds."""
    total = torch.zeros(2, dtype=torch.int64, device=images.device)

    def count_part(part: slice, images: Tensor, labels: Tensor, start: Tensor) -> None:
        if part.start == 0:
            total.zero_()
        total.add_(count(images, labels, start=start))

    parts.in_parts(count_part, images, labels, start)
    return total
