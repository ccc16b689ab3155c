"""Jobs of workers by task, and the tasks that are done by their rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bench.experiment.arms import STEPS_ARMS, Scale
from bench.experiment.tasks import (
    FILES,
    ID_FIELDS,
    PEAK,
    STARTS,
    Results,
    Row,
    Task,
    digest,
    file_digest,
)
from bench.experiment.worker import Job, Measure


@dataclass
class Jobs:
    """The jobs of an experiment whose files lie in `folder`, and their results.

    data: files of training, validation and test images.
    """

    scale: Scale
    folder: Path
    data: Mapping[str, Path]
    results: Results
    _digests: dict[Path, str] = field(default_factory=dict)

    def file(self, task: Task) -> Path:
        """Where the task's job is written; its log and rows lie beside it."""
        return self.folder / f"{task.name}.json"

    def is_ready(self, task: Task) -> bool:
        """True if the weights that the task starts from are there."""
        if task.kind == "start":
            return True
        start_is_there = self.is_done(Task("start", task.model))
        if task.kind in ("arm", "search"):
            return start_is_there and (task.start == PEAK or self._has_late_start(task.model))
        needed = _run_of(task)
        return start_is_there and self.is_done(needed) and self._weights_are_there(task)

    def is_done(self, task: Task) -> bool:
        """True if the task's rows are among the results, or lie in its folder."""
        if task.kind == "start":
            run = self._run(task)
            if not all((run / name).is_file() for name in FILES.values()):
                return False
        elif not self.is_done(Task("start", task.model)):
            return False
        return self.collect(task) or self.results.has(self.about(task))

    def is_settled(self, task: Task, tasks: Iterable[Task]) -> bool:
        """True if the task is done and none of `tasks` waits for weights of it that were lost."""
        if not self.is_done(task):
            return False
        waiting = (t for t in tasks if t.kind == "autoattack" and _run_of(t) == task)
        return self._weights_are_there(task) or all(map(self.is_done, waiting))

    def collect(self, task: Task) -> bool:
        """Add the rows that the task's worker left to the results; True if there were any."""
        file = self.file(task).with_suffix(".rows.jsonl")
        if not file.is_file():
            return False
        rows: list[Row] = [json.loads(line) for line in file.read_text().splitlines()]
        about = self.about(task)
        if task.kind == "start":  # which its weights only say when it has ended
            rows = [row | self._start_ids(task.model) for row in rows]
        if not rows or any(rows[0].get(name) != value for name, value in about.items()):
            return False
        self.results.add(rows)
        return True

    def job(self, task: Task) -> Job:
        """The job of the task's worker."""
        scale, images = self.scale, self.scale.test_images
        about = self.about(task)
        run = str(self._run(task))
        shared: dict[str, Any] = {"about": about, "batch_size": scale.evaluation_batch_size}
        if task.kind == "select":
            return Job(run, selects=[STARTS[task.start]], **shared)
        if task.kind == "autoattack":
            weights = [STARTS[task.start]] if task.arm == "start" else ["best"]
            test = (str(self.data["test"]), scale.autoattack_images)
            measures = [Measure(each, "test", ["autoattack"], *test) for each in weights]
            if scale.compared and task.arm != "start":
                measures = [Measure(each, "test", ["autoattack"], *test) for each in FILES]
            if task.arm in STEPS_ARMS:  # another attack than those of training decides, at the end
                strong = Measure("last", "test", ["pgd-50"], *test, restarts=10)
                measures = [strong, Measure("last", "test", ["autoattack"], *test)]
            return Job(run, measures=measures, **shared)
        final = ["clean", "pgd-20"]
        if task.kind == "search":  # no test image is looked at
            held = str(self.data["validation"]), 0
            measures = [Measure(w, "validation", final, *held) for w in FILES]
            return Job(run, self._flags(task), measures, **shared)
        measures = [Measure(w, "test", final, str(self.data["test"]), images) for w in FILES]
        gap_of = FILES if task.kind == "start" else ["last"]
        measures += [
            Measure(weights, split, ["pgd-20"], str(self.data[split]), scale.gap_images)
            for weights in gap_of
            for split in ("train", "validation")
        ]
        return Job(run, self._flags(task), measures, **shared)

    def about(self, task: Task) -> dict[str, Any]:
        """The fields that the task's rows begin with; `IDENTITY` is among them."""
        ids = self._start_ids(task.model)
        if task.kind != "start":
            ids = {"start_id": ids[ID_FIELDS[task.start]]}
        return {
            "task": task.kind,
            "case": self.scale.name,
            "model": task.model,
            "start": task.start,
            **ids,
            "arm": task.arm,
            "seed": task.seed,
            "settings": digest([self._settings(task), self._sizes()]),
            "num_train_images": pq.read_metadata(self.data["train"]).num_rows,
        }

    def _start_ids(self, model: str) -> dict[str, str | None]:
        """Names of the weights of both starts, by field; None where they are not there yet."""
        run = self._run(Task("start", model))
        files = {field: run / FILES[STARTS[start]] for start, field in ID_FIELDS.items()}
        return {field: self._digest(f) if f.is_file() else None for field, f in files.items()}

    def _sizes(self) -> list[int]:
        scale = self.scale
        return [scale.test_images, scale.autoattack_images, scale.gap_images]

    def _settings(self, task: Task) -> dict[str, object]:
        if task.kind == "start" or task.arm == "start":
            return self.scale.start_settings(task.model)
        return self.scale.arm_settings(task.model, task.arm)

    def _flags(self, task: Task) -> list[str]:
        settings = self._settings(task) | {
            "seed": task.seed,
            "data.path": self.data["train"],
            "data.validation_path": self.data["validation"],
            "data.test_path": self.data["test"],
        }
        if task.kind != "start":
            start = self._run(Task("start", task.model))
            settings["model.checkpoint"] = start / FILES[STARTS[task.start]]
        return [f"--{name}={_as_flag(value)}" for name, value in settings.items()]

    def _run(self, task: Task) -> Path:
        return self.folder / _run_of(task).name

    def _has_late_start(self, model: str) -> bool:
        """True if the start was trained for at least half its patience after its best epoch."""
        about = self.about(Task("start", model))
        return self.results.gap_after_best(about) >= self.scale.patience / 2

    def _weights_are_there(self, task: Task) -> bool:
        return all((self._run(task) / name).is_file() for name in FILES.values())

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            self._digests[file] = file_digest(file)
        return self._digests[file]


def _run_of(task: Task) -> Task:
    """The task whose run this one is about."""
    if task.kind == "select" or task.arm == "start":
        return Task("start", task.model)
    if task.kind == "search":
        return task
    return Task("arm", task.model, task.start, task.arm, task.seed)


def _as_flag(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, Path | str):
        return str(value)
    return json.dumps(value)
