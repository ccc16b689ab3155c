"""Inputs of an evaluation, loaded and checked: models, ball, data and stored outcomes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safer_fast.attacks.autoattack import check_suits
from safer_fast.attacks.named import ThreatModel
from safer_fast.config.attack_names import LIBRARY_ATTACKS, fits_norm, has_restarts
from safer_fast.config.checks import check_ball
from safer_fast.config.commands import EvaluateConfig, attacks_of
from safer_fast.config.schema import DataConfig
from safer_fast.data import Loader, load_evaluation_data, load_own_split
from safer_fast.data.bad_images import BadImages
from safer_fast.data.corrupted import Corruption
from safer_fast.data.formats import MOST_UNNAMED_CLASSES, SkippedFiles, Source
from safer_fast.data.load import open_evaluation_data
from safer_fast.evaluation.store import Store, file_digest
from safer_fast.evaluation.towers import facts_of_judge, find_judge, with_text
from safer_fast.models.teacher import Teacher
from safer_fast.models.weights_file import MODEL_CONFIG
from safer_fast.runs.folder import LoadedRun, load_run
from safer_fast.runtime.files import read_json
from safer_fast.runtime.ranks import Ranks


@dataclass(frozen=True)
class EvaluationSetup:
    """Inputs of an evaluation.

    model: the run whose predictions count. attacked: the run that attacks see, the same one but for
    a transfer. stores: stored outcomes of each attack, of clean images first. judge: the original
    network that embeddings are compared with, of a tower that classifies nothing.
    """

    model: LoadedRun
    attacked: LoadedRun
    threat: ThreatModel
    split: str
    loader: Loader
    stores: dict[str, Store]
    judge: Teacher | None = None


def set_up_evaluation(
    config: EvaluateConfig,
    ranks: Ranks,
    corruption: Corruption | None = None,
    forgotten: set[str] | None = None,
) -> EvaluationSetup:
    """Load all inputs; raise ValueError, one line, for those that do not fit together.

    forgotten: keys of stores that this command has emptied already, for `--fresh`; grows.
    """
    # the run that is loaded last decides on process-wide settings
    source = None if config.source is None else _load_source(config, config.source, ranks)
    model = load_run(
        Path(config.run),
        config.weights,
        config.device,
        ranks.local_rank,
        amp=config.amp,
        is_frozen=True,
    )
    model = with_text(config, model)
    if source is not None and source.is_tower:
        source = with_text(config, source)
    judge = find_judge(config, model)
    threat = checked_threat(config, model)
    if source is not None:
        _check_source(source, model)
    split, loader = _evaluation_data(config, model, ranks, corruption)
    ranks.check_same(loader.digest, "--data.path", "images and labels")
    stores = _stores(config, model, source, threat, ranks, judge)
    _load(stores, config.fresh, set() if forgotten is None else forgotten, ranks)
    return EvaluationSetup(model, source or model, threat, split, loader, stores, judge)


def checked_threat(config: EvaluateConfig, model: LoadedRun) -> ThreatModel:
    """The ball of the settings; raise ValueError for attacks that do not suit it or the model."""
    threat = _threat(config, model)
    for name in attacks_of(config):
        if not fits_norm(name, threat.norm):
            raise ValueError(
                f"--attacks: expected attacks for {threat.norm}, {', '.join(LIBRARY_ATTACKS)}, "
                f"got {name}"
            )
        check_suits(name, threat.norm, len(model.class_names), model.image_size)
    return threat


def open_data(config: EvaluateConfig, loaded: LoadedRun, path: str) -> Source:
    """Open data that are evaluated in place of the run's own; raise ValueError if they do not fit.

    Broken images are passed over here: they are told where they are read.
    """
    return open_evaluation_data(
        path,
        _data_settings(config, loaded),
        BadImages("skip", lambda _: None),
        SkippedFiles(),
        num_classes=_num_labels(loaded),
        num_channels=loaded.num_channels,
        class_names=_names_to_match(loaded),
        needs_labels=loaded.needs_labels,
    )


def _data_settings(config: EvaluateConfig, loaded: LoadedRun) -> DataConfig:
    """The run's settings of data, with the columns that are given."""
    columns = {name: getattr(config, name) for name in ("image_column", "label_column")}
    given = {name: column for name, column in columns.items() if column is not None}
    return replace(loaded.config.data, **given)


def _load_source(config: EvaluateConfig, folder: str, ranks: Ranks) -> LoadedRun:
    try:
        return load_run(
            Path(folder),
            config.source_weights,
            config.device,
            ranks.local_rank,
            amp=config.amp,
            is_frozen=True,
        )
    except ValueError as error:
        text = str(error)
        if text.startswith("--weights: "):
            raise ValueError(f"--source-{text.removeprefix('--')}") from None
        raise ValueError(f"--source: {text.removeprefix('RUN: ')}") from None


