"""The choice of a criterion by short probes of training."""

from __future__ import annotations

from dataclasses import replace

from safer_fast.config.schema import Config
from safer_fast.data import Loader
from safer_fast.selection.probe import Probe, Watched
from safer_fast.selection.scoring import LayerChoice, choose_layers
from safer_fast.training.engine import Engine


def choose_by_probe(
    config: Config, engine: Engine, loader: Loader, epoch: int, watch: Watched = iter
) -> LayerChoice:
    """The layers that are selected before an epoch, by the images that its number draws."""
    probe = Probe(config, loader, config.selection.num_images, epoch, watch)
    choice = choose_layers(
        engine.model,
        engine.arenas,
        probe.batches(engine.runtime.device),
        config.selection,
        sam_rho=config.sam.rho,
        attack=probe.attack,
        seed=config.seed + epoch,
        ranks=engine.ranks,
        watch=watch,
    )
    return replace(choice, selected=engine.with_new(choice.selected))
