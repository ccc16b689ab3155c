"""Judges of a tower in an evaluation: text embeddings of classes, or the frozen original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safer_fast.attacks.named import LOSSES
from safer_fast.attacks.pgd import cross_entropy
from safer_fast.config.attack_names import facts_of, fits_norm
from safer_fast.config.commands import EvaluateConfig, attacks_of
from safer_fast.config.messages import shortened
from safer_fast.config.schema import Names
from safer_fast.evaluation.store import file_digest
from safer_fast.models.teacher import Teacher, load_original
from safer_fast.models.text_head import read_text_head
from safer_fast.runs.facts import KEY
from safer_fast.runs.folder import LoadedRun, load_run, read_settings
from safer_fast.runs.layout import RunFolder
from safer_fast.runtime.files import read_json

FLAG = "--text-embeddings"
NONE = "none"
"""In place of a file: embeddings are compared with those of the original network."""


def choose_attacks(config: EvaluateConfig) -> EvaluateConfig:
    """The settings with attacks; those that were not named depend on the run and the norm.

    Raises ValueError naming a damaged file of the run.
    """
    if config.attacks is not None:
        return config
    names = ["fgsm", "pgd-20"]
    if gives_distances(config):
        own = read_settings(Path(config.run)).evaluation.attacks
        names = [name for name in own if _raises_distances(name)] or ["pgd-20"]
    elif config.norm == "l1":
        names = ["apgd-ce"]
    return replace(config, attacks=Names(["clean", *names]))


def gives_distances(config: EvaluateConfig) -> bool:
    """True for a tower whose embeddings are compared with the original's, as it has no texts."""
    files = RunFolder(Path(config.run))
    if not files.model_config.is_file() or not files.config.is_file():
        return False  # no run: the message is that of loading it
    facts = read_json(files.model_config).get(KEY)
    is_tower = isinstance(facts, dict) and facts.get("tower") is True
    has_text = config.text_embeddings is None and files.text_embeddings.is_file()
    return is_tower and not has_text and config.text_embeddings in (None, NONE)


def with_text(config: EvaluateConfig, loaded: LoadedRun) -> LoadedRun:
    """The run with the zero-shot head that the settings ask for, if it is a tower.

    Raises ValueError, one line, for a file that does not fit, and for a run that is no tower.
    """
    file, model = config.text_embeddings, loaded.model
    if file is None:
        return loaded
    if not loaded.is_tower:
        raise ValueError(
            f"{FLAG}: expected a run of a tower, which gives embeddings, got {shortened(file)} for "
            "a classifier"
        )
    if file == NONE:
        model.text = None
        return loaded
    head = read_text_head(file, loaded.config.objective.temperature, FLAG)
    head.check_width(model.width, FLAG)
    names = loaded.class_names
    if config.path is None:
        head = head.for_classes(names, FLAG)
    else:  # data with names of classes are matched by them, others by the order of rows
        names = head.class_names or [str(number) for number in range(head.num_classes)]
    model.text = head.to(model.mean.device)
    return replace(loaded, class_names=list(names))


def find_judge(config: EvaluateConfig, loaded: LoadedRun) -> Teacher | None:
    """The frozen original that a tower without a zero-shot head is compared with; None for others.

    Raises ValueError, one line, for a run that has not kept it, and for attacks that need classes.
    """
    if not loaded.is_tower or loaded.model.text is not None:
        return None
    folder = Path(config.run)
    if not RunFolder(folder).teacher.is_file():
        raise ValueError(
            f"{FLAG}: expected a file, as {folder} has no weights of the original network to "
            "compare with, got none"
        )
    for name in attacks_of(config):
        check_needs_no_classes(name, "--attacks")
        if config.norm is not None and not fits_norm(name, config.norm):
            raise ValueError(
                f"--norm: expected linf or l2 for {name} of a tower without text embeddings, got "
                f"{config.norm}"
            )
    if config.source is not None:
        raise ValueError(f"--source: expected none without text embeddings, got {config.source}")
    savings = loaded.config.runtime.exact_savings
    again = load_run(
        folder,
        config.weights,
        config.device,
        loaded.runtime.device.index or 0,
        amp=config.amp,
        savings=savings,
    )
    again.model.text = None
    load_original(again.model, RunFolder(folder).teacher)
    judge = Teacher(again.model, savings)
    judge.forget_weights()
    return judge


def check_needs_no_classes(name: str, flag: str) -> None:
    """Raise ValueError naming `flag` unless the attack is clean or a PGD from a random start."""
    if name != "clean" and not _raises_distances(name):
        raise ValueError(
            f"{flag}: expected clean or pgd-K for a tower without text embeddings, got {name}"
        )


def _raises_distances(name: str) -> bool:
    """True for a PGD from a random start, which can raise a distance in place of its loss."""
    facts = facts_of(name)
    return facts is not None and LOSSES.get(facts.loss) is cross_entropy and facts.is_random


def facts_of_judge(loaded: LoadedRun, judge: Teacher | None) -> dict[str, Any]:
    """Facts that decide outcomes beside model and attack; empty for a classifier."""
    if judge is not None:
        return {"teacher": file_digest(RunFolder(loaded.weights.parent).teacher)}
    head = loaded.model.text
    if head is None:
        return {}
    return {"text": head.digest(), "temperature": head.temperature}


def as_distances(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose losses are embedding distances, without accuracies."""
    none = dict.fromkeys(("accuracy", "start_accuracy"))
    return [
        {**row, **none, "per_class_accuracy": [], "embedding_distance": row["loss"]} for row in rows
    ]
