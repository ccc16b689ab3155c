"""Selection of the layers that a run trains, by probes of its training images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from safer_fast.attacks.pgd import cross_entropy
from safer_fast.config.schema import Config
from safer_fast.data import Data, Loader
from safer_fast.models.families import STEM
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runs.progress import ProgressChanges
from safer_fast.runtime.seeds import derive_seed
from safer_fast.runtime.signals import Stops
from safer_fast.selection.probe import Probe, Watched
from safer_fast.selection.scoring import LayerChoice, choose_layers
from safer_fast.training.engine import Engine
from safer_fast.training.learner import Learner
from safer_fast.training.schedule import Stage

NUM_SHOWN = 6
"""Layers that a line names."""


class LayerSelector:
    """Selects layers before an epoch, makes the learner train them, and logs the choice."""

    def __init__(
        self, config: Config, learner: Learner, data: Data, log: RunLog, stops: Stops
    ) -> None:
        self.config, self.learner, self.data = config, learner, data
        self.log, self.stops = log, stops

    def takes_all(self, stage: Stage) -> bool:
        """Return true if the stage trains every parameter."""
        selection = self.config.selection
        return stage.name == "warm-up" or (selection.takes_all and not selection.lora_rank)

    def select(self, stage: Stage, epoch: int, num_steps: int) -> None:
        """Train the layers that are selected now; num_steps: steps taken so far."""
        engine, learner = self.learner.engine, self.learner
        with engine.folded():
            choice = choose_by_probe(self.config, engine, self.data.train, epoch, self._watched)
        selected = None if self.takes_all(stage) else choice.selected
        learner.train_layers(selected, stage, derive_seed(self.config.seed, "factors", epoch))
        self.log.write(
            "selection",
            epoch=epoch,
            step=num_steps,
            criterion=choice.criterion,
            scores=choice.scores,
            selected=choice.selected,
            cut=learner.step.cut,
        )
        more = ", ..." if len(choice.selected) > NUM_SHOWN else ""
        shown = ", ".join(choice.selected[:NUM_SHOWN]) + more
        cut = learner.step.cut
        suffix = "no frozen prefix" if cut == STEM else f"suffix from block {cut}"
        self.log.say(f"selected by {choice.criterion}: {shown} ({suffix})")

    def changes(self, stage: Stage, moved: list[str]) -> ProgressChanges:
        """Changes of progress by a selection; `moved`: parameters that were trained before."""
        arenas, layers = self.learner.arenas, self.learner.engine.model.layers
        selected = None if self.takes_all(stage) else self.learner.step.selection.names
        names = set(arenas.places)
        if selected is not None:
            names = {name for layer in selected for name in layers[layer]}
        new = [name for name in arenas.places if name in names and name not in moved]
        return {"selected": selected, "moved": [*moved, *new]}

    def _watched(self, values: Iterable[Any]) -> Iterator[Any]:
        """Pass values on, with a progress bar; a signal stops the run in between."""
        return iter(self.log.bar(self.stops.watch(values), None, "scoring layers"))


def choose_by_probe(
    config: Config, engine: Engine, loader: Loader, epoch: int, watch: Watched = iter
) -> LayerChoice:
    """Choose the layers to train from an epoch on, by images that the epoch's number draws."""
    tower = engine.tower
    loss = engine.objective.attack_loss.function if tower.teacher is not None else cross_entropy
    probe = Probe(config, loader, epoch, watch, loss=loss, labels=tower.fixed_labels)
    choice = choose_layers(engine.model, engine.arenas, probe, engine.ranks)
    return replace(choice, selected=engine.with_new(choice.selected))
