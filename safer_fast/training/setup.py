"""Preparation of a run: settings and data are checked, the model is built, the folder is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from safer_fast.config.checks import check_ball
from safer_fast.config.resolution import Resolution
from safer_fast.config.schema import Config
from safer_fast.data import Data, load_data
from safer_fast.evaluation.towers import check_needs_no_classes
from safer_fast.models.build import check_patches
from safer_fast.models.lora import check_adapters
from safer_fast.runs.folder import create_run_folder, save_config
from safer_fast.runs.layout import RunFolder
from safer_fast.runs.lock import RunLock
from safer_fast.runs.loggers import asked_loggers
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runs.progress import RunProgress
from safer_fast.runs.resume import (
    Found,
    check_data,
    check_numerics,
    check_settings,
    facts_of_other_data,
    settings_digest,
)
from safer_fast.runtime.device import prepare_runtime
from safer_fast.runtime.ranks import Ranks
from safer_fast.selection.candidates import candidates, match_layers
from safer_fast.selection.criteria import check_attacked, check_criterion
from safer_fast.training.banner import banner, describe_run
from safer_fast.training.engine import Engine
from safer_fast.training.objectives import check_objective, needs_labels
from safer_fast.training.optimizers import build_optimizer


@dataclass(frozen=True)
class PreparedRun:
    """Parts of a run, as `set_up` makes them; `numerics`: see `numerics_of`."""

    data: Data
    engine: Engine
    folder: Path
    log: RunLog
    progress: RunProgress
    numerics: dict[str, Any]


def set_up(config: Config, ranks: Ranks, found: Found) -> PreparedRun:
    """Check settings and data, build the model, make the run folder, and print the introduction.

    The weights are those of the start, also in a resumed run. found: the checkpoint to resume from,
    if any, and the lock of the folder. Raises ValueError for mistakes of a user, before the run
    folder is made.
    """
    for logger in asked_loggers(config.log):
        logger.check()
    if config.selection.lora_rank:
        check_adapters()
    check_criterion(config.selection.criterion)
    if config.selection.layers is None:
        check_attacked(config.selection.criterion, config.attack)
    check_objective(config)
    ranks.check_same(settings_digest(config), "--config", "settings")
    checkpoint = found.checkpoint
    stored = {} if checkpoint is None else checkpoint.state
    notes = [*found.notes, *(check_settings(stored["config"], config) if stored else [])]
    runtime = prepare_runtime(config.runtime, config.amp, ranks.local_rank)
    data = load_data(
        config.data,
        batch_size=config.batch_size,
        evaluation_batch_size=config.evaluation.batch_size,
        seed=config.seed,
        device=runtime.device,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
        report=tqdm.write if ranks.is_first else _say_nothing,
        needs_labels=needs_labels(config.objective),
    )
    ranks.check_same(data.fingerprint, "--data.path", "images, labels and classes")
    Resolution.of(config).check_full(data.image_size)
    shape = data.num_channels, data.image_size, data.image_size
    check_ball(config.attack.norm, config.attack.epsilon, config.attack.step_size, shape=shape)
    data.bad.report = tqdm.write  # from here on ranks read different images
    resumed_numerics = stored.get("facts")
    resumed = None if checkpoint is None else checkpoint.path.parent.parent
    kept = None if resumed is None else RunFolder(resumed).of_tower
    engine = Engine(config, runtime, data, ranks, resumed_numerics, kept)
    check_fit(config, engine, data)
    if engine.tower.judge is not None:
        for name in config.evaluation.attacks:
            check_needs_no_classes(name, "--evaluation.attacks")
    if checkpoint is None:
        check_patches(engine.model.network, data.image_size)
    numerics = numerics_of(engine, data)
    notes += check_numerics(resumed_numerics, numerics) if resumed_numerics else []
    ranks.check_same_bits(engine.arenas.master, "at the start")
    described = describe_run(config, engine, data)
    described["notes"] += notes
    shown = config.to_dict() | described
    if checkpoint is None:
        folder, progress = make_folder(config, data.name, ranks, found.lock), RunProgress()
        if ranks.is_first:
            engine.tower.save(*RunFolder(folder).of_tower)
        log = RunLog(folder, ranks, None, config.log, shown)
        log.write("run", epoch=0, step=0, **described)
    else:
        assert resumed is not None
        folder, progress = resumed, RunProgress.read(stored["progress"])
        log = RunLog(folder, ranks, progress.metrics_size, config.log, shown)
        if not progress.metrics_size:  # the log was lost
            log.write("run", epoch=0, step=0, **described)
    engine.tower.forget_weights()
    log.say(banner(described))
    return PreparedRun(data, engine, folder, log, progress, numerics)


def check_data_of_finished(folder: Path, config: Config, ranks: Ranks, *, is_given: bool) -> None:
    """Raise ValueError if data that are given, or elsewhere, are not those of a finished run."""
    facts = ranks.share(facts_of_other_data(folder, config, is_given) if ranks.is_first else None)
    if facts is not None:
        data = load_data(
            config.data,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
            report=_say_nothing,
            needs_labels=needs_labels(config.objective),
        )
        check_data(facts, {"data": data.fingerprint, "backend": facts["backend"]})


def check_fit(config: Config, engine: Engine, data: Data) -> None:
    """Raise ValueError for settings that do not fit the model, the data, or the number of ranks."""
    selection, num_ranks = config.selection, engine.ranks.num_ranks
    candidates(engine.model, selection.from_block, selection.candidates)
    if selection.layers is not None:
        match_layers(selection.layers, engine.model.layers)
    build_optimizer(config.optim, engine.arenas.select(list(engine.model.layers)[:1]))
    sizes = {
        "--batch-size": config.batch_size,
        "--evaluation.batch_size": config.evaluation.batch_size or config.batch_size,
        "--selection.num_images": selection.num_images,
    }
    for flag, size in sizes.items():
        if size < num_ranks:
            raise ValueError(
                f"{flag}: expected at least one image for each of {num_ranks} ranks, got {size}"
            )
    if config.attack.loss == "dlr" and data.num_classes < 3:
        raise ValueError(
            f"--attack.loss: expected margin for data of {data.num_classes} classes, got dlr, "
            "which compares three logits"
        )
    if data.train.num_images < num_ranks:
        raise ValueError(
            f"data.path: expected at least one training image for each of {num_ranks} ranks, "
            f"got {data.train.num_images}"
        )


def numerics_of(engine: Engine, data: Data) -> dict[str, Any]:
    """Everything but settings that decides the computed bits, by name, as checkpoints store it."""
    device, model = engine.runtime.device, engine.model
    of_tower = {"num_classes": model.network.num_classes} if engine.objective.is_of_tower else {}
    return of_tower | {
        "data": data.fingerprint,
        "backend": data.train.backend,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ranks": engine.ranks.num_ranks,
        "attention": engine.attention.backend if engine.attention is not None else None,
        "float8": list(engine.float8.names) if engine.float8 is not None else None,
        "float8_rescaled": list(engine.float8.rescaled) if engine.float8 is not None else None,
        "new_layers": engine.new_layers,
        "normalisation": [part.flatten().tolist() for part in (model.mean, model.std)],
    }


def make_folder(config: Config, data_name: str, ranks: Ranks, lock: RunLock | None = None) -> Path:
    """Make the folder of a new run, with its run.yaml, on rank 0; return its path on all ranks."""
    made = None
    if ranks.is_first:
        folder = create_run_folder(config, data_name, lock)
        save_config(config, folder)
        made = str(folder)
    return Path(ranks.share(made))


def _say_nothing(_: str) -> None:
    """Drop a line that rank 0 prints."""
