"""Files of a finished or running run, read and put in order for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safer_fast.config.messages import printable
from safer_fast.config.untrusted import MOST_JSON, MOST_LEVELS, MOST_YAML, load_yaml, read_text
from safer_fast.runs.accuracies import named_apart
from safer_fast.runs.layout import METRICS, RunFolder
from safer_fast.runs.loggers.metrics_file import read_metrics

_EVENT_KEYS = ("event", "epoch", "step", "time_s")
_NUMBERS = (
    "embedding_distance",
    "clean_embedding_distance",
    "time_s",
    "train_loss",
    "train_robust_accuracy",
    "clean_accuracy",
    "robust_accuracy",
    "learning_rate",
    "epsilon",
    "images_per_second",
    "peak_memory_mib",
    "skipped_steps",
    "num_images",
    "of_images",
    "validation_loss",
    "train_start_accuracy",
    "loss_rise",
    "gradient_norm",
    "gradient_cosine",
    "training_attack_accuracy",
    "pgd_20_accuracy",
    "attack_steps",
    "attack_strength",
    "audit_fraction",
    "restarts",
    "seed",
    "loss",
    "num_not_finite",
    "num_zero_gradients",
)
_TEXTS = ("path", "attack", "weights", "norm", "source")
_LONGEST_LIST = 100_000  # values of an event: classes, steps of an attack
_LARGEST = 1e100  # what is larger has no square


@dataclass(frozen=True)
class ReportedRun:
    """A run folder; events of an epoch that was trained again after a resume count once."""

    name: str
    config: dict[str, Any]
    model: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
    selections: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    folder: Path
    is_finished: bool
    time_s: float

    def series(self, key: str) -> list[Any]:
        """The values of a key of the epoch events, None where one lacks it."""
        return [event.get(key) for event in self.epochs]

    def setting(self, name: str) -> Any:
        """The configured value of `group.name`, None where it is not known."""
        return flatten(self.config).get(name)

    def number(self, name: str) -> float | None:
        """The configured number `group.name`, None where it is not known or something else."""
        value = self.setting(name)
        return None if value is None or not _is_number(value) else float(value)

    def best_epoch(self) -> float:
        """Epoch whose weights are the best by validation images; infinity: none was evaluated."""

        robust = [event for event in self.epochs if event.get("robust_accuracy") is not None]
        near = [event for event in self.epochs if event.get("embedding_distance") is not None]

        def merit(event: Mapping[str, Any]) -> tuple[float, float, int]:
            gain = event["robust_accuracy"] if robust else -event["embedding_distance"]
            clean = event.get("clean_accuracy")
            return gain, -math.inf if clean is None else clean, event["epoch"]

        return float(max(robust or near, key=merit, default={"epoch": math.inf})["epoch"])

    def first_safer_epoch(self) -> int:
        """Epoch before which layers were selected for the first time; 0: none yet."""
        return min((event["epoch"] for event in self.selections), default=0)

    def first_epoch_at_full_epsilon(self) -> float:
        """First epoch at full epsilon, where training and validation compare; infinity: none."""
        reached = {event["epoch"]: event.get("epsilon") or 0.0 for event in self.epochs}
        full = self.number("attack.epsilon") or max(reached.values(), default=0.0)
        # The log may have rounded: a millionth of the radius does not matter.
        epochs = [epoch for epoch, epsilon in reached.items() if epsilon >= full * (1 - 1e-6)]
        return min(epochs, default=math.inf)


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """Read the runs in the order given, each once; raise ValueError naming one that is no run."""
    if not folders:
        raise ValueError("expected at least one run folder, got none")
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    is_unique = len(set(names)) == len(names)
    return [
        _read_run(folder, printable(name if is_unique else str(folder)))
        for folder, name in zip(folders, names, strict=True)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_run(folder: Path, name: str) -> ReportedRun:
    files = RunFolder(folder)
    if not files.metrics.is_file():
        what = "a folder without it" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: expected a run folder with {METRICS}, got {what}")
    events = [_checked(event, files.metrics) for event in read_metrics(files.metrics)]
    environment: dict[str, Any] = {}
    for event in _of_kind(events, "run"):
        environment |= {key: event[key] for key in event if key not in _EVENT_KEYS}
    return ReportedRun(
        name=name,
        config=_read_mapping(files.config),
        model=_read_mapping(files.model_config),
        environment=environment,
        epochs=_last_per_epoch(_of_kind(events, "epoch")),
        selections=_last_per_epoch(_of_kind(events, "selection")),
        evaluations=named_apart(_of_kind(events, "evaluation")),
        folder=folder,
        is_finished=_is_finished(events),
        time_s=_time_s(events),
    )


def _checked(event: dict[str, Any], path: Path) -> dict[str, Any]:
    """The event with checked values; raise ValueError naming the file where one is wrong."""
    if event.get("event") not in ("run", "epoch", "selection", "evaluation"):
        return event
    event = _plain(event, path)
    if event["event"] == "run":
        return event
    scores, selected = event.get("scores") or {}, event.get("selected", [])
    is_usable = {key: _is_number(event.get(key)) for key in _NUMBERS} | {
        "epoch": type(event.get("epoch")) is int and abs(event["epoch"]) < 2**31,
        "accuracy": _is_list_of_shares([event.get("accuracy")]),
        "start_accuracy": _is_list_of_shares([event.get("start_accuracy")]),
        "scores": isinstance(scores, dict) and all(map(_is_number, scores.values())),
        "selected": isinstance(selected, list) and all(isinstance(name, str) for name in selected),
    }
    is_usable |= {key: isinstance(event.get(key), str | None) for key in _TEXTS}
    is_usable |= {
        "attack_success": _is_list_of_shares(event.get("attack_success")),
        "per_class_accuracy": _is_list_of_shares(event.get("per_class_accuracy")),
        "stage_ms": _is_times(event.get("stage_ms")),
        "catastrophic_overfitting": isinstance(event.get("catastrophic_overfitting"), bool | None),
    }
    for key in is_usable:
        if not is_usable[key]:
            raise ValueError(
                f"{path}: expected events of a run, got {event.get(key)!r:.40} as {key} of "
                f"event {event['event']}"
            )
    return event


def _is_number(value: Any) -> bool:
    """True for a finite number, and for None, which was not measured."""
    if value is None:
        return True
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < _LARGEST


def _is_list_of_shares(values: Any) -> bool:
    """True for a list of shares in [0, 1], some of which may be None."""
    if not isinstance(values, list):
        return values is None
    shares = [value for value in values if value is not None]
    are_shares = all(_is_number(share) and 0 <= share <= 1 for share in shares)
    return are_shares and len(values) <= _LONGEST_LIST


def _is_times(values: Any) -> bool:
    """True for a dictionary of times, some of which may be None."""
    if not isinstance(values, dict):
        return values is None
    times = [time for time in values.values() if time is not None]
    return all(_is_number(time) and time >= 0 for time in times)


def _plain(value: Any, path: Path, levels: int = MOST_LEVELS) -> Any:
    """The value with printable texts, and None for numbers too large to draw.

    Raise ValueError naming the file where values are nested too deeply.
    """
    if not levels:
        raise ValueError(f"{path}: expected values, got more than {MOST_LEVELS} levels of them")
    if isinstance(value, Mapping):
        return {printable(str(k)): _plain(v, path, levels - 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, path, levels - 1) for item in value]
    if isinstance(value, int | float):
        return value if abs(value) < _LARGEST else None
    return printable(value) if isinstance(value, str) else value


def _of_kind(events: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event.get("event") == kind]


def _last_per_epoch(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_epoch = {event["epoch"]: event for event in events}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _is_finished(events: Sequence[dict[str, Any]]) -> bool:
    """True where the run ended and was not resumed; evaluations may have followed."""
    kinds = [event["event"] for event in events if event.get("event") in ("epoch", "end")]
    return kinds[-1:] == ["end"]


def _time_s(events: Sequence[dict[str, Any]]) -> float:
    """Seconds of training; sessions add up where the clock starts at 0 again, as in old runs."""
    total, previous = 0.0, 0.0
    for event in events:
        if event.get("event") not in ("step", "epoch", "selection"):
            continue
        now = event.get("time_s") or 0.0
        if not _is_number(now):
            continue
        if now < previous:
            total += previous
        previous = now
    return total + previous


def _read_mapping(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        if path.suffix == ".json":
            values = json.loads(read_text(path, MOST_JSON))
        else:
            values = load_yaml(read_text(path, MOST_YAML))
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path}: expected YAML or JSON, got {problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected names with values, got {type(values).__name__}")
    plain: dict[str, Any] = _plain(values, path)
    return plain
