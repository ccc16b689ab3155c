"""Evaluation of a run folder, batch by batch; it resumes one that was stopped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safer_fast.attacks.autoattack import LibraryAttacks
from safer_fast.attacks.masking import has_gradients, starts_at_random, with_verdicts
from safer_fast.attacks.pgd import Norm
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.attack_names import LIBRARY_ATTACKS, num_attack_steps
from safer_fast.config.commands import EvaluateConfig, attacks_of
from safer_fast.config.messages import printable
from safer_fast.data import Batch, as_pixels, describe_subset
from safer_fast.data.corrupted import Corruption
from safer_fast.data.formats.given import WORD
from safer_fast.evaluation.batch import BatchEvaluator, BatchOutcome, multiple_of
from safer_fast.evaluation.log import log_rows, open_log, whole_path
from safer_fast.evaluation.progress import ProgressDisplay
from safer_fast.evaluation.setup import (
    EvaluationSetup,
    num_restarts,
    open_data,
    set_up_evaluation,
)
from safer_fast.evaluation.store import SCALE, Outcome, names_of, to_millionths
from safer_fast.evaluation.towers import as_distances
from safer_fast.models.flops import costs
from safer_fast.models.robust_model import compile_blocks
from safer_fast.runs.accuracies import accuracy_table, class_table, notes
from safer_fast.runs.folder import LoadedRun
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runs.trained_on import (
    TRAINED_ON,
    holds_training_images,
    is_training_path,
    may_be_training_path,
)
from safer_fast.runtime.device import decide_auto
from safer_fast.runtime.files import check_writable
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.runtime.ranks import Ranks, connected
from safer_fast.runtime.signals import Stopped, Stops

GRACE_S = 25.0


def evaluate_folder(
    config: EvaluateConfig,
    corruption: Corruption | None = None,
    is_part: bool = False,
    split: str | None = None,
    forgotten: set[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure and return a row for each attack; append new ones to metrics.jsonl.

    corruption: images are corrupted by it. is_part: print no table by class, for corruptions none.
    split: name of the data; default: that of the file or the run's split. forgotten: see
    `set_up_evaluation`.
    """
    folder = Path(config.run)
    with connected(config.device != "cpu") as ranks, ExitStack() as measuring:
        check_writable(folder, "RUN", "make it writable, or evaluate a copy of it")
        setup = set_up_evaluation(config, ranks, corruption, forgotten)
        stops = measuring.enter_context(Stops(Ranks(), GRACE_S, "between two passes within s="))
        if split is not None:
            setup = replace(setup, split=split)
        log = open_log(folder, ranks)
        if config.path not in (None, WORD) and ranks.share(_is_of_training(config, setup, ranks)):
            log.say(
                f"note: {printable(setup.split)} holds images that the run was trained on; "
                "accuracies on them say nothing about others"
            )
            setup = replace(setup, split=setup.split + TRAINED_ON)
        num_images = setup.loader.num_images
        if config.num_images is not None and config.num_images < num_images:
            log.say(f"{setup.split}: {describe_subset(config.num_images, num_images)}")
        share = -(-min(config.num_images or num_images, num_images) // ranks.num_ranks)
        with ProgressDisplay(list(setup.stores), share, log.say, ranks.is_first) as progress:
            evaluator = Evaluator(config, setup, progress, stops, log, share)
            try:
                for batch in setup.loader.epoch(1, limit=config.num_images):
                    evaluator.take(batch)
            except Stopped as stop:
                done = f"{stop.signal.name}: stopped at {progress.share_done:.0%}"
                how = " without --fresh" if config.fresh else ""
                log.say(f"{done}; the same command{how} resumes it")
                raise
        rows = evaluator.rows(ranks)
        rows = [row for row in rows if row["attack"] in attacks_of(config)]
        rows = with_verdicts(rows) if setup.judge is None else as_distances(rows)
        if corruption is not None:
            own = {"corruption": corruption.name, "severity": corruption.severity}
            rows = [row | own for row in rows]
        epoch = setup.model.config.epochs
        if ranks.is_first:
            log_rows(rows, folder, epoch, log)
        if corruption is None:
            log.say("\n".join([accuracy_table(rows), *notes(rows)]))
        if not is_part and setup.judge is None:
            log.say(class_table(rows, setup.model.class_names))
        stops.check()  # more evaluations may follow
    return rows


def _is_of_training(config: EvaluateConfig, setup: EvaluationSetup, ranks: Ranks) -> bool | None:
    """True for data that the run was trained on; rank 0 looks."""
    if not ranks.is_first or config.path is None:
        return None
    if is_training_path(setup.model, config.path):
        return True
    # large data are not searched for a copy elsewhere
    if not may_be_training_path(setup.model, config.path):
        return False
    return holds_training_images(setup.model, open_data(config, setup.model, config.path))


class Evaluator:
    """Measures batches whose outcomes are not in the stores yet, and adds up those that are.

    share: about how many images will come. Only images that are right without an attack are
    attacked, and by the next restart only those that are still right.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        setup: EvaluationSetup,
        progress: ProgressDisplay,
        stops: Stops,
        log: RunLog,
        share: int,
    ) -> None:
        model, attacked, threat = setup.model, setup.attacked, setup.threat
        self.config, self.threat = config, threat
        self.stores, self.progress, self.stops = setup.stores, progress, stops
        self.split, self.of_images = setup.split, setup.loader.num_images
        self.has_classes = setup.judge is None
        file = config.text_embeddings
        self._named = {} if file is None else {"text_embeddings": file}
        if config.path not in (None, WORD):
            self._named["path"] = whole_path(config.path)
        self.device, num_classes = model.model.mean.device, len(model.class_names)
        runtime = decide_auto(
            attacked.runtime, attacked.config.runtime, _num_operations(config, attacked, share)
        )
        if runtime.is_compiled:
            compile_blocks(attacked.model)
        is_shaped = runtime.is_compiled or runtime.is_captured
        replays = runtime.replays(log.say)
        parts = MicroBatch("--batch-size", "auto", replays.forget, log.say)
        multiple = multiple_of(min(config.batch_size, share)) if is_shaped else 1
        # in l1 only the library attacks
        norm: Norm = "linf" if threat.norm == "l1" else threat.norm
        attack = ReplayedAttack(
            attacked.model, norm=norm, micro_batch=parts, replays=replays, multiple=multiple
        )
        library = LibraryAttacks(attacked.model, threat.norm, num_classes, parts, log.say)
        self.batches = BatchEvaluator(
            model.model,
            attack,
            epsilon=threat.epsilon,
            seed=config.seed,
            restarts=config.restarts,
            is_compiled=runtime.is_compiled,
            library=library,
            teacher=setup.judge and setup.judge.embed,
        )
        # of each attack: images and right ones of each class; then sums of `_totals`
        self.classes = {
            name: torch.zeros(2, num_classes, dtype=torch.float64) for name in setup.stores
        }
        self.totals = {name: torch.zeros(5, dtype=torch.float64) for name in setup.stores}
        for network in {model.model, attacked.model}:
            network.register_forward_pre_hook(lambda *_: self._check_and_show())

    def take(self, batch: Batch) -> None:
        """Measure the batch under every attack and count it."""
        self._check_and_show()
        count = batch.num_images
        batch = replace(
            batch, images=batch.images[:count], labels=batch.labels[:count], num_padding=0
        )
        if not count:
            return
        if not self.has_classes:
            batch = replace(batch, labels=torch.zeros_like(batch.labels))
        names = {
            is_joint: names_of(batch.images, batch.labels, batch.position, is_joint)
            for is_joint in {name in LIBRARY_ATTACKS for name in self.stores}
        }
        clean: list[Outcome] = []
        for name, store in self.stores.items():
            own = names[name in LIBRARY_ATTACKS]
            outcomes = store.get(own)
            is_known = outcomes is not None
            if outcomes is None:
                outcomes = self._measure(name, batch, clean)
                outcomes = store.add(own, outcomes)
            clean = clean or outcomes
            self._count(name, batch.labels, outcomes, is_known)

    def rows(self, ranks: Ranks) -> list[dict[str, Any]]:
        """A row for each attack over the batches of all ranks; raises ValueError for no image."""
        return [
            self._row(name, ranks.sum_(classes), ranks.sum_(self.totals[name]), ranks)
            for name, classes in self.classes.items()
        ]

    def _measure(self, name: str, batch: Batch, clean: Sequence[Outcome]) -> list[Outcome]:
        started = time.perf_counter()
        images = as_pixels(batch.images.to(self.device))
        labels = batch.labels.to(self.device)
        found = self.batches.measure(name, images, labels, batch.position, self._on_device(clean))
        flags = (found.finite, ~found.blind, found.starts_right)
        columns = found.right.tolist(), to_millionths(found.losses), *(f.tolist() for f in flags)
        seconds = (time.perf_counter() - started) / len(labels)
        return [Outcome(r, loss, seconds, *own) for r, loss, *own in zip(*columns, strict=True)]

    def _on_device(self, outcomes: Sequence[Outcome]) -> BatchOutcome | None:
        """The outcomes as tensors, as `measure` returns them; None for no outcomes."""
        if not outcomes:
            return None
        columns = zip(
            *((o.is_right, _loss(o), o.is_finite, False, True) for o in outcomes), strict=True
        )
        return BatchOutcome(*(torch.tensor(values, device=self.device) for values in columns))

    def _check_and_show(self) -> None:
        self.stops.check()
        self.progress.tick()

    def _count(
        self, name: str, labels: Tensor, outcomes: Sequence[Outcome], is_known: bool
    ) -> None:
        right = torch.tensor([outcome.is_right for outcome in outcomes])
        counts, classes = self.classes[name], labels.cpu()
        for sums, values in zip(counts, (classes, classes[right]), strict=True):
            sums += torch.bincount(values, minlength=len(sums))
        self.totals[name] += _totals(outcomes)
        measured = None if is_known else sum(outcome.seconds for outcome in outcomes)
        self.progress.add(name, len(outcomes), int(right.sum()), measured)

    def _row(self, name: str, counts: Tensor, totals: Tensor, ranks: Ranks) -> dict[str, Any]:
        loss, seconds, num_not_finite, num_blind, num_starts = totals.tolist()
        (num_images, num_right), is_clean = counts.sum(1).int().tolist(), name == "clean"
        if not num_images:
            raise ValueError(
                "data.path: expected an image that can be read to evaluate on, got none"
            )
        pairs = zip(*counts.tolist(), strict=True)
        return {
            "split": self.split,
            "weights": self.config.weights,
            "attack": name,
            "norm": None if is_clean else self.threat.norm,
            "epsilon": 0.0 if is_clean else self.threat.epsilon,
            "accuracy": num_right / num_images,
            "num_images": num_images,
            "of_images": self.of_images,
            "loss": round(loss / num_images) / SCALE if loss == loss else None,
            "num_not_finite": int(num_not_finite),
            "num_zero_gradients": int(num_blind) if has_gradients(name) else None,
            "start_accuracy": (
                num_starts / num_images
                if starts_at_random(name) and not self.batches.is_transfer
                else None
            ),
            "restarts": None if is_clean else num_restarts(name, self.config),
            "seed": None if is_clean else self.config.seed,
            "source": None if is_clean else _source_of(self.config),
            "per_class_accuracy": [right / count if count else None for count, right in pairs],
            "seconds": round(seconds / ranks.num_ranks, 3),
            **self._named,
        }


def _source_of(config: EvaluateConfig) -> str | None:
    """The source of a transfer, with its weights if these are not the last."""
    is_usual = config.source is None or config.source_weights == "last"
    return config.source if is_usual else f"{config.source} ({config.source_weights})"


def _totals(outcomes: Sequence[Outcome]) -> Tensor:
    """Loss in millionths, seconds, images with logits that are not finite, with a gradient that is
    of no use, right at all starts; float64 [5]."""
    losses = (torch.nan if outcome.loss is None else outcome.loss for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    broken = sum(not outcome.is_finite for outcome in outcomes)
    blind = sum(not outcome.has_gradient for outcome in outcomes)
    starts = sum(outcome.starts_right for outcome in outcomes)
    return torch.tensor([sum(losses), seconds, broken, blind, starts], dtype=torch.float64)


def _loss(outcome: Outcome) -> float:
    return torch.nan if outcome.loss is None else outcome.loss / SCALE


def _num_operations(config: EvaluateConfig, attacked: LoadedRun, num_images: int) -> float:
    """Estimate of the operations of our own attacks; backward counts as forward."""
    model, size = attacked.model, attacked.image_size
    image = torch.zeros(1, attacked.num_channels, size, size, device=model.mean.device)
    with model.without_savings():
        forward = sum(cost.forward for cost in costs(model, image).values())
    passes = sum(
        2 * num_attack_steps(name) * num_restarts(name, config)
        for name in attacks_of(config)
        if name not in LIBRARY_ATTACKS
    )
    return num_images * passes * forward
