"""Evaluation of a run, as Python and the command call it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safer_fast.config.checks import check_evaluation
from safer_fast.config.commands import DATA_FIELDS, EvaluateConfig
from safer_fast.config.conversion import converted
from safer_fast.config.doors import door
from safer_fast.config.evaluation_tables import check_tables, is_table
from safer_fast.config.messages import shortened
from safer_fast.config.settings.types import Names
from safer_fast.data.formats.given import giving
from safer_fast.evaluation.accuracy import Accuracy
from safer_fast.evaluation.run import evaluate_folder
from safer_fast.evaluation.several import evaluate_several
from safer_fast.evaluation.towers import choose_attacks


@dataclass(frozen=True)
class RunAccuracy(Accuracy):
    """An accuracy with the norm of its ball, None for clean images, and the name of its data."""

    norm: str | None = None
    split: str = ""


@door(DATA_FIELDS)
def evaluate_run(
    config: EvaluateConfig | str | Path, *, data: Any = None, **settings: Any
) -> list[RunAccuracy]:
    """Evaluate a run folder; print the figures and append them to its metrics.jsonl.

    An image is right under an attack if it is classified correctly without it and under it. Figures
    that were measured before are not measured again. Under torchrun the processes share the images.
    SIGINT and SIGTERM end it with SystemExit. Raises ValueError for a folder that is no run and for
    data and settings that do not fit its model.

    >>> clean, robust = evaluate_run(RUN, attacks="clean,pgd-5", num_images=50)
    >>> 0 <= robust.accuracy <= clean.accuracy <= 1, robust.num_images
    (True, 50)

    Args:
        config: the run folder, or all settings.
        data: images in place of the run's test split, as `train_model` takes them; of several
            splits test, else validation.
        settings: fields of `EvaluateConfig`, beside a run folder. `other_data` may be a dictionary
            of data sets and paths by name, `{"v2": (images, labels), "sketch": "sketch.npz"}`.
    """
    if isinstance(config, str | Path):
        config = EvaluateConfig(run=str(config), **settings)
    elif settings:
        raise ValueError(f"expected settings beside a run folder, got {min(settings)} beside all")
    given: Any = config
    if not isinstance(given, EvaluateConfig):
        got = shortened(repr(given))
        raise ValueError(f"config: expected a run folder or EvaluateConfig, got {got}")
    others: Any = config.other_data
    if isinstance(others, Mapping):
        config = replace(config, other_data=Names())
    elif not (
        _is_path(others) or (isinstance(others, list | tuple) and all(map(_is_path, others)))
    ):
        raise ValueError(
            "--other-data: expected paths, or data sets and paths by name in a dictionary, got "
            f"{shortened(repr(others))}"
        )
    config = converted(config)
    check_evaluation(config, data is not None)
    check_tables(config)
    with giving(data, config.path) as path:
        config.path = path
        named = others if isinstance(others, Mapping) else {}
        if named or is_table(config):
            rows = evaluate_several(config, named)
        else:
            rows = evaluate_folder(choose_attacks(config))
    names = [field.name for field in fields(RunAccuracy)]
    found = [{name: row[name] for name in names if name in row} for row in rows]
    for row in found:
        row["accuracy"] = math.nan if row["accuracy"] is None else row["accuracy"]
    return [RunAccuracy(**row) for row in found]


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path)
