"""Facts about a run that exports state: accuracies, threat model; images to compare models on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.attacks.masking import with_verdicts
from safer_fast.config.commands import ExportConfig
from safer_fast.runs.accuracies import named_apart
from safer_fast.runs.layout import RunFolder

if TYPE_CHECKING:
    import torch

    from safer_fast.runs.folder import LoadedRun

_NUM_COMPARED = 8
_ROW = ("split", "attack", "epsilon", "accuracy", "num_images")
_MEASURED_BY = ("split", "attack", "norm", "epsilon", "restarts", "num_images")


def threat_model(loaded: LoadedRun) -> dict[str, Any]:
    """Norm and epsilon that the run was trained against."""
    attack = loaded.config.attack
    return {"norm": attack.norm, "epsilon": float(attack.epsilon)}


def measured_accuracies(config: ExportConfig, norm: str) -> list[dict[str, Any]]:
    """Accuracies of these weights in metrics.jsonl; of equal measurements the newest.

    norm: the one of the run, which its own events do not name. Transferred attacks are left out:
    images of other models say nothing of how robust this one is.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in evaluations(config):
        row = {name: event[name] for name in _ROW} | {
            "of_images": event.get("of_images"),
            "norm": None if event["attack"] == "clean" else event.get("norm") or norm,
            "restarts": event.get("restarts") or 1,
            "num_not_finite": event.get("num_not_finite") or 0,
            "num_zero_gradients": event.get("num_zero_gradients"),
            "start_accuracy": event.get("start_accuracy"),
        }
        rows[tuple(row[name] for name in _MEASURED_BY)] = row
    return with_verdicts(list(rows.values()))


def evaluations(config: ExportConfig) -> Iterator[dict[str, Any]]:
    """Events in metrics.jsonl that measured these weights, without transferred attacks."""
    from safer_fast.runs.loggers.metrics_file import read_metrics

    file = RunFolder(Path(config.run)).metrics
    events = read_metrics(file) if file.is_file() else []
    for event in named_apart([event for event in events if event.get("event") == "evaluation"]):
        is_ours = event.get("weights") == config.weights
        is_whole = all(event.get(name) is not None for name in _ROW)
        if is_ours and is_whole and event["num_images"] > 0 and not event.get("source"):
            yield event


def comparison_images(loaded: LoadedRun) -> torch.Tensor:
    """Images [B, C, H, W] to compare an export with: of the run's data, else noise."""
    import torch

    from safer_fast.data import as_pixels, load_data

    shape = (_NUM_COMPARED, loaded.num_channels, loaded.image_size, loaded.image_size)
    try:
        config = loaded.config
        own = replace(config.data, extra_path=None)
        data = load_data(own, batch_size=config.batch_size, seed=config.seed)
        facts = data.class_names, data.num_channels, data.image_size, data.validation_rows
        loaded.known_data.check(*facts)
        return as_pixels(next(iter(data.train.probe(_NUM_COMPARED, 0))).images)
    except (ValueError, OSError):
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))
