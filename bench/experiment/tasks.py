"""The tasks of an experiment in order of importance, and those that are done already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bench.experiment.arms import ARMS, MAIN, STEPS_ARMS, UPPER, Scale

Kind = Literal["start", "search", "arm", "autoattack", "select"]
Row = dict[str, Any]
PEAK, LATE = "peak", "late"
STARTS = {PEAK: "best", LATE: "last"}
"""Which weights of the start's run are meant: those of its best epoch, and those of its last."""
RESULTS = Path(__file__).parents[1] / "results" / "cifar10.jsonl"
"""File that rows are appended to unless another is named."""
SEARCH_SEED = 9
"""Seed of arms that are compared on validation images alone; no other arm has it."""
FILES = {"best": "best.safetensors", "last": "model.safetensors"}
ID_FIELDS = {PEAK: "start_id", LATE: "late_id"}
"""Fields of a start's own rows that name its weights; other rows have the name of theirs as
start_id. Another machine rounds otherwise, and so trains another start."""
IDENTITY = ("task", "case", "model", "start", "start_id", "arm", "seed", "settings")
"""The fields by which a row belongs to a task."""


@dataclass(frozen=True)
class Task:
    """One thing to measure; what it gives are rows.

    start: of the arm, or the two starts themselves for kind `start` (then `arm` says so too).
    """

    kind: Kind
    model: str
    start: str = PEAK
    arm: str = "start"
    seed: int = 0

    @property
    def name(self) -> str:
        """A name for its files."""
        words = [self.kind, self.model, self.start, self.arm, f"seed {self.seed}"]
        return "-".join(words).replace(" %", "").replace(",", "").replace(" ", "-").lower()

    @property
    def title(self) -> str:
        """A name for people."""
        if self.kind == "start":
            return f"{self.model}: shared start"
        if self.kind == "select":
            return f"{self.model}: layers by each criterion at the {self.start} start"
        what = {"autoattack": "AutoAttack on ", "search": "search: "}.get(self.kind, "")
        return f"{self.model}: {what}{self.arm} from the {self.start} start, seed {self.seed}"


@dataclass(frozen=True)
class Wanted:
    """The part of an experiment that is asked for: models, starts, arms, kinds of task, seeds.

    The shared start is trained for all; among the arms, `start` is AutoAttack on it.
    """

    models: Sequence[str]
    starts: Sequence[str] = (PEAK, LATE)
    num_seeds: int = 3
    arms: Sequence[str] | None = None
    kinds: Sequence[str] = get_args(Kind)


def tasks_of(scale: Scale, wanted: Wanted) -> list[Task]:
    """All tasks, the most important first; each once."""
    found: dict[Task, None] = {}
    for model in wanted.models:
        for task in _by_importance(scale, model, wanted.num_seeds):
            is_arm = task.kind in ("search", "arm", "autoattack")
            is_wanted = wanted.arms is None or not is_arm or task.arm in wanted.arms
            is_wanted &= task.start in wanted.starts and task.kind in wanted.kinds
            if task.kind == "start" or is_wanted:
                found[task] = None
    return list(found)


def _by_importance(scale: Scale, model: str, num_seeds: int) -> Iterator[Task]:
    first, later = range(min(1, num_seeds)), range(1, num_seeds)
    sensitivity = [name for name in scale.arms() if name not in (*ARMS, *UPPER, *STEPS_ARMS)]

    def arms(names: Iterable[str], start: str, seeds: Iterable[int]) -> Iterator[Task]:
        names = list(names)
        yield from (Task("arm", model, start, name, seed) for seed in seeds for name in names)

    def autoattack(names: Iterable[str], start: str, seeds: Iterable[int]) -> Iterator[Task]:
        for task in arms(names, start, seeds):
            yield Task("autoattack", model, start, task.arm, task.seed)

    yield Task("start", model)
    if scale.compared:
        yield from (Task("search", model, PEAK, name, SEARCH_SEED) for name in scale.searched)
        for start in STARTS:
            yield from arms(scale.compared, start, range(num_seeds))
            yield from autoattack(["start"], start, first)
            yield from autoattack(scale.compared, start, range(num_seeds))
            yield Task("select", model, start)
        return
    yield Task("select", model, PEAK)
    yield from arms(MAIN, PEAK, range(num_seeds))
    yield from autoattack([*MAIN[:2], "start"], PEAK, first)
    yield from arms(ARMS, PEAK, first)
    yield Task("select", model, LATE)
    yield from arms(MAIN, LATE, first)
    yield from arms(UPPER, PEAK, first)
    yield from arms(sensitivity, PEAK, first)
    yield from autoattack(MAIN, PEAK, range(num_seeds))
    yield from arms(MAIN, LATE, later)
    yield from arms([*ARMS, *UPPER], PEAK, later)
    yield from arms([*ARMS, *UPPER], LATE, range(num_seeds))
    yield from arms(sensitivity, PEAK, later)
    yield from autoattack(ARMS, PEAK, range(num_seeds))
    yield from autoattack([*MAIN[:2], "start"], LATE, first)
    yield from autoattack(MAIN, LATE, range(num_seeds))
    for seed in range(num_seeds):
        for start in STARTS:
            yield from arms(STEPS_ARMS, start, [seed])
        for start in STARTS:
            yield from autoattack(STEPS_ARMS, start, [seed])


@dataclass
class Results:
    """The rows of experiments in a file, and which tasks they are of."""

    file: Path
    _known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._known = {_key(row) for row in read_rows(self.file)}

    def has(self, about: Mapping[str, Any]) -> bool:
        """True if there are rows of the task with these fields."""
        return _key(about) in self._known

    def gap_after_best(self, about: Mapping[str, Any]) -> int:
        """Number of epochs that the run with these fields was trained for after its best."""
        for row in reversed(read_rows(self.file)):
            if row["figure"] == "training" and _key(row) == _key(about):
                return int(row["num_epochs"]) - int(row["best_epoch"])
        return 0

    def add(self, rows: Sequence[Row]) -> None:
        """Append the rows of a finished task to the file, unless they are there."""
        new = [row for row in rows if not self.has(row)]
        if new:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
        self._known |= {_key(row) for row in rows}


def read_rows(file: Path) -> list[Row]:
    """The rows of experiments in a file of rows, none where there is no file."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return [row for row in map(json.loads, lines) if row["what"] == "experiment"]


def digest(values: object) -> str:
    """A short name for settings, a hash of all of them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def file_digest(file: Path) -> str:
    """A short name for the contents of a file, a hash of them."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:12]


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row.get(name) for name in IDENTITY])
