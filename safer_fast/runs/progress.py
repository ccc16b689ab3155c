"""Progress of a run, as checkpoints store it, and the check of what a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

FORMAT = 1
"""Number of the checkpoint format; must be raised when the same names mean something else."""


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run, in values that JSON has; changes where the run can be resumed.

    epoch: the one in progress, from 1. has_begun: its layers are selected. index: steps taken in
    it; num_steps: steps taken in all epochs. totals: sums of its step lines. selected: layers that
    are trained, None for every parameter. best: robust and clean accuracy of the best weights,
    stored in the companion `best_file`. num_without_gain: evaluations since they became the best.
    accuracies: rows of final figures so far. start_file: companion with the weights at the start of
    SAFER, from which only the parameters `moved` differ. metrics_size: bytes of metrics.jsonl.
    audit: findings of the audits of a cheaper attack.
    """

    epoch: int = 1
    has_begun: bool = False
    index: int = 0
    num_steps: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    selected: list[str] | None = None
    best: tuple[float, float] = (-1.0, -1.0)
    best_file: str | None = None
    num_without_gain: int = 0
    accuracies: list[dict[str, Any]] = field(default_factory=list)
    start_file: str | None = None
    moved: list[str] = field(default_factory=list)
    metrics_size: int = 0
    audit: dict[str, float] = field(default_factory=dict)

    def after_evaluation(self, accuracies: tuple[float, float], counts: bool) -> ProgressChanges:
        """Changes of progress by an evaluation; counts: one without gain counts against patience.

        accuracies: robust, then clean. The weights are the best if they are as good as the best.
        """
        gains = accuracies[0] > self.best[0] or not counts
        changes: ProgressChanges = {"num_without_gain": 0 if gains else self.num_without_gain + 1}
        if accuracies >= self.best:
            changes.update({"best": accuracies, "best_file": f"best-{self.num_steps:08d}"})
        return changes

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> RunProgress:
        """Read progress back from JSON of its `dataclasses.asdict`."""
        return cls(**{**values, "best": tuple(values["best"])})


class ProgressChanges(TypedDict, total=False):
    """Fields of `RunProgress` that change."""

    epoch: int
    has_begun: bool
    index: int
    num_steps: int
    totals: dict[str, float]
    selected: list[str] | None
    best: tuple[float, float]
    best_file: str | None
    num_without_gain: int
    accuracies: list[dict[str, Any]]
    start_file: str | None
    moved: list[str]
    metrics_size: int
    audit: dict[str, float]


def check_state(state: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the field, if a checkpoint's state is not of this format.

    A checkpoint without a format number is one of format 1, from before there were numbers.
    """
    found = state.get("format", 1)
    if found != FORMAT or type(found) is not int:
        raise ValueError(f"expected format {FORMAT}, got {found!r:.40}: of another version")
    for name in ("config", "facts", "progress"):
        if not isinstance(state.get(name), dict):
            raise ValueError(f"expected {name}, got {state.get(name)!r:.40}")
    for name in ("data", "backend"):
        if not isinstance(state["facts"].get(name), str):
            raise ValueError(f"expected facts.{name}, got {state['facts'].get(name)!r:.40}")
    known = {item.name for item in fields(RunProgress)}
    if different := sorted(known ^ set(state["progress"])):
        word = "lacks" if different[0] in known else "has an unknown"
        raise ValueError(f"it {word} field progress.{different[0]}")
    for name, value in state["progress"].items():
        if not _is_valid(name, value):
            raise ValueError(f"progress.{name}: expected another value, got {value!r:.40}")


def _is_valid(name: str, value: Any) -> bool:
    """Return true if a run can have this value, as JSON has it, in a field of `RunProgress`."""
    default = getattr(RunProgress(), name)
    if name == "best":
        return isinstance(value, list) and [type(item) for item in value] == [float, float]
    if (name == "selected" and value is not None) or isinstance(default, list):
        kind = dict if name == "accuracies" else str
        return isinstance(value, list) and all(isinstance(item, kind) for item in value)
    if default is None:
        return value is None or isinstance(value, str)
    if isinstance(default, dict):
        numbers = value.values() if isinstance(value, dict) else [None]
        return all(isinstance(number, int | float) for number in numbers)
    return type(value) is type(default) and value >= (name == "epoch")
