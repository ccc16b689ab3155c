"""The files of a run folder have the names that users, and runs of earlier versions, know."""

from __future__ import annotations

from pathlib import Path

import pytest

from safer_fast.runs.layout import RunFolder


def test_the_files_of_a_run_keep_their_names() -> None:
    folder = RunFolder(Path("run"))
    found = {
        name: getattr(folder, name)
        for name, kind in vars(RunFolder).items()
        if isinstance(kind, property)
    }
    assert found.pop("of_tower") == (folder.teacher, folder.text_embeddings)
    found |= {name: folder.weights(name) for name in ("last", "best")}
    found["export"] = folder.export("hub")
    assert {name: path.relative_to("run").as_posix() for name, path in found.items()} == {
        "config": "run.yaml",
        "metrics": "metrics.jsonl",
        "later_metrics": "metrics-after-end.jsonl",
        "model_config": "config.json",
        "checkpoints": "checkpoints",
        "teacher": "teacher.safetensors",
        "text_embeddings": "text_embeddings.safetensors",
        "lock": "run.lock",
        "gallery": "gallery.safetensors",
        "evaluation": "evaluation",
        "selection": "selection.json",
        "selection_map": "selection.svg",
        "report": "report.html",
        "wandb": "wandb",
        "wandb_id": "wandb-id.txt",
        "last": "model.safetensors",
        "best": "best.safetensors",
        "export": "export-hub",
    }


def test_other_weights_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="--weights: expected last or best, got 'first'"):
        RunFolder(Path("run")).weights("first")
