"""One task of an experiment, in a process of its own: `python -m bench.experiment.worker FILE`.

The file says what to train and what to measure (`Job`); the rows that come of it lie beside it when
all is done. A worker that was ended resumes where it was: the run from its checkpoint, evaluations
at the next batch.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.experiment.tasks import FILES, Row
from bench.measure import origin
from safer_fast import evaluate_run, train_model
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import EvaluateConfig, SelectConfig
from safer_fast.config.schema import Names
from safer_fast.config.untrusted import load_yaml
from safer_fast.runs.folder import load_run
from safer_fast.runs.layout import METRICS
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.select import select

CURVES = ("train_robust_accuracy", "clean_accuracy", "robust_accuracy", "validation_loss")


@dataclass(frozen=True)
class Measure:
    """An evaluation: of these weights, with these attacks, on so many images of a file; 0: all."""

    weights: str
    split: str
    attacks: Sequence[str]
    path: str
    num_images: int
    restarts: int = 1


@dataclass(frozen=True)
class Job:
    """The task of a worker: a training, evaluations of it, selections.

    folder: of the run. flags: of the training that makes it, none where it is there. measures:
    evaluations of it. selects: weights whose layers are scored. about: fields of every row.
    """

    folder: str
    flags: Sequence[str] = field(default_factory=list)
    measures: Sequence[Measure] = field(default_factory=list)
    selects: Sequence[str] = field(default_factory=list)
    num_probe_images: int = 512
    batch_size: int = 256
    about: Mapping[str, Any] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        """Write the job to a file for `read`."""
        file.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, file: Path) -> Job:
        """The job that `write` has written."""
        values = json.loads(file.read_text())
        return cls(**values | {"measures": [Measure(**each) for each in values["measures"]]})


def main() -> None:
    """Do the job; write its rows to a file of the same name that ends in .rows.jsonl."""
    file = Path(sys.argv[1])
    rows = rows_of(Job.read(file))
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(unfinished, file.with_suffix(".rows.jsonl"))


def rows_of(job: Job) -> list[Row]:
    """Train and measure as the job says; return a row for each figure."""
    if job.flags:
        train_model(parse_config([*job.flags, f"--output={job.folder}", "--resume=auto"]))
    origins = origin(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shared = {"what": "experiment", **job.about, **origins, "num_threads": torch.get_num_threads()}
    num_images = int(job.about.get("num_train_images", 0))
    rows = [_training_row(Path(job.folder), num_images)] if job.flags else []
    for weights in job.selects:
        rows.append(_selection_row(job, weights))
    done: list[tuple[Measure, list[Row]]] = []
    for measure in job.measures:
        again = [own for before, own in done if _measures_alike(job, measure, before)]
        if again:
            own = [row | {"weights": measure.weights} for row in again[0]]
        else:
            own = _accuracy_rows(job, measure)
        done.append((measure, own))
        rows += own
    return [shared | row for row in rows]


def _measures_alike(job: Job, first: Measure, second: Measure) -> bool:
    """True if two evaluations differ in the name of the same weights: the best may be the last."""
    if replace(first, weights=second.weights) != second:
        return False
    own, other = (load_file(Path(job.folder) / FILES[each.weights]) for each in (first, second))
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def _training_row(folder: Path, num_images: int) -> Row:
    """Curves, selected layers and time of the run on `num_images` images."""
    events = read_metrics(folder / METRICS)
    epochs = [event for event in events if event["event"] == "epoch"]
    settings = load_yaml((folder / "run.yaml").read_text())
    robust = [epoch["robust_accuracy"] for epoch in epochs]
    # as the run itself judges: the last of the best, robust first
    best = max(epochs, key=lambda e: (e["robust_accuracy"], e["clean_accuracy"], e["epoch"]))
    seconds = [num_images / epoch["images_per_second"] for epoch in epochs]
    num_weights = sum(value.numel() for value in load_run(folder, "last", "cpu").model.parameters())
    return {
        "figure": "training",
        "num_epochs": len(robust),
        "best_epoch": best["epoch"],
        "seconds_per_epoch": round(statistics.median(seconds), 2),
        "seconds": round(events[-1]["time_s"], 1),
        "num_weights": num_weights,
        "attack_steps": settings["attack"]["steps"],
        "steps_by_epoch": [epoch.get("attack_steps") for epoch in epochs],
        "augmentation": settings["data"]["augmentation"],
        "curves": {name: [_rounded(epoch[name]) for epoch in epochs] for name in CURVES},
        "selections": [
            {"epoch": event["epoch"], "selected": event["selected"], "cut": event["cut"]}
            for event in events
            if event["event"] == "selection" and event["criterion"] != "all"
        ],
    }


def _selection_row(job: Job, weights: str) -> Row:
    """The layers that each criterion selects of the weights, and its ten highest scores."""
    output = Path(job.folder) / f"selection-{weights}.json"
    select(
        SelectConfig(
            run=job.folder, weights=weights, num_images=job.num_probe_images, output=str(output)
        )
    )
    content = json.loads(output.read_text())
    criteria = {}
    for name, found in content["criteria"].items():
        ranked = sorted(found["scores"].items(), key=lambda pair: -pair[1])
        top = {layer: float(f"{score:.4g}") for layer, score in ranked[:10]}
        criteria[name] = {"selected": found["selected"], "scores": top}
    correlations = content["rank_correlations"]
    facts = {name: content[name] for name in ("images", "attack", "rho", "seconds")}
    return {"figure": "selection", "criteria": criteria, "rank_correlations": correlations} | facts


def _accuracy_rows(job: Job, measure: Measure) -> list[Row]:
    num_images = measure.num_images or None
    config = EvaluateConfig(
        run=job.folder,
        weights=measure.weights,
        attacks=Names(measure.attacks),
        path=measure.path,
        num_images=num_images,
        batch_size=job.batch_size,
        restarts=measure.restarts,
    )
    assert (Path(job.folder) / FILES[measure.weights]).is_file(), job.folder
    return [
        {
            "figure": "accuracy",
            "weights": measure.weights,
            "split": measure.split,
            "attack": found.attack + (f" x {measure.restarts}" if measure.restarts > 1 else ""),
            "epsilon": found.epsilon,
            "accuracy": found.accuracy,
            "num_images": found.num_images,
            "loss": _rounded(found.loss),
        }
        for found in evaluate_run(config)
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


if __name__ == "__main__":
    main()
