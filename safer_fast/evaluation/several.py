"""One table of several evaluations: threat models, data sets, corruptions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from safer_fast.config.attack_names import ThreatModel, fits_norm
from safer_fast.config.commands import EvaluateConfig
from safer_fast.config.evaluation_tables import CORRUPTIONS, SEVERITIES, parse_threat_models
from safer_fast.config.messages import printable
from safer_fast.config.schema import Names, Radius
from safer_fast.data.bad_images import BadImages
from safer_fast.data.corrupted import Corruption, check_library
from safer_fast.data.formats import open_splits
from safer_fast.evaluation.run import evaluate_folder
from safer_fast.runtime.files import write_whole
from safer_fast.runtime.terminal import aligned

Row = dict[str, Any]
_OWN_SPLITS = ("test", "validation")


def evaluate_several(config: EvaluateConfig) -> list[Row]:
    """Evaluate every data set under every threat model, then the corruptions; print one table.

    Each part is stored as if it were evaluated alone, so a stopped evaluation resumes where it was.
    Attacks that are not made for the norm of a threat model are left out there, with a line.
    """
    others = list(dict.fromkeys(config.other_data))
    _check_beforehand(others, config.corruptions)
    rows: list[Row] = []
    named = zip(others, distinct_names(others), strict=True)
    for path, split in ((config.path, None), *named):
        for part in _balls(replace(config, path=path)):
            known = {_key(row) for row in rows}
            with _named("data.path" if split is None else "--other-data"):
                found = evaluate_folder(part, is_part=True, split=split)
            rows += [row for row in found if _key(row) not in known]
    names = CORRUPTIONS if "all" in config.corruptions else tuple(config.corruptions)
    clean = replace(_alone(config), attacks=Names(["clean"]))
    for name in dict.fromkeys(names):
        for severity in SEVERITIES:
            rows += evaluate_folder(clean, Corruption(name, severity), is_part=True)
    if _is_first():
        print(table(rows))
        if config.json is not None:
            write_whole(Path(config.json), (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def distinct_names(paths: Sequence[str]) -> list[str]:
    """A name for each path: its last part without the ending, with more of the path where others
    would have the same, or that of a run's own split."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    counts = [1] * len(parts)
    while True:
        names = ["/".join(one[-count:]) for one, count in zip(parts, counts, strict=True)]
        short = [
            place
            for place, name in enumerate(names)
            if (names.count(name) > 1 or name in _OWN_SPLITS) and counts[place] < len(parts[place])
        ]
        if not short:
            return [
                name if names.count(name) == 1 else path
                for name, path in zip(names, paths, strict=True)
            ]
        for place in short:
            counts[place] += 1


def _check_beforehand(paths: Sequence[str], corruptions: Sequence[str]) -> None:
    """Raise ValueError for data and packages that are missing, before anything is attacked."""
    for path in paths:
        open_splits(path, "--other-data", BadImages("skip", lambda _: None))
    if corruptions:
        check_library()


@contextmanager
def _named(flag: str) -> Iterator[None]:
    """Name `flag` in errors on the data."""
    try:
        yield
    except ValueError as error:
        if error.args and str(error.args[0]).startswith("data.path:"):
            error.args = (flag + str(error.args[0]).removeprefix("data.path"), *error.args[1:])
        raise


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each data set and a column for each attack and ball, in per cent.

    Corruptions have a line each, the mean over their severities, and one for the mean of all.
    """
    plain = [row for row in rows if not row.get("corruption")]
    columns = list(dict.fromkeys(_column(row) for row in plain))
    lines = [["accuracy in %", *columns]]
    for split in dict.fromkeys(row["split"] for row in plain):
        found = {_column(row): row for row in plain if row["split"] == split}
        lines.append([printable(split), *(_per_cent(found.get(column)) for column in columns)])
    means = corruption_means(rows)
    empty = [""] * (len(columns) - 1)
    lines += [[name, f"{100 * mean:.2f}", *empty] for name, mean in means.items()]
    if len(means) > 1:
        mean = fmean(means.values())
        lines.append([f"mean of {len(means)} corruptions", f"{100 * mean:.2f}", *empty])
    return aligned(lines, num_left=1)


def corruption_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean clean accuracy of each corruption over its severities, by name."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("corruption"):
            found.setdefault(row["corruption"], []).append(row["accuracy"])
    return {name: fmean(accuracies) for name, accuracies in found.items()}


def _balls(config: EvaluateConfig) -> list[EvaluateConfig]:
    """An evaluation for each threat model, with the attacks that are made for its norm."""
    threats = parse_threat_models(config.threat_models)
    if not threats:
        return [_alone(config)]
    return [_in_ball(config, threat) for threat in threats]


def _in_ball(config: EvaluateConfig, threat: ThreatModel) -> EvaluateConfig:
    attacks = [name for name in config.attacks if fits_norm(name, threat.norm)]
    if (left_out := [name for name in config.attacks if name not in attacks]) and _is_first():
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


def _per_cent(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{'<=' if row.get('upper_bound') else ''}{100 * row['accuracy']:.2f}"
