"""One table of several evaluations: threat models, data sets, corruptions."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from safer_fast.config.attack_names import ThreatModel, fits_norm
from safer_fast.config.commands import EvaluateConfig, attacks_of
from safer_fast.config.evaluation_tables import CORRUPTIONS, SEVERITIES, parse_threat_models
from safer_fast.config.messages import printable, shortened
from safer_fast.config.schema import Names, Radius
from safer_fast.data.corrupted import Corruption, check_library
from safer_fast.data.formats.given import WORD, GivenData, giving
from safer_fast.evaluation.run import evaluate_folder
from safer_fast.evaluation.setup import checked_threat, open_data
from safer_fast.evaluation.towers import choose_attacks, with_text
from safer_fast.runs.accuracies import OWN_SPLITS, distinct_names
from safer_fast.runs.folder import load_run
from safer_fast.runtime.files import write_whole
from safer_fast.runtime.terminal import aligned

Row = dict[str, Any]


class DataSet(NamedTuple):
    """Data to evaluate on: a path, None for the run's own split, or data that Python holds.

    name: of the split; None: the usual one.
    """

    path: str | None
    name: str | None = None
    given: GivenData = None


def evaluate_several(
    config: EvaluateConfig, others: Mapping[str, GivenData] | None = None
) -> list[Row]:
    """Evaluate every data set under every threat model, then the corruptions; print one table.

    Each part is stored as if it were evaluated alone, so a stopped evaluation resumes where it was.
    Attacks that were not named are chosen for the norm of each threat model; named ones that are
    not made for it are left out there, with a line.
    others: data sets or paths by name, beside `config.other_data`.
    """
    sets = _data_sets(config, others or {})
    balls = _balls(config)
    _check_beforehand(config, sets, balls)
    rows: list[Row] = []
    forgotten: set[str] = set()
    for place, one in enumerate(sets):
        flag = "--other-data" if place else "data.path"
        for part in balls:
            known = {_key(row) for row in rows}
            with _named(flag), giving(one.given, one.path) as path:
                part = replace(part, path=path)
                found = evaluate_folder(part, None, True, split=one.name, forgotten=forgotten)
            rows += [row for row in found if _key(row) not in known]
    names = CORRUPTIONS if "all" in config.corruptions else tuple(config.corruptions)
    clean = replace(_alone(config), attacks=Names(["clean"]))
    for name in dict.fromkeys(names):
        for severity in SEVERITIES:
            corruption = Corruption(name, severity)
            rows += evaluate_folder(clean, corruption, is_part=True, forgotten=forgotten)
    if _is_first():
        print(table(rows))
        if config.json is not None:
            write_whole(Path(config.json), (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def _data_sets(config: EvaluateConfig, others: Mapping[str, GivenData]) -> list[DataSet]:
    """The data of a run's evaluation first, then all others, each with a name of its own."""
    for given in others:
        _check_name(given)
    own = [] if config.path in (None, WORD) else [config.path]
    paths = [path for path in dict.fromkeys(config.other_data) if path not in own]
    named = [*map(DataSet, [*own, *paths], distinct_names([*own, *paths]))]
    taken = {*OWN_SPLITS, *(one.name for one in named)}
    if wrong := [name for name in others if name in taken]:
        raise ValueError(f"--other-data: expected names of their own, got {wrong[0]!r}")
    for name, data in others.items():
        is_path = isinstance(data, str | Path)
        named.append(DataSet(str(data), name) if is_path else DataSet(None, name, data))
    return named if own else [DataSet(config.path), *named]


def _check_name(name: Any) -> None:
    """Raise ValueError unless the name can stand in a table and in metrics.jsonl."""
    if not isinstance(name, str) or not name.strip() or printable(name) != name:
        got = shortened(repr(name))
        raise ValueError(f"--other-data: expected names that are texts of one line, got {got}")


