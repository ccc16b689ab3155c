"""The loop of a training run: the methods that train.py calls, in the order in which it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from safer_fast.config.schema import Config
from safer_fast.data import Batch, prefetch_to_device
from safer_fast.runs.progress import ProgressChanges
from safer_fast.runs.resume import Found
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.signals import Stops
from safer_fast.training.checkpointing import Saver
from safer_fast.training.learner import Learner
from safer_fast.training.results import write_results
from safer_fast.training.schedule import RunPlan, Stage
from safer_fast.training.selecting import LayerSelector
from safer_fast.training.setup import set_up
from safer_fast.training.step import Step
from safer_fast.training.step_log import TrainingLog
from safer_fast.training.validation import Validator


class Trainer:
    """A training run from its first epoch, or a checkpoint, to its report.

    A context manager: within it SIGINT and SIGTERM end the run at the next point where it can be
    resumed. Raises ValueError for mistakes of a user in the constructor, before the run folder is
    made. ranks: the processes that train together. found: the result of `find_run`.
    """

    stage: Stage

    def __init__(
        self, config: Config, ranks: Ranks | None = None, found: Found | None = None
    ) -> None:
        self.config, self.ranks, self.plan = config, ranks or Ranks(), RunPlan(config)
        found = found or Found()
        run = set_up(config, self.ranks, found)
        self.data, self.engine, self.folder, self.log = run.data, run.engine, run.folder, run.log
        self.runtime, self.model = self.engine.runtime, self.engine.model
        self.arenas, self.progress = self.engine.arenas, run.progress
        self.learner = Learner(config, self.engine, self.data)
        self.saver = Saver(config, self.folder, self.ranks, run.numerics, self.log)
        self.stops = Stops(self.ranks, config.checkpoint.grace_s)
        self.training_log = TrainingLog(config, self.log, self.engine, self.data)
        self.validator = Validator(config, self.engine, self.data, self.log, self.stops)
        self.selector = LayerSelector(config, self.learner, self.data, self.log, self.stops)
        if found.checkpoint is not None:
            self.saver.restore(found.checkpoint, self.progress, self.learner)

    def __enter__(self) -> Trainer:
        self.stops.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.stops.__exit__(*error)
        self.saver.close()
        self.log.close()

    @property
    def step(self) -> Step:
        """The step over the layers that were selected last."""
        return self.learner.step

    def epochs(self) -> Iterator[int]:
        """Numbers of the epochs that are left; ends early where `evaluation.patience` does."""
        patience = self.config.evaluation.patience
        while self.progress.epoch <= self.config.epochs:
            if patience is not None and self.progress.num_without_gain >= patience:
                self.log.say(f"evaluation.patience: no gain in {patience} evaluations")
                return
            yield self.progress.epoch

    def begin_epoch(self, epoch: int) -> None:
        """Enter the stage of the epoch, and select layers if they are due."""
        self.stage = self.plan.stage_of(epoch)
        if self.progress.has_begun:  # a resumed epoch
            return
        changes: ProgressChanges = {"has_begun": True, "index": 0, "totals": {}}
        if self.plan.selects_before(epoch):
            if self.stage.name == "safer" and epoch == self.stage.first_epoch:
                changes.update(self._start_safer(epoch))
            self.choose(epoch)
            moved = changes.get("moved", self.progress.moved)
            changes.update(self.selector.changes(self.stage, moved))
        self._record(changes)

    def choose(self, epoch: int) -> None:
        """Train all parameters, or newly selected layers, from this epoch on."""
        self.stage = self.plan.stage_of(epoch)
        if self.stage.name == "warm-up":
            self.learner.train_layers(None, self.stage)
        else:
            self.selector.select(self.stage, epoch, self.progress.num_steps)
            weights = self.learner.evaluated_weights()
            self.validator.show_images(weights, self.folder, self.progress.num_steps)
        if epoch == self.stage.first_epoch:
            self.learner.start_average()

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train on the rest of the epoch's batches; return the epoch's training figures."""
        self.training_log.begin_epoch()
        num_batches, first = len(self.data.train), self.progress.index
        batches = prefetch_to_device(self.data.train.epoch(epoch, first), self.runtime.device)
        label = f"epoch {epoch}/{self.config.epochs} {self.stage.name}"
        watched = self.training_log.watch(batches)
        for index, batch in enumerate(self.log.bar(watched, num_batches, label, first), first):
            learning_rate = self.take_step(epoch, index, num_batches, batch)
            num_steps, totals = self.progress.num_steps + 1, self.progress.totals
            is_last = index + 1 == num_batches
            if num_steps % self.config.runtime.log_every_steps == 0 or is_last:
                totals = self._log_step(epoch, num_steps, learning_rate, is_last)
            self._record({"index": index + 1, "num_steps": num_steps, "totals": totals})
        return self.training_log.epoch_figures(self.step, epoch, self.progress.totals)

    def take_step(self, epoch: int, index: int, num_batches: int, batch: Batch) -> float:
        """Learn from batch `index` (from 0) of an epoch; return the learning rate."""
        place = self.stage, epoch, index, num_batches
        return self.learner.take_step(*place, batch, self.progress.num_steps)

    def end_epoch(self, epoch: int, figures: dict[str, Any]) -> None:
        """Evaluate on the validation split if that is due, log the epoch, keep the best weights."""
        changes: ProgressChanges = {"epoch": epoch + 1, "has_begun": False}
        changes.update({"index": 0, "totals": {}})
        gap, accuracies = None, None
        self.saver.check_folder()
        if self.plan.evaluates_after(epoch):
            gap = self.validator.attack_gap(epoch)
            if gap is not None and gap.is_catastrophic:
                self.engine.audit.sound_alarm()
            accuracies = self.validator.on_validation(self.learner.evaluated_weights())
            clean, robust = accuracies
            changes.update(self._keep_best(epoch, (robust.score, clean.score)))
        place = self.stage, epoch, self.progress.num_steps
        self.training_log.end_epoch(*place, figures, accuracies, gap)
        self._record(changes)

    def finish(self) -> Path:
        """Write final figures of the best and last weights, the exported model, and the report."""
        self.save()
        self.saver.wait()
        epoch = self.progress.epoch - 1
        self.saver.provide_best(self.progress, self.learner.network_state)
        best = self.arenas.vector_of(self.saver.best_weights())
        rows = list(self.progress.accuracies)
        for name, source in (("best", best), ("last", self.learner.evaluated_weights())):
            rows += self._log_final_accuracies(name, epoch, source)
        self.saver.check_folder()
        if self.ranks.is_first:
            write_results(self.folder, self.learner, self.validator, self.log, self.progress, rows)
        return self.folder

    def save(self) -> None:
        """Write a checkpoint of the last recorded progress, in the background."""
        self.saver.save(self.progress, self.learner)

    def stop(self, reason: str) -> None:
        """Write a checkpoint, and say how to resume from it."""
        self.save()
        self.saver.wait()
        self.log.say(
            f"{reason}: stopped after step {self.progress.num_steps}; the same command with "
            f"--output {self.folder} --resume auto resumes from {self.saver.store.last}"
        )

    def _record(self, changes: ProgressChanges) -> None:
        """Record progress; write a checkpoint if one is due; stop if a signal was received."""
        changes.update({"metrics_size": self.log.size, "audit": self.engine.audit.state_dict()})
        self.progress = replace(self.progress, **changes)
        has_images = self.training_log.num_images > 0
        if self.stops.check(has_images and self.saver.is_due(self.progress.num_steps)):
            self.save()

    def _log_step(
        self, epoch: int, num_steps: int, learning_rate: float, is_last: bool
    ) -> dict[str, float]:
        """Log the steps since the last line; return the epoch's totals."""
        sums = self.training_log.write(self.step, epoch, num_steps, learning_rate, is_last)
        self.learner.check_health(epoch, self.saver.store.last)
        if unread := self.learner.new_unread():
            self.log.say(f"not trained, the network never reads them: {', '.join(unread)}")
        summed = {name: self.progress.totals.get(name, 0.0) + v for name, v in sums.items()}
        last = {"learning_rate": learning_rate, "attack_steps": self.step.attack.steps}
        return summed | last

    def _log_final_accuracies(
        self, weights: str, epoch: int, source: Tensor
    ) -> list[dict[str, Any]]:
        """Evaluate the weights in `source` under the final attacks, and log a row for each."""
        rows = self.validator.final_accuracies(weights, source)
        for row in rows:
            self.log.write("evaluation", epoch=epoch, step=self.progress.num_steps, **row)
        return rows

    def _start_safer(self, epoch: int) -> ProgressChanges:
        """Evaluate the weights that SAFER starts from; write them if most of them will stay."""
        self.learner.average = None
        rows = self._log_final_accuracies("start", epoch - 1, self.arenas.master)
        name = None
        if not self.selector.takes_all(self.stage):
            name = f"start-{self.progress.num_steps:08d}"
            self.saver.keep_start(name, self.arenas.state_dict())
        return {
            "accuracies": [*self.progress.accuracies, *rows],
            "start_file": name,
            "moved": [],
        }

    def _keep_best(self, epoch: int, accuracies: tuple[float, float]) -> ProgressChanges:
        """Write the weights if they are as good as the best; accuracies: robust, then clean."""
        changes = self.progress.after_evaluation(accuracies, self.plan.counts_for_patience(epoch))
        name = changes.get("best_file")
        if name is not None:
            self.saver.keep_best(name, self.learner.network_state())
        return changes
