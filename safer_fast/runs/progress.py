"""Progress of a run, as its checkpoints state it, and the check of what a checkpoint states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

FORMAT = 1
"""Of checkpoints; to be raised where one holds something else under the same names."""


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come, in what JSON knows; it changes at points where the run may end.

    epoch: the one in progress, from 1. has_begun: whether its layers are selected. index: steps
    taken in it; num_steps: steps taken in all. totals: sums of its step lines. selected: layers
    that are trained, None for every parameter. best: robust and clean accuracy of the best weights,
    which lie in the file that `best_file` names. num_without_gain: evaluations since they were the
    best. accuracies: final figures so far. start_file: names the weights at the start of SAFER,
    from which only the parameters `moved` differ. metrics_size: bytes of metrics.jsonl. audit: what
    the last audit of a cheaper attack found.
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

    def judged(self, accuracies: tuple[float, float], counts: bool) -> dict[str, Any]:
        """What changes with an evaluation, which counts against patience or does not."""
        gains = accuracies[0] > self.best[0] or not counts
        changes: dict[str, Any] = {"num_without_gain": 0 if gains else self.num_without_gain + 1}
        if accuracies >= self.best:
            changes |= {"best": accuracies, "best_file": f"best-{self.num_steps:08d}"}
        return changes

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> RunProgress:
        """What `dataclasses.asdict` and JSON have made of it."""
        return cls(**{**values, "best": tuple(values["best"])})


def check_state(state: Mapping[str, Any]) -> None:
    """Raises ValueError for what no checkpoint of this format holds, naming the field.

    A checkpoint without a format was written before formats were counted, in the first.
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
    """Whether a field of `Progress`, as JSON has it, can be of a run."""
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