def _threat(config: EvaluateConfig, model: LoadedRun) -> ThreatModel:
    """The ball of the settings; by default that of the run."""
    own = model.config.attack
    norm = config.norm or own.norm
    if config.epsilon is None and norm != own.norm:
        raise ValueError(
            f"--epsilon: expected a radius for {norm}, got none: the run's is one for {own.norm}"
        )
    epsilon = float(own.epsilon if config.epsilon is None else config.epsilon)
    shape = model.num_channels, model.image_size, model.image_size
    check_ball(norm, epsilon, shape=shape, flags=("--epsilon", ""))
    return ThreatModel(norm, epsilon)


def _check_source(source: LoadedRun, model: LoadedRun) -> None:
    """Raise ValueError unless both models take the same images for the same classes."""
    folder = source.weights.parent
    if source.class_names != model.class_names:
        raise ValueError(f"--source: expected a model of the same classes as RUN, got {folder}")
    mine, others = ((run.num_channels, run.image_size) for run in (model, source))
    if mine != others:
        raise ValueError(
            f"--source: expected a model for {mine[0]}x{mine[1]}x{mine[1]} images like RUN, got "
            f"one for {others[0]}x{others[1]}x{others[1]}"
        )


def _evaluation_data(
    config: EvaluateConfig, loaded: LoadedRun, ranks: Ranks, corruption: Corruption | None
) -> tuple[str, Loader]:
    """The name of the split and its loader: the data given, else the run's own."""
    suffix = "" if corruption is None else f", {corruption}"
    settings = loaded.config
    parts: dict[str, Any] = {"rank": ranks.rank, "num_ranks": ranks.num_ranks}
    parts |= {"device": loaded.model.mean.device, "corruption": corruption}
    parts["needs_labels"] = loaded.needs_labels
    if config.path is not None:
        data = load_evaluation_data(
            config.path,
            _data_settings(config, loaded),
            batch_size=config.batch_size,
            num_classes=_num_labels(loaded),
            num_channels=loaded.num_channels,
            image_size=loaded.image_size,
            class_names=_names_to_match(loaded),
            **parts,
        )
        return Path(config.path).stem + suffix, data
    parts |= {"seed": settings.seed, "known": loaded.known_data}
    name, own = load_own_split(settings.data, batch_size=config.batch_size, **parts)
    return name + suffix, own


def _num_labels(loaded: LoadedRun) -> int:
    """Number of classes that labels are of; any where nothing is classified."""
    return len(loaded.class_names) if loaded.needs_labels else MOST_UNNAMED_CLASSES


def _names_to_match(loaded: LoadedRun) -> list[str] | None:
    """Names that those of other data are matched with; None where classes have none."""
    if not loaded.is_tower:
        return loaded.class_names
    head = loaded.model.text
    return None if head is None else head.class_names


def _stores(
    config: EvaluateConfig,
    model: LoadedRun,
    source: LoadedRun | None,
    threat: ThreatModel,
    ranks: Ranks,
    judge: Teacher | None,
) -> dict[str, Store]:
    """Places for outcomes of each attack by all ranks, of clean images first."""
    of_model = {"judge": _facts_of(model) | facts_of_judge(model, judge)}
    of_source = None if source is None else _facts_of(source)
    attacked = {**of_model, **asdict(threat), "source": of_source}
    stores = {}
    for name in dict.fromkeys(["clean", *attacks_of(config)]):
        facts: dict[str, Any] = {**(of_model if name == "clean" else attacked), "attack": name}
        facts["restarts"] = num_restarts(name, config)
        if name not in ("clean", "fgsm"):
            facts["seed"] = config.seed
        stores[name] = Store(Path(config.run), facts, ranks.rank)
    return stores


def _load(stores: dict[str, Store], is_fresh: bool, forgotten: set[str], ranks: Ranks) -> None:
    """Read what is stored; with `is_fresh` forget it first, once in a command."""
    if is_fresh:
        for store in stores.values():
            if ranks.is_first and store.key not in forgotten:
                store.forget()
            forgotten.add(store.key)
        ranks.share(None)
    for store in stores.values():
        store.load()
    ranks.share(None)


def _facts_of(loaded: LoadedRun) -> dict[str, Any]:
    """Everything that decides the logits of an image."""
    model_config = loaded.weights.parent / MODEL_CONFIG
    return {
        "weights": file_digest(loaded.weights),
        "model": vars(loaded.config.model) | {"pretrained": None, "checkpoint": None},
        "timm": read_json(model_config).get("pretrained_cfg"),
        "amp": loaded.config.amp,
        "image_size": loaded.image_size,
    }


def num_restarts(name: str, config: EvaluateConfig) -> int:
    """Number of random starts of the attack; 1 for one that starts at the image."""
    return config.restarts if has_restarts(name) else 1
