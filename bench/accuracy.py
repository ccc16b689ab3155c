"""Final accuracies of finished runs as rows, and the table of them in docs/results.md.

    python -m bench.accuracy RUN [RUN ...] [--name digits] [--precisions] [--output FILE.jsonl]

A row holds one accuracy with all that is needed to judge it: data, model, attack, radius, weights,
images, seed, epochs and seconds of training, machine and commit. With `--precisions` the rows are
for the table that compares runs attacked in FP8 with runs attacked in bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import command, origin
from safer_fast.config.untrusted import load_yaml
from safer_fast.runs.layout import METRICS
from safer_fast.runs.loggers.metrics_file import read_metrics

Row = dict[str, Any]
WEIGHTS = ("start", "best", "last")


@command
def main() -> None:
    """Print the rows of the runs and, if asked, append them to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folders")
    parser.add_argument("--name", help="what the table calls these runs; default: data")
    parser.add_argument("--precisions", action="store_true", help="for the table of FP8")
    parser.add_argument(
        "--output", type=Path, help="append one JSON line per accuracy to this file"
    )
    arguments = parser.parse_args()
    rows = [row for run in arguments.runs for row in rows_of(run, arguments.name)]
    if arguments.precisions:
        rows = [
            row | {"what": "float8", "part": "training", "implementation": row["precision"]}
            for row in rows
        ]
    lines = [json.dumps(row) for row in rows]
    print("\n".join(lines))
    if arguments.output:
        with arguments.output.open("a") as file:
            file.writelines(line + "\n" for line in lines)


def rows_of(run: Path, name: str | None = None) -> list[Row]:
    """A row for each final accuracy that was measured when the run ended.

    Raises ValueError for a folder whose run has not ended.
    """
    events = read_metrics(run / METRICS)
    ends = [event for event in events if event["event"] == "end"]
    if not ends:
        raise ValueError(f"{run}: expected a finished run")
    settings = load_yaml((run / "run.yaml").read_text())
    about = events[0]
    machine = {"device": about["device"], "torch": about["torch"]}
    in_float8 = settings["attack"].get("precision") == "fp8"
    facts = {
        "what": "accuracy",
        "implementation": "safer_fast",
        "case": name or Path(settings.get("data", {}).get("path") or "digits").stem,
        "data": about["data"],
        "model": about["model"],
        "dtype": settings["amp"],
        "seed": settings["seed"],
        "epochs": settings["epochs"],
        "training_s": round(ends[0]["time_s"]),
        "norm": settings["attack"]["norm"],
        "precision": "fp8" if in_float8 else settings["amp"],
    }
    measured = ("split", "weights", "attack", "epsilon", "accuracy", "num_images")
    finals = events[: events.index(ends[0])]
    return [
        facts | {key: event[key] for key in measured} | origin(torch.device("cpu")) | machine
        for event in finals
        if event["event"] == "evaluation"
    ]


def accuracy_tables(rows: Sequence[Row]) -> str:
    """Tables by kind of run: a line per seed, a column for each of the weights; means below."""
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        attacks = list(dict.fromkeys(row["attack"] for row in own))
        columns = [name for name in WEIGHTS if any(row["weights"] == name for row in own)]
        seeds = sorted({row["seed"] for row in own})
        found = {(row["seed"], row["weights"], row["attack"]): row["accuracy"] for row in own}
        lines = [
            [str(seed), *(_cell(found, [seed], c, attacks) for c in columns)] for seed in seeds
        ]
        lines.append(["mean", *(_cell(found, seeds, column, attacks) for column in columns)])
        lines.append(["deviation", *(_spread(found, seeds, c, attacks) for c in columns)])
        head = f"| seed | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}\n"
        body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts.append(f"{_caption(own, attacks)}\n\n{head}{body}")
    return "\n".join(parts)


def _cell(found: dict[Any, float], seeds: Iterable[int], weights: str, attacks: list[str]) -> str:
    values = [[found[seed, weights, attack] for seed in seeds] for attack in attacks]
    return " / ".join(f"{statistics.mean(each):.3f}" for each in values)


def _spread(found: dict[Any, float], seeds: list[int], weights: str, attacks: list[str]) -> str:
    """Standard deviations over the seeds."""
    if len(seeds) < 2:
        return "-"
    values = [[found[seed, weights, attack] for seed in seeds] for attack in attacks]
    return " / ".join(f"{statistics.stdev(each):.3f}" for each in values)


def _caption(rows: Sequence[Row], attacks: Sequence[str]) -> str:
    first, times = rows[0], sorted(row["training_s"] for row in rows)
    days = sorted({row["date"][:10] for row in rows})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    attacked = next((row for row in rows if row["epsilon"] > 0), first)
    words = [
        f"{first['case']}: {' / '.join(attacks)} accuracy ({first['norm']},",
        f"epsilon {attacked['epsilon']:.4g}) on the {first['num_images']} images of the",
        f"{first['split']} split; {first['model']}; {first['dtype']}; {first['epochs']} epochs in",
        f"{times[0]} to {times[-1]} s; {first['device']}, torch {first['torch']}; {span}:",
    ]
    return textwrap.fill(" ".join(words), 100)


if __name__ == "__main__":
    main()
