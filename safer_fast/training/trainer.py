"""A run in progress: what the loop of train.py calls, in the order in which it calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from safer_fast.attacks.radii import radii_at
from safer_fast.config.schema import Config
from safer_fast.data import Batch, ahead
from safer_fast.runs.accuracies import accuracy_table, notes
from safer_fast.runs.folder import export_model
from safer_fast.runs.loggers.metrics_file import Event
from safer_fast.runs.report.page import write_report
from safer_fast.runs.resume import Found
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.seeds import derive_seed
from safer_fast.runtime.signals import Stops
from safer_fast.training.banner import epoch_line, gap_figures
from safer_fast.training.checkpointing import Saver
from safer_fast.training.learner import Learner
from safer_fast.training.schedule import Stage, stage_of
from safer_fast.training.selecting import choose_by_probe
from safer_fast.training.setup import set_up
from safer_fast.training.step import Step
from safer_fast.training.step_log import TrainingLog, epoch_figures
from safer_fast.training.validation import Validator, validation_figures


class Trainer:
    """Model, data, weights and log of one run; a context manager that notices signals.

    What a user can get wrong raises ValueError in the constructor, before the run folder is made.
    ranks: the processes that train together. found: what `find_run` has found.
    """

    stage: Stage

    def __init__(
        self, config: Config, ranks: Ranks | None = None, found: Found | None = None
    ) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        found = found or Found()
        run = set_up(config, self.ranks, found)
        self.data, self.engine, self.folder, self.log = run.data, run.engine, run.folder, run.log
        self.runtime, self.model = self.engine.runtime, self.engine.model
        self.arenas = self.engine.arenas
        self.learner = Learner(config, self.engine, self.data)
        self.saver = Saver(config, self.folder, self.ranks, run.facts, self.log)
        self.stops = Stops(self.ranks, config.checkpoint.grace_s)
        num_steps = config.epochs * len(self.data.train)
        self.training_log = TrainingLog(self.log, self.ranks, self.runtime.device, num_steps)
        self.examiner = Validator(config, self.engine, self.data, self.log, self.stops)
        self.progress = run.progress
        if found.checkpoint is not None:
            self.saver.restore(found.checkpoint, self.progress, self.learner)
            self.log.say(
                f"resumed from {found.checkpoint.path}: step {self.progress.num_steps}, "
                f"epoch {self.progress.epoch}, batch {self.progress.index}"
            )

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
        """The epochs that are left, as long as there is patience."""
        patience = self.config.evaluation.patience
        while self.progress.epoch <= self.config.epochs:
            if patience is not None and self.progress.num_without_gain >= patience:
                self.log.say(f"evaluation.patience: no gain in {patience} evaluations")
                return
            yield self.progress.epoch

    def begin_epoch(self, epoch: int) -> None:
        """The stage of the epoch is entered, and layers are selected if this is the time."""
        self.stage = stage_of(self.config, epoch)
        if self.progress.has_begun:  # and was resumed from
            return
        changes: dict[str, Any] = {}
        if self.stage.selects_at(epoch, self.config.selection.every_epochs):
            if self.stage.name == "safer" and epoch == self.stage.first_epoch:
                changes |= self._start_safer(epoch)
            self.choose(epoch)
            selected = None if self._trains_all() else self.step.selection.names
            moved = changes.get("moved", self.progress.moved)
            changes |= {"selected": selected, "moved": [*moved, *self._new(moved, selected)]}
        self._reach(has_begun=True, index=0, totals={}, **changes)

    def choose(self, epoch: int) -> None:
        """The step from this epoch on: over all parameters, or over newly selected layers."""
        self.stage = stage_of(self.config, epoch)
        if self.stage.name == "warm-up":
            self.learner.train_layers(None, self.stage)
        else:
            self._select(epoch)
        if epoch == self.stage.first_epoch:
            self.learner.start_average()

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """What is left of one pass over the training images; gives the epoch's training figures."""
        self.training_log.begin_epoch()
        num_batches, first = len(self.data.train), self.progress.index
        batches = ahead(self.data.train.epoch(epoch, first), self.runtime.device)
        label = f"epoch {epoch}/{self.config.epochs} {self.stage.name}"
        watched = self.training_log.watch(batches)
        for index, batch in enumerate(self.log.bar(watched, num_batches, label, first), first):
            learning_rate = self.take_step(epoch, index, num_batches, batch)
            num_steps, totals = self.progress.num_steps + 1, self.progress.totals
            is_last = index + 1 == num_batches
            if num_steps % self.config.runtime.log_every_steps == 0 or is_last:
                totals = self._log_step(epoch, num_steps, learning_rate, is_last)
            self._reach(index=index + 1, num_steps=num_steps, totals=totals)
        return epoch_figures(
            self.progress.totals,
            epsilon=radii_at(self.config.attack, epoch)[0],
            num_images=self.data.train.num_images,
            peak_memory_mib=self.runtime.peak_memory_mib(),
            is_sharpness_aware=self.step.health.is_sharpness_aware,
        )

    def take_step(self, epoch: int, index: int, num_batches: int, batch: Batch) -> float:
        """Take step `index` (from 0) of an epoch, on a batch on the device; see `Learner`."""
        place = self.stage, epoch, index, num_batches
        return self.learner.take_step(*place, batch, self.progress.num_steps)

    def end_epoch(self, epoch: int, figures: dict[str, Any]) -> None:
        """Evaluates on the validation split when it is time, logs the epoch, keeps the best."""
        every = self.config.evaluation.every_epochs
        changes: dict[str, Any] = {}
        gap, accuracies = None, validation_figures()
        self.saver.check_folder()
        if epoch % every == 0 or epoch == self.config.epochs:
            gap = self.examiner.attack_gap(epoch)
            clean, robust = self.examiner.on_validation(self.learner.evaluated_weights())
            accuracies = validation_figures(clean, robust, self.data.validation.num_images)
            changes = self._keep_best(epoch, (robust.accuracy, clean.accuracy))
        self._write("epoch", epoch, **figures, **accuracies, **gap_figures(gap))
        self.log.say(
            epoch_line(epoch, self.config.epochs, self.stage.name, figures, accuracies, gap)
        )
        self._reach(epoch=epoch + 1, has_begun=False, index=0, totals={}, **changes)

    def finish(self) -> Path:
        """Final figures of the best and last weights, the exported model, and the report."""
        self.save()
        self.saver.wait()
        epoch = self.progress.epoch - 1
        self.saver.provide_best(self.progress, self.learner.network_state)
        best = self.arenas.vector_of(self.saver.best_weights())
        accuracies = list(self.progress.accuracies)
        for name, source in (("best", best), ("last", self.learner.evaluated_weights())):
            accuracies += self._finally(name, epoch, source)
        self.saver.check_folder()
        if self.ranks.is_first:
            facts: dict[str, Any] = {"config": self.config, "data": self.data}
            weights = self.learner.network_state()
            export_model(self.model, weights, self.folder, accuracies=accuracies, **facts)
            self._show_images()
            self._write("end", epoch)
            try:
                report = str(write_report([self.folder]))
            except (ValueError, OSError) as error:  # all that was trained and measured is kept
                report = f"none ({error})"
            self.log.say("\n".join([accuracy_table(accuracies), *notes(accuracies)]))
            self.log.say(f"run folder: {self.folder}\nreport: {report}")
        return self.folder

    def save(self) -> None:
        """A checkpoint of the last point that was reached; it is written while the run goes on."""
        self.saver.save(self.progress, self.learner)

    def stop(self, reason: str) -> None:
        """Writes a checkpoint and says how to go on from it."""
        self.save()
        self.saver.wait()
        self.log.say(
            f"{reason}: stopped after step {self.progress.num_steps}; the same command with "
            f"--output {self.folder} --resume auto goes on from {self.saver.store.last}"
        )

    def _reach(self, **changes: Any) -> None:
        """A point where the run may end, and be gone on from."""
        changes |= {"metrics_size": self.log.size, "audit": self.engine.attack.audited}
        self.progress = replace(self.progress, **changes)
        has_images = self.training_log.num_images > 0
        if self.stops.check(has_images and self.saver.is_due(self.progress.num_steps)):
            self.save()

    def _watched(self, label: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
        """What takes its time goes through it: a progress bar, and a stop in between."""
        return lambda values: iter(self.log.bar(self.stops.watch(values), None, label))

    def _write(self, event: Event, epoch: int, **values: Any) -> None:
        """A line of metrics.jsonl, at the last point that was reached."""
        self.log.write(event, epoch=epoch, step=self.progress.num_steps, **values)

    def _finally(self, weights: str, epoch: int, source: Tensor) -> list[dict[str, Any]]:
        """Logs the final figures of the weights in `source`."""
        rows = self.examiner.finally_(weights, source)
        for row in rows:
            self._write("evaluation", epoch, **row)
        return rows

    def _trains_all(self) -> bool:
        selection = self.config.selection
        return self.stage.name == "warm-up" or (selection.takes_all and not selection.lora_rank)

    def _new(self, moved: list[str], selected: list[str] | None) -> list[str]:
        """Parameters of the selected layers, None for all, that are not among `moved`."""
        layers = self.model.layers
        names = self.arenas.places if selected is None else {n for s in selected for n in layers[s]}
        return [name for name in self.arenas.places if name in names and name not in moved]

    def _start_safer(self, epoch: int) -> dict[str, Any]:
        """The weights that SAFER starts from are measured, and kept where most of them stay."""
        self.learner.average = None
        rows = self._finally("start", epoch - 1, self.arenas.master)
        name = None
        if not self._trains_all():
            name = f"start-{self.progress.num_steps:08d}"
            self.saver.keep_start(name, self.arenas.state_dict())
        accuracies = [*self.progress.accuracies, *rows]
        return {"accuracies": accuracies, "start_file": name, "moved": []}

    def _select(self, epoch: int) -> None:
        loader, seen = self.data.train, self._watched("scoring layers")
        with self.engine.folded():
            choice = choose_by_probe(self.config, self.engine, loader, epoch, seen)
        selected = None if self._trains_all() else choice.selected
        seed = derive_seed(self.config.seed, "factors", epoch)
        self.learner.train_layers(selected, self.stage, seed)
        self._write(
            "selection",
            epoch,
            criterion=choice.criterion,
            scores=choice.scores,
            selected=choice.selected,
            cut=self.step.cut,
        )
        shown = ", ".join(choice.selected[:6]) + (", ..." if len(choice.selected) > 6 else "")
        self.log.say(f"selected by {choice.criterion}: {shown} (suffix from block {self.step.cut})")
        self._show_images()

    def _show_images(self) -> None:
        weights = self.learner.evaluated_weights()
        self.examiner.show_images(weights, self.folder, self.progress.num_steps)

    def _log_step(
        self, epoch: int, num_steps: int, learning_rate: float, is_last: bool
    ) -> dict[str, float]:
        """Logs the steps since the last line; gives the epoch's totals."""
        sums = self.training_log.write(self.step, epoch, num_steps, learning_rate, is_last)
        self.learner.check_health(epoch, self.saver.store.last)
        summed = {name: self.progress.totals.get(name, 0.0) + v for name, v in sums.items()}
        return summed | {"learning_rate": learning_rate}

    def _keep_best(self, epoch: int, accuracies: tuple[float, float]) -> dict[str, Any]:
        """Keeps the weights if they are as good as the best; gives what changes in the progress."""
        attack = self.config.attack
        is_full = epoch > attack.clean_epochs + attack.epsilon_warmup_epochs
        counts = is_full and self.stage.last_epoch == self.config.epochs
        changes = self.progress.judged(accuracies, counts)
        if "best_file" in changes:
            self.saver.keep_best(changes["best_file"], self.learner.network_state())
        return changes
