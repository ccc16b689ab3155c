"""The share of time that a run waits for data: a short training on photos with each backend."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import torch

from bench.data_peers import SIZE, with_rows
from bench.measure import origin
from safer_fast import train_model
from safer_fast.config.schema import (
    AttackConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Names,
    SelectionConfig,
)
from safer_fast.runs.layout import METRICS
from safer_fast.runs.loggers.metrics_file import read_metrics

MOST_WAITED = 0.02


def training_row(
    arguments: argparse.Namespace, backend: Literal["dali", "torch"], folder: Path
) -> dict[str, Any]:
    """The row of one run, whose files lie in `folder`; its epochs are read from metrics.jsonl."""
    config = training_config(arguments, backend, folder)
    run = train_model(config)
    epochs = [event for event in read_metrics(run / METRICS) if event["event"] == "epoch"]
    return {
        "what": "data",
        "implementation": f"safer_fast {backend}",
        "case": f"{arguments.training_model} trained at {SIZE} pixels, {config.amp}, "
        f"PGD-{config.attack.steps}, batch {config.batch_size}",
        "num_workers": config.data.num_workers,
        "batch_size": config.batch_size,
        "num_images": arguments.training_images,
        "images_per_second": round(epochs[-1]["images_per_second"], 1),
        "data_wait_fraction": [round(epoch["data_wait_fraction"], 5) for epoch in epochs],
        **origin(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def training_config(
    arguments: argparse.Namespace, backend: Literal["dali", "torch"], folder: Path
) -> Config:
    """A run of few steps that evaluates on one batch."""
    batch_size = arguments.training_batch_size
    images = with_rows(arguments.photos, arguments.training_images, folder / "images.parquet")
    validation = with_rows(arguments.photos, batch_size, folder / "validation.parquet")
    return Config(
        amp="bf16",
        epochs=arguments.training_epochs,
        batch_size=batch_size,
        output=str(folder / backend),
        model=ModelConfig(name=arguments.training_model),
        data=DataConfig(
            path=str(images),
            validation_path=str(validation),
            image_size=SIZE,
            augmentation="random-resized-crop",
            backend=backend,
            num_workers=max(arguments.workers),
        ),
        attack=AttackConfig(steps=arguments.training_steps),
        selection=SelectionConfig(layers=Names(["blocks.9.mlp.fc1"])),
        evaluation=EvaluationConfig(
            every_epochs=arguments.training_epochs,
            steps=1,
            max_images=batch_size,
            attacks=Names(["clean"]),
        ),
    )


def print_training(row: dict[str, Any]) -> None:
    """The run in two lines: what it was, and how long it waited beside how long it may."""
    shares = row["data_wait_fraction"]
    waited = ", ".join(f"{share:.2%}" for share in shares)
    verdict = "reached" if shares[-1] <= MOST_WAITED else "missed"
    print(f"{row['case']}, {row['num_images']} images, {row['device']}")
    print(
        f"  {row['implementation']:<26}{row['num_workers']:>3} workers"
        f"{row['images_per_second']:>10.1f} images/s;  waited for data {waited} of each epoch\n"
        f"  target: at most {MOST_WAITED:.0%} of the last epoch: {verdict}"
    )
