"""Weights & Biases sees what metrics.jsonl holds, and never ends a run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import LogConfig
from safer_fast.runs import loggers
from safer_fast.runs.loggers import wandb as metrics_wandb
from safer_fast.runs.loggers.logger import LoggedRun
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runs.loggers.tensorboard import EventFile
from safer_fast.runs.loggers.wandb import WandbRun
from safer_fast.runtime.ranks import Ranks

LINE = {
    "event": "epoch",
    "epoch": 1,
    "step": 3,
    "time_s": 1.0,
    "train_loss": 0.5,
    "clean_accuracy": None,
    "catastrophic_overfitting": True,
    "attack_success": [0.25, 0.5],
    "stage_ms": {"attack": 2.0},
}


class Recorded:
    """Stands in for the package: keeps what it is told, and fails when it is asked to."""

    Settings = SimpleNamespace

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.started: list[dict[str, Any]] = []
        self.is_broken = self.is_finished = False

    def init(self, **options: Any) -> Recorded:
        self.started.append(options)
        if self.is_broken:
            raise RuntimeError("no\nlogin")
        return self

    def define_metric(self, *names: str, **options: str) -> None:
        pass

    def log(self, values: Mapping[str, Any]) -> None:
        if self.is_broken:
            raise RuntimeError("the server is gone")
        self.told.append(dict(values))

    def finish(self) -> None:
        self.is_finished = True

    Image = staticmethod(lambda image: image.size)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", recorded)  # type: ignore[arg-type]
    return recorded


def test_numbers_are_sent_by_event_and_name_over_the_steps(
    package: Recorded, tmp_path: Path
) -> None:
    run = WandbRun(LoggedRun(tmp_path, settings={"seed": 1}))
    run.add(LINE)
    run.add({"event": "run", "epoch": 0, "step": 0, "time_s": 0.0, "device": "cpu"})
    chosen = {"criterion": "sharpness", "scores": {"head": 0.5}, "selected": ["head"], "cut": 1}
    run.add({"event": "selection", "epoch": 1, "step": 3, **chosen})
    place = {"weights": "last", "split": "test", "attack": "pgd-20", "epsilon": 0.25}
    run.add(
        {"event": "evaluation", "epoch": 1, "step": 3, "accuracy": 0.5, "num_images": 9, **place}
    )
    run.close()
    width, height = package.told.pop(2)["selection/layers"]
    assert min(width, height) > 50
    assert package.told == [
        {
            "step": 3,
            "epoch/epoch": 1.0,
            "epoch/time_s": 1.0,
            "epoch/train_loss": 0.5,
            "epoch/catastrophic_overfitting": 1.0,
            "epoch/attack_success/0": 0.25,
            "epoch/attack_success/1": 0.5,
            "epoch/stage_ms/attack": 2.0,
        },
        {"step": 3, "selection/head": 0.5},
        {"step": 3, "evaluation/last-test-pgd-20-0.25-9images": 0.5},
    ]
    assert package.started[0]["config"] == {"seed": 1}
    assert package.is_finished


def test_no_two_figures_share_a_tag(package: Recorded, tmp_path: Path) -> None:
    line = {"event": "evaluation", "epoch": 1, "step": 3, "accuracy": 0.5}
    line |= {"weights": "last", "split": "test", "attack": "pgd-20", "norm": "linf", "seed": 0}
    line |= {"epsilon": 8 / 255, "num_images": 1000, "restarts": 1, "source": None}
    others: list[dict[str, Any]] = [
        {},
        {"weights": "best"},
        {"split": "validation"},
        {"attack": "pgd-2"},
        {"norm": "l2"},
        {"epsilon": 8 / 255 + 1e-9},
        {"epsilon": 9 / 255},
        {"num_images": 100},
        {"restarts": 5},
        {"seed": 1},
        {"source": "other"},
        {"attack": "clean", "norm": None, "epsilon": 0.0, "restarts": None, "seed": None},
    ]
    for logger in (WandbRun(LoggedRun(tmp_path)), EventFile(LoggedRun(tmp_path))):
        for other in others:
            logger.add(line | other)
        logger.close()
    tags = [[name for name in values if name != "step"] for values in package.told]
    (path,) = tmp_path.glob("*tfevents*")
    _, *events = LegacyEventFileLoader(str(path)).Load()
    assert tags == [[value.tag for value in event.summary.value] for event in events]
    assert [len(names) for names in tags] == [1] * len(others)
    assert len({name for (name,) in tags}) == len(others)
    assert tags[0] == ["evaluation/last-test-pgd-20-linf-8of255-1000images"]


def test_pictures_are_sent_too(package: Recorded, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "PNG")
    run = WandbRun(LoggedRun(tmp_path))
    run.add_image("gallery", buffer.getvalue(), 5, 4, step=7)
    assert package.told == [{"step": 7, "gallery": (5, 4)}]


def test_a_resumed_run_is_the_same_run_there(package: Recorded, tmp_path: Path) -> None:
    for _ in range(2):
        WandbRun(LoggedRun(tmp_path)).close()
    first, second = (options["id"] for options in package.started)
    assert first == second
    other = tmp_path / "other"
    other.mkdir()
    WandbRun(LoggedRun(other)).close()
    assert package.started[2]["id"] != first


def test_what_fails_there_is_said_once_and_done_without(package: Recorded, tmp_path: Path) -> None:
    said: list[str] = []
    package.is_broken = True
    WandbRun(LoggedRun(tmp_path, said.append)).add(LINE)
    assert said == ["log.wandb: off from here on (no login)"]
    package.is_broken = False
    run = WandbRun(LoggedRun(tmp_path, said.append))
    package.is_broken = True
    run.add(LINE)
    run.add(LINE)
    run.close()
    assert said[1:] == ["log.wandb: off from here on (the server is gone)"]


def test_it_is_told_what_is_logged_only_where_it_is_wanted(
    package: Recorded, tmp_path: Path
) -> None:
    for is_wanted in (False, True):
        config = LogConfig(wandb=is_wanted)
        log = RunLog(tmp_path, Ranks(), config=config, settings={"seed": 3})
        log.write("step", epoch=1, step=2, loss=1.0)
        log.close()
    assert [values["step/loss"] for values in package.told] == [1.0]
    assert [options["config"] for options in package.started] == [{"seed": 3}]
    assert package.is_finished


def test_a_logger_is_added_as_a_row_of_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown: list[Any] = []

    class Shown:
        def __init__(self, run: LoggedRun) -> None:
            shown.append(run.settings)

        def add(self, line: Mapping[str, Any]) -> None:
            shown.append(line["loss"])

        def add_image(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
            shown.append((tag, png, width, height, step))

        def close(self) -> None:
            shown.append("closed")

    monkeypatch.setitem(loggers.LOGGERS, "shown", loggers.LoggerKind(Shown))
    log = RunLog(tmp_path, Ranks(), settings={"seed": 3})
    log.write("step", epoch=1, step=2, loss=1.0)
    log.add_image("picture", b"png", 1, 1, step=2)
    log.close()
    assert shown == [{"seed": 3}, 1.0, ("picture", b"png", 1, 1, 2), "closed"]


def test_without_the_package_the_flag_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_wandb, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--log\.wandb: expected the package wandb.*pip install"):
        metrics_wandb.check_wandb()


def test_the_flag_needs_no_value() -> None:
    assert parse_config(["--log.wandb", "--seed", "3"]).log.wandb
    assert parse_config(["--seed=3", "--log.wandb"]).log.wandb
    assert not parse_config(["--log.wandb", "false"]).log.wandb


@pytest.mark.slow
def test_a_run_is_recorded_by_the_real_package(tmp_path: Path) -> None:
    pytest.importorskip("wandb", exc_type=ImportError)
    folder = tmp_path / "run"
    flags = ["--epochs=1", "--data.max_images=32", "--attack.steps=1", "--evaluation.max_images=8"]
    flags += ["--evaluation.attacks=clean"]
    flags += [
        "--evaluation.sentinel_images=0",
        "--selection.warmup_epochs=0",
        "--log.wandb",
        "--batch-size=32",
    ]
    flags += ["--selection.num_images=8", "--runtime.num_threads=1", f"--output={folder}"]
    environment = os.environ | {"WANDB_MODE": "offline"}
    subprocess.run(
        [sys.executable, "-m", "safer_fast.train", *flags],
        env=environment,
        check=True,
        capture_output=True,
        timeout=200,
    )
    (recorded,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = recorded.read_bytes()
    for name in (b"epoch/train_loss", b"epoch/stage_ms/attack", b"selection/"):
        assert name in content
