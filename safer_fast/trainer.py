"""A run in progress: what the loop of train.py calls, in the order in which it calls it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from safer_fast.banner import banner, describe_run, epoch_line
from safer_fast.checkpoint import BEST_WEIGHTS, load_tensors, save_weights
from safer_fast.config import Config
from safer_fast.data import Batch, Loader, Mixing, ahead, as_pixels, load_data
from safer_fast.engine import Engine
from safer_fast.evaluate import Accuracy, ThreatModel, accuracy_table, evaluate
from safer_fast.metrics import MetricsLog
from safer_fast.moments import Waits
from safer_fast.objective import Targets
from safer_fast.optim import AveragedWeights, build_optimizer, set_learning_rate
from safer_fast.report import write_report
from safer_fast.run_folder import create_run_folder, export_model, save_config
from safer_fast.runtime import prepare_runtime
from safer_fast.schedule import Stage, learning_rate_at, radii_at, stage_of
from safer_fast.selection import candidates, choose_layers, match_layers
from safer_fast.step import Step

EVALUATION_SEED_OFFSET = 1_000_003


class Trainer:
    """Model, data, weights and log of one run; a context manager that closes the log.

    Everything a user can get wrong raises ValueError in the constructor, before the run folder is
    made.
    """

    step: Step
    stage: Stage

    def __init__(self, config: Config) -> None:
        self.config = config
        runtime = prepare_runtime(config.runtime, config.amp)
        self.data = load_data(
            config.data,
            batch_size=config.batch_size,
            seed=config.seed,
            device=runtime.device,
            report=tqdm.write,
        )
        self.mixing = Mixing(config.data, self.data.num_classes, config.seed)
        self.engine = Engine(config, runtime, self.data)
        self.runtime, self.model = self.engine.runtime, self.engine.model
        self.arenas = self.engine.arenas
        self.average: AveragedWeights | None = None
        self.epsilon = torch.zeros((), device=self.runtime.device)
        self.step_size = torch.zeros((), device=self.runtime.device)
        self.num_steps = 0
        self.best = (-1.0, -1.0)
        self.accuracies: list[dict[str, Any]] = []
        self._check_settings()
        self.folder = create_run_folder(config, self.data.name)
        save_config(config, self.folder)
        self.log = MetricsLog(self.folder)
        self._introduce()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()

    def begin_epoch(self, epoch: int) -> None:
        """The stage of the epoch is entered, and layers are selected if this is the time."""
        self.stage = stage_of(self.config, epoch)
        if not self.stage.selects_at(epoch, self.config.selection.every_epochs):
            return
        if self.stage.name == "safer" and epoch == self.stage.first_epoch:
            self._start_safer(epoch)
        self.choose(epoch)

    def choose(self, epoch: int) -> None:
        """The step from this epoch on: over all parameters, or over newly selected layers."""
        self.stage = stage_of(self.config, epoch)
        if self.stage.name == "warm-up":
            self.step = self.engine.step_over(None, rho=0.0)
        else:
            self._select(epoch)
        if epoch == self.stage.first_epoch and self.config.optim.ema_decay is not None:
            self.average = AveragedWeights(self.arenas.master, self.config.optim.ema_decay)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images; gives the epoch's training figures."""
        started = time.monotonic()
        totals: dict[str, float] = {}
        num_batches = len(self.data.train)
        self.data.bad.take()  # counted from here on
        self.waits = Waits(self.runtime.device)
        batches = self.waits.watch(ahead(self.data.train.epoch(epoch), self.runtime.device))
        label = f"epoch {epoch}/{self.config.epochs} {self.stage.name}"
        for index, batch in enumerate(
            tqdm(batches, total=num_batches, desc=label, leave=False, disable=None)
        ):
            learning_rate = self.take_step(epoch, index, num_batches, batch)
            if (
                self.num_steps % self.config.runtime.log_every_steps == 0
                or index + 1 == num_batches
            ):
                self._log_step(epoch, learning_rate, totals)
        epsilon, _ = radii_at(self.config.attack, epoch)
        elapsed = time.monotonic() - started
        return {
            "train_loss": totals["loss"] / max(totals["images"], 1),
            "train_robust_accuracy": totals["correct"] / max(totals["images"], 1),
            "learning_rate": learning_rate,
            "epsilon": epsilon,
            "images_per_second": totals["images"] / elapsed,
            "data_wait_fraction": totals["waited"] / elapsed,
            "peak_memory_mib": self.runtime.peak_memory_mib(),
            "skipped_steps": int(totals["skipped"]),
            "skipped_images": self.data.bad.take(),
        }

    def take_step(self, epoch: int, index: int, num_batches: int, batch: Batch) -> float:
        """Step `index` (from 0) of an epoch, on a batch on the device; gives its learning rate."""
        learning_rate = self._schedule(epoch, index, num_batches)
        batch = self.mixing(batch, epoch, index)
        targets = Targets(batch.labels, batch.weights())
        self.step(batch.images, targets, self.epsilon, self.step_size)
        if self.average is not None:
            self.average.update(self.arenas.master)
        self.num_steps += 1
        return learning_rate

    def end_epoch(self, epoch: int, figures: dict[str, float]) -> None:
        """Evaluates on the validation split when it is time, logs the epoch, keeps the best."""
        every = self.config.evaluation.every_epochs
        accuracies: dict[str, float | None] = {"clean_accuracy": None, "robust_accuracy": None}
        if epoch % every == 0 or epoch == self.config.epochs:
            attack = f"pgd-{self.config.evaluation.steps}"
            limit = self.config.evaluation.max_images
            clean, robust = self._evaluate(
                self.data.validation, ["clean", attack], self._source(), limit
            )
            accuracies = {"clean_accuracy": clean.accuracy, "robust_accuracy": robust.accuracy}
            if (robust.accuracy, clean.accuracy) >= self.best:
                self.best = (robust.accuracy, clean.accuracy)
                save_weights(self._weights(), self.folder / BEST_WEIGHTS)
        self.log.write("epoch", epoch=epoch, step=self.num_steps, **figures, **accuracies)
        tqdm.write(epoch_line(epoch, self.config.epochs, self.stage.name, figures, accuracies))

    def finish(self) -> Path:
        """Final figures of the best and last weights, the exported model, and the report."""
        epoch = self.config.epochs
        best = load_tensors(self.folder / BEST_WEIGHTS)
        self._evaluate_finally("best", epoch, self.arenas.vector_of(best))
        self._evaluate_finally("last", epoch, self._source())
        export_model(
            self.model,
            self._weights(),
            self.folder,
            config=self.config,
            data=self.data,
            accuracies=self.accuracies,
        )
        self.log.write("end", epoch=epoch, step=self.num_steps)
        report = write_report([self.folder])
        tqdm.write(accuracy_table(self.accuracies))
        tqdm.write(f"run folder: {self.folder}\nreport: {report}")
        return self.folder

    def _check_settings(self) -> None:
        """Raises ValueError for settings that fit no model, or not this one."""
        config = self.config.selection
        candidates(self.model, config.from_block)
        if config.layers is not None:
            match_layers(config.layers, self.model.layers)
        build_optimizer(self.config.optim, self.arenas.select(list(self.model.layers)[:1]))

    def _introduce(self) -> None:
        facts = describe_run(self.config, self.engine, self.data)
        self.log.write("run", epoch=0, step=0, **facts)
        tqdm.write(banner(facts))

    def _start_safer(self, epoch: int) -> None:
        """The weights that SAFER starts from are measured; a new average starts with them."""
        self.average = None
        self._evaluate_finally("start", epoch - 1, self.arenas.master)

    def _select(self, epoch: int) -> None:
        config = self.config.selection
        batches = [
            (as_pixels(batch.images), batch.labels)
            for batch in (
                batch.to(self.runtime.device)
                for batch in self.data.train.probe(config.num_images, epoch)
            )
        ]
        choice = choose_layers(
            self.model,
            self.arenas,
            batches,
            config,
            sam_rho=self.config.sam.rho,
            attack=self.engine.probe_attack,
            seed=self.config.seed + epoch,
        )
        self.step = self.engine.step_over(
            choice.selected if config.criterion != "all" else None, self.config.sam.rho
        )
        self.log.write(
            "selection",
            epoch=epoch,
            step=self.num_steps,
            criterion=choice.criterion,
            scores=choice.scores,
            selected=choice.selected,
            cut=self.step.cut,
        )
        shown = ", ".join(choice.selected[:6]) + (", ..." if len(choice.selected) > 6 else "")
        tqdm.write(f"selected by {choice.criterion}: {shown} (suffix from block {self.step.cut})")

    def _schedule(self, epoch: int, index: int, num_batches: int) -> float:
        """Sets epsilon, step size and learning rate of the next step."""
        stage = self.stage
        epsilon, step_size = radii_at(self.config.attack, epoch - 1 + index / num_batches)
        self.step.attack.steps = self.config.attack.steps if epsilon > 0 else 0
        self.epsilon.fill_(epsilon)
        self.step_size.fill_(step_size)
        done = (epoch - stage.first_epoch) * num_batches + index
        total = stage.num_epochs * num_batches
        rate = learning_rate_at(self.config.optim, stage.learning_rate, done, total, num_batches)
        set_learning_rate(self.step.optimizer, rate)
        return rate

    def _log_step(self, epoch: int, learning_rate: float, totals: dict[str, float]) -> None:
        """The only place of the training loop that waits for the device."""
        sums = self.step.sums.take()
        for name, value in (sums | {"waited": self.waits.take()}).items():
            totals[name] = totals.get(name, 0.0) + value
        num_images = max(sums["images"], 1)  # none where all of them were left out
        self.log.write(
            "step",
            epoch=epoch,
            step=self.num_steps,
            loss=sums["loss"] / num_images,
            loss_rise=sums["loss_rise"] / num_images,
            robust_accuracy=sums["correct"] / num_images,
            skipped_steps=int(sums["skipped"]),
            learning_rate=learning_rate,
        )
        limit = self.config.runtime.max_skipped_steps
        if self.step.most_skipped_in_a_row() >= limit:
            raise FloatingPointError(
                f"runtime.max_skipped_steps: the loss or its gradient was not finite in {limit} "
                f"steps in a row, at epoch {epoch}; lower the learning rate or clip the gradient"
            )

    def _evaluate(
        self, loader: Loader, attacks: list[str], source: Tensor, limit: int | None = None
    ) -> list[Accuracy]:
        """Accuracies of the weights in `source`; the network reads the masters again afterwards."""
        threat = ThreatModel(self.config.attack.norm, float(self.config.attack.epsilon))
        self.arenas.load_compute(source)
        results = evaluate(
            self.model,
            loader.epoch(1),
            attacks,
            threat,
            seed=self.config.seed + EVALUATION_SEED_OFFSET,
            max_images=limit,
            micro_batch=self.engine.evaluation_batch,
        )
        self.arenas.load_compute()
        return results

    def _evaluate_finally(self, weights: str, epoch: int, source: Tensor) -> None:
        """Logs the final figures of the weights in `source`, on the test split if there is one."""
        loader = self.data.test or self.data.validation
        split = "test" if self.data.test is not None else "validation"
        for result in self._evaluate(loader, self.config.evaluation.attacks, source):
            values = {"split": split, "weights": weights, **vars(result)}
            self.accuracies.append(values)
            self.log.write("evaluation", epoch=epoch, step=self.num_steps, **values)

    def _source(self) -> Tensor:
        return self.arenas.master if self.average is None else self.average.average

    def _weights(self) -> dict[str, Tensor]:
        return self.arenas.state_dict(self._source()) | dict(self.model.network.named_buffers())
