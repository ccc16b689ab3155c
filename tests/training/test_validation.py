"""Evaluations of a run in progress: replayed as written, and considerate of training's memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from safer_fast.config.command_line import parse_config
from safer_fast.evaluation.batch import BatchEvaluator
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime.cuda_graphs import WARM_UP, Replays
from safer_fast.runtime.device import Runtime
from safer_fast.training.trainer import Trainer
from tests.support.small_runs import SMALL, TINY, run
from tests.support.tape import TapeRecorder

SHORT = [*TINY, "--epochs=2", "--data.max_images=64", "--evaluation.max_images=32"]
SHORT += ["--attack.clean_epochs=0", "--attack.epsilon_warmup_epochs=0"]
SHORT += ["--evaluation.sentinel_images=32", "--selection.layers=blocks.0.mlp.fc1"]
FIGURES = ("clean_accuracy", "robust_accuracy", "accuracy", "num_images", "num_zero_gradients")
FIGURES += ("training_attack_accuracy", "pgd_20_accuracy", "start_accuracy")


def figures(folder: Path) -> list[dict[str, Any]]:
    """Accuracies and losses of all evaluations and checks of a run."""
    events = read_metrics(folder / "metrics.jsonl")
    return [event for event in events if event["event"] in ("epoch", "evaluation")]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--selection.lora_rank=2"]], ids=["weights", "factors"])
def test_replayed_evaluations_of_a_run_find_the_same(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*SHORT, *flags, "--runtime.exact_savings=[]", "--evaluation.attacks=clean,fgsm,pgd-3"]
    expected = figures(run(tmp_path / "written", *flags))
    recorders: list[TapeRecorder] = []

    def apart(_: TapeRecorder) -> TapeRecorder:
        recorders.append(TapeRecorder())
        return recorders[-1]

    monkeypatch.setattr(TapeRecorder, "apart", apart)
    monkeypatch.setattr(Runtime, "replays", lambda *_: Replays(TapeRecorder()))
    found = figures(run(tmp_path / "replayed", *flags))
    (own,) = recorders
    assert len(own.tapes) > 4
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        shared = [name for name in FIGURES if name in theirs]
        assert shared
        assert [mine[name] for name in shared] == [theirs[name] for name in shared]
        for name in ("loss", "validation_loss"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], abs=1e-5)


def test_evaluations_take_batches_of_their_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    measure = BatchEvaluator.measure

    def spy(self: Any, name: str, images: Any, *rest: Any) -> Any:
        sizes.append(len(images))
        return measure(self, name, images, *rest)

    monkeypatch.setattr(BatchEvaluator, "measure", spy)
    flags = [*SHORT, "--epochs=1", "--evaluation.attacks=clean,pgd-2"]
    expected = figures(run(tmp_path / "small", *flags, "--evaluation.batch_size=null"))
    assert set(sizes) == {32, 40}  # validation, and halves of the test split
    sizes.clear()
    found = figures(run(tmp_path / "large", *flags, "--evaluation.batch_size=128"))
    assert set(sizes) == {32, 80}
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("accuracy", "clean_accuracy", "robust_accuracy", "loss", "validation_loss"):
            assert mine.get(name) == pytest.approx(theirs.get(name), abs=2e-3)


@pytest.mark.parametrize(("num_fitting", "keeps"), [(16, True), (0, False)])
def test_recordings_of_training_go_only_where_an_eighth_of_a_batch_does_not_fit_beside_them(
    num_fitting: int, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "replays", lambda *_: Replays(TapeRecorder()))
    config = parse_config([*SMALL, "--batch-size=64", f"--output={tmp_path / 'run'}"])
    with Trainer(config) as trainer, trainer.engine.evaluating() as attack:
        training = trainer.engine.replays
        for _ in range(WARM_UP + 1):
            training(("attack",), lambda: None)
        sizes: list[int] = []

        def work(size: int) -> None:
            sizes.append(size)
            if size > num_fitting and training.recorded:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        attack.micro_batch.run(64, work)
        assert bool(training.recorded) == keeps
        assert sizes == ([64, 32, 16] if keeps else [64, 32, 16, 8, 8])