def _check_beforehand(
    config: EvaluateConfig, sets: Sequence[DataSet], balls: Sequence[EvaluateConfig]
) -> None:
    """Raise ValueError for data, attacks and packages that do not fit, before any attack."""
    if config.corruptions:
        check_library()
    loaded = load_run(Path(config.run), config.weights, "cpu", is_frozen=True)
    loaded = with_text(config, loaded)
    for part in balls:
        checked_threat(part, loaded)
    for one in sets[1:]:
        with _named("--other-data"), giving(one.given, one.path) as path:
            open_data(config, loaded, str(path))


@contextmanager
def _named(flag: str) -> Iterator[None]:
    """Name `flag` in errors on the data."""
    try:
        yield
    except ValueError as error:
        text = str(error.args[0]) if error.args else ""
        if flag == "--other-data" and (found := re.match(r"data(\.path)?(?=[:\[])", text)):
            error.args = (flag + text[found.end() :], *error.args[1:])
        raise


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each data set and a column for each attack and ball, in per cent.

    Corruptions have a line each, the mean over their severities, and one for the mean of all. Of a
    tower without text embeddings the figures are embedding distances.
    """
    plain = [row for row in rows if not row.get("corruption")]
    columns = list(dict.fromkeys(_column(row) for row in plain))
    has_distances = any(row["accuracy"] is None for row in rows)
    lines = [["embedding distance" if has_distances else "accuracy in %", *columns]]
    for split in dict.fromkeys(row["split"] for row in plain):
        found = {_column(row): row for row in plain if row["split"] == split}
        lines.append([printable(split), *(_figure(found.get(column)) for column in columns)])
    means = corruption_means(rows)
    if len(means) > 1:
        means[f"mean of {len(means)} corruptions"] = fmean(means.values())
    empty = [""] * (len(columns) - 1)
    for name, mean in means.items():
        lines.append([name, f"{mean:.4g}" if has_distances else f"{100 * mean:.2f}", *empty])
    return aligned(lines, num_left=1)


def corruption_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean clean accuracy, or distance, of each corruption over its severities, by name."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("corruption"):
            found.setdefault(row["corruption"], []).append(_value(row))
    return {name: fmean(values) for name, values in found.items()}


def _balls(config: EvaluateConfig) -> list[EvaluateConfig]:
    """An evaluation for each threat model, with the attacks that are made for its norm."""
    threats = parse_threat_models(config.threat_models)
    if not threats:
        return [choose_attacks(_alone(config))]
    return [_in_ball(config, threat) for threat in threats]


def _in_ball(config: EvaluateConfig, threat: ThreatModel) -> EvaluateConfig:
    wanted = attacks_of(choose_attacks(replace(config, norm=threat.norm)))
    attacks = [name for name in wanted if fits_norm(name, threat.norm)]
    if (left_out := [name for name in wanted if name not in attacks]) and _is_first():
        print(f"note: {threat}: {', '.join(left_out)} left out, made for linf and l2")
    part = replace(_alone(config), attacks=Names(attacks))
    return replace(part, norm=threat.norm, epsilon=Radius(threat.epsilon))


def _alone(config: EvaluateConfig) -> EvaluateConfig:
    """The settings without the tables."""
    none = Names()
    return replace(config, threat_models=none, other_data=none, corruptions=none, json=None)


def _is_first() -> bool:
    """True in the process that prints, between evaluations."""
    return os.environ.get("RANK", "0") == "0"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["split"], row["attack"], row["norm"], row["epsilon"]


def _column(row: Mapping[str, Any]) -> str:
    if row["norm"] is None:
        return str(row["attack"])
    return f"{row['attack']} {ThreatModel(row['norm'], row['epsilon'])}"


def _value(row: Mapping[str, Any]) -> float:
    """The accuracy, or the embedding distance of a row without one."""
    value = row["accuracy"] if row["accuracy"] is not None else row["embedding_distance"]
    return math.nan if value is None else float(value)


def _figure(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["accuracy"] is None:
        return f"{_value(row):.4g}"
    return f"{'<=' if row.get('upper_bound') else ''}{100 * row['accuracy']:.2f}"
