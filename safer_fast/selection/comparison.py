"""Comparison of criteria: scores by several on one run's model, and rank correlations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.config.checks import check_ball
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import SelectConfig
from safer_fast.config.schema import Config, Names
from safer_fast.runs.layout import RunFolder

if TYPE_CHECKING:
    import torch

    from safer_fast.runs.folder import LoadedRun
    from safer_fast.selection.inputs import ScoredBy

Scores = dict[str, float]


@dataclass(frozen=True)
class CriteriaScores:
    """Scores of the layers by criterion, and the circumstances that they depend on."""

    scores: dict[str, Scores]
    facts: dict[str, Any]


def with_settings_of_run(config: SelectConfig) -> SelectConfig:
    """Take from the run what the comparison was not given: fraction, candidates, rho and radius.

    A run that cannot be read leaves the usual values; loading it says what is wrong.
    """
    own = Config()
    with suppress(ValueError, OSError):
        own = parse_config(["--config", str(RunFolder(Path(config.run)).config)])
    chosen = own.selection
    given: dict[str, Any] = {
        "fraction": chosen.fraction,
        "rho": chosen.rho or own.sam.rho or Config().sam.rho,
        "radius": chosen.radius,
        "from_block": chosen.from_block,
        "candidates": chosen.candidates,
    }
    missing = {name: value for name, value in given.items() if getattr(config, name) is None}
    config = replace(config, **missing)
    names = [f"{name}-{config.radius}" if name == "sharpness" else name for name in config.criteria]
    return replace(config, criteria=Names(list(dict.fromkeys(names))))


def compare_criteria(config: SelectConfig, chosen: str, criteria: Sequence[str]) -> CriteriaScores:
    """Score the layers of a run's model by `chosen` and by all other `criteria`.

    The training images that the seed draws are attacked once for all criteria, in the model's own
    precision. Raise ValueError for a folder that is no run, and for data that cannot be read.
    """
    import torch

    from safer_fast.runs.folder import load_run
    from safer_fast.selection.candidates import candidates
    from safer_fast.selection.scoring import score_layers

    assert config.rho is not None
    assert config.from_block is not None
    started = time.monotonic()
    loaded = load_run(
        Path(config.run),
        config.weights,
        config.device,
        amp=config.amp,
        is_frozen=True,
        savings=("class-token", "stored-bf16"),
    )
    if loaded.is_tower and loaded.model.text is None:
        raise ValueError(
            "RUN: expected a model of classes, whose cross-entropy is scored, got a tower without "
            f"text embeddings in {config.run}; --dry-run of training names the layers it selects"
        )
    threat = loaded.config.attack
    epsilon = float(threat.epsilon if config.epsilon is None else config.epsilon)
    shape = loaded.num_channels, loaded.image_size, loaded.image_size
    check_ball(threat.norm, epsilon, shape=shape, flags=("--epsilon", ""))
    steps = threat.most_steps if config.steps is None else config.steps
    steps = steps if epsilon else 0
    names = _defined(dict.fromkeys([chosen, *criteria]), chosen, steps, epsilon)
    measures = {name: _measure(name, config) for name in names}
    batches = _batches(config, loaded)
    scores = score_layers(
        loaded.model,
        batches,
        list(dict.fromkeys(measures.values())),
        rho=config.rho,
        attack=_attack(loaded, epsilon, steps, config.seed),
        names=candidates(loaded.model, config.from_block, config.candidates),
        arenas=loaded.arenas,
        generator=torch.Generator().manual_seed(config.seed),
    )
    facts = {
        "images": sum(len(labels) for _, labels in batches),
        "attack": f"pgd-{steps}" if steps else "none",
        "norm": threat.norm,
        "epsilon": epsilon,
        "steps": steps,
        "weights": config.weights,
        "amp": "off" if loaded.model.compute_dtype == torch.float32 else "bf16",
        "seed": config.seed,
        "seconds": round(time.monotonic() - started, 1),
    }
    return CriteriaScores({name: scores[measure] for name, measure in measures.items()}, facts)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where all scores of a side are equal."""
    from scipy.stats import spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def rank_correlations(scores: Mapping[str, Scores]) -> dict[str, dict[str, float | None]]:
    """The rank correlation of every criterion with every other, and with itself."""
    columns = {name: list(by_layer.values()) for name, by_layer in scores.items()}
    return {
        name: {other: rank_correlation(column, columns[other]) for other in columns}
        for name, column in columns.items()
    }


def _batches(config: SelectConfig, loaded: LoadedRun) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from safer_fast.data import as_pixels, load_data

    device = loaded.model.mean.device
    data = load_data(
        replace(loaded.config.data, extra_path=None),
        batch_size=loaded.config.batch_size,
        seed=loaded.config.seed,
        device=device,
    )
    loaded.known_data.check(
        data.class_names, data.num_channels, data.image_size, data.validation_rows
    )
    drawn = (batch.to(device) for batch in data.train.probe(config.num_images, config.seed))
    return [(as_pixels(batch.images), batch.labels) for batch in drawn]


def _defined(names: Iterable[str], chosen: str, steps: int, epsilon: float) -> list[str]:
    """The criteria that mean something with so many steps of the attack, and such a radius."""
    from safer_fast.selection.criteria import CRITERIA

    needing = {name for name, row in CRITERIA.items() if row.needs_attack and not steps}
    if chosen in needing:
        wanted = "--steps: expected at least 1" if epsilon else "--epsilon: expected above 0"
        raise ValueError(f"{wanted} for {chosen}, got 0")
    return [name for name in names if name not in needing]


def _measure(name: str, config: SelectConfig) -> ScoredBy:
    from safer_fast.selection.criteria import SHARPNESS
    from safer_fast.selection.inputs import ScoredBy

    assert config.radius is not None
    return SHARPNESS.get(name) or ScoredBy(name, config.radius)


def _attack(loaded: LoadedRun, epsilon: float, steps: int, seed: int) -> Any:
    import torch

    from safer_fast.attacks.pgd import default_step_size, pgd

    if not steps:
        return None
    return partial(
        pgd,
        epsilon=epsilon,
        step_size=default_step_size(epsilon, steps),
        steps=steps,
        norm=loaded.config.attack.norm,
        check_tensors=False,
        generator=torch.Generator(loaded.model.mean.device).manual_seed(seed),
    )
