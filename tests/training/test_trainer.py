"""A run from configuration to folder: complete, repeatable, and only the selection moves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from safer_fast import evaluate_run
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import EvaluateConfig
from safer_fast.config.schema import Names
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.training.trainer import Trainer
from tests.support.kills import Server, lines_of
from tests.support.reports import with_reports
from tests.support.small_runs import NUM_TEST_IMAGES, SMALL, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small bf16 run that other tests only read."""
    with with_reports():
        return run(tmp_path_factory.mktemp("runs") / "finished", "--amp=bf16")


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


@pytest.mark.slow
def test_a_run_folder_has_all_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    expected = {
        "run.yaml",
        "metrics.jsonl",
        "model.safetensors",
        "best.safetensors",
        "config.json",
        "report.html",
    }
    assert names >= expected
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert not any(name.endswith(".tmp") for name in names)


def test_metrics_have_the_keys_that_users_rely_on(finished: Path) -> None:
    events = read_metrics(finished / "metrics.jsonl")
    kinds = [event["event"] for event in events]
    assert kinds[0] == "run"
    assert kinds[-1] == "end"
    assert kinds.count("epoch") == 4
    assert kinds.count("selection") == 2
    for event in events:
        assert {"event", "epoch", "step", "time_s"} <= set(event)
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [event["epoch"] for event in epochs] == [1, 2, 3, 4]
    assert [event["step"] for event in epochs] == [3, 6, 9, 12]
    assert [event["epsilon"] for event in epochs] == pytest.approx([0.0, 0.1, 0.1, 0.1])
    for event in epochs:
        assert 0 <= event["robust_accuracy"] <= event["clean_accuracy"] <= 1
        assert event["train_loss"] > 0
    selection = next(event for event in events if event["event"] == "selection")
    assert len(selection["scores"]) == 18
    assert len(selection["selected"]) == 1
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert {event["weights"] for event in evaluations} == {"start", "best", "last"}
    assert all(event["num_images"] == NUM_TEST_IMAGES for event in evaluations)
    steps = [event for event in events if event["event"] == "step"]
    assert all(event["loss_rise"] == 0 for event in steps if event["epoch"] <= 2)
    assert all(event["loss_rise"] > 0 for event in steps if event["epoch"] > 2)


@pytest.mark.slow
def test_timm_loads_the_run_folder_without_our_package(finished: Path) -> None:
    code = (
        "import sys, timm, torch; sys.modules['safer_fast'] = None;"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval();"
        "logits = model(torch.full((1, 1, 8, 8), 0.5));"
        "print(model.pretrained_cfg['mean'], model.patch_embed.proj.weight.dtype, logits.shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(finished)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=finished,
    )
    assert result.returncode == 0, result.stderr
    assert "torch.float32" in result.stdout
    model = timm.create_model(f"local-dir:{finished}", pretrained=True)
    for name, tensor in weights(finished).items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    facts = json.loads((finished / "config.json").read_text())["safer_fast"]
    assert facts["threat_model"] == {"norm": "linf", "epsilon": 0.1}
    assert facts["class_names"] == [str(digit) for digit in range(10)]
    assert {row["weights"] for row in facts["accuracies"]} == {"start", "best", "last"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    again = run(tmp_path / "again", "--amp=bf16")
    other = run(tmp_path / "other", "--amp=bf16", "--seed=1")
    first = weights(finished)
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(again).items())
    assert not all(torch.equal(tensor, first[name]) for name, tensor in weights(other).items())
    assert lines_of(finished) == lines_of(again)


@pytest.mark.slow
def test_a_set_on_the_device_gives_the_same_run_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    again = run(tmp_path / "again", "--amp=bf16", "--data.backend=device")
    first = weights(finished)
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(again).items())


@pytest.mark.slow
@pytest.mark.parametrize("ema", [[], ["--optim.ema_decay=0.8"]], ids=["raw", "averaged"])
def test_what_is_never_selected_stays_bit_identical(ema: list[str], tmp_path: Path) -> None:
    config = parse_config([*SMALL, *ema, "--amp=bf16", "--output", str(tmp_path / "run")])
    start: dict[str, torch.Tensor] = {}
    selected: set[str] = set()
    with Trainer(config) as trainer:
        for epoch in range(1, config.epochs + 1):
            trainer.begin_epoch(epoch)
            if epoch == config.selection.warmup_epochs + 1:
                start = trainer.arenas.state_dict()
            if epoch > config.selection.warmup_epochs:
                selected.update(trainer.step.selection.names)
            trainer.end_epoch(epoch, trainer.train_epoch(epoch))
        folder = trainer.finish()
    moved = {
        n.rpartition(".")[0] for n, t in weights(folder).items() if not torch.equal(t, start[n])
    }
    assert moved == selected
    assert len(selected) < 18


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--selection.criterion=all", "--sam.rho=0"],
        ["--selection.criterion=all", "--sam.layerwise=true", "--selection.radius=relative"],
        ["--objective.name=trades", "--selection.criterion=gradient-norm"],
        ["--objective.name=mart", "--attack.norm=l2", "--attack.epsilon=0.5"],
        ["--attack.steps=0", "--optim.name=sgd", "--optim.learning_rate=0.05"],
        ["--attack.steps=1", "--selection.criterion=random", "--optim.ema_decay=0.9"],
        ["--selection.layers=head,blocks.3.*", "--optim.schedule=step", "--sam.adaptive=true"],
        ["--model.name=swin_tiny_patch4_window7_224", "--model.arguments={window_size: 2, "
         "depths: [1, 1], embed_dim: 16, num_heads: [2, 2]}", "--selection.norms=true"],
        ["--model.name=xcit_nano_12_p8_224", "--model.patch_size=8", "--data.image_size=16",
         "--model.arguments={depth: 1, cls_attn_layers: 1}", "--selection.criterion=all"],
    ],
    ids=lambda flags: " ".join(flags)[:48],
)  # fmt: skip
def test_baselines_and_variants_are_settings(flags: list[str], tmp_path: Path) -> None:
    few = ["--epochs=3", "--evaluation.every_epochs=3", "--data.max_images=128"]
    folder = run(tmp_path / "run", *few, *flags)
    end = read_metrics(folder / "metrics.jsonl")[-1]
    assert end["event"] == "end"
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_a_checkpoint_is_where_the_next_run_starts(finished: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--selection.warmup_epochs=0", "--output", str(tmp_path / "next")]
    config = parse_config([*flags, "--model.checkpoint", str(finished)])
    with Trainer(config) as trainer:
        for name, tensor in weights(finished).items():
            assert torch.equal(trainer.arenas.view(name, trainer.arenas.master), tensor)


def test_losses_that_are_not_finite_stop_the_run_with_a_reason(tmp_path: Path) -> None:
    flags = ["--optim.learning_rate=1000", "--optim.weight_decay=1000", "--optim.warmup_epochs=0"]
    flags += ["--epochs=30"]
    flags += ["--runtime.max_skipped_steps=3", "--attack.steps=0", "--optim.name=sgd"]
    with pytest.raises(FloatingPointError, match=r"max_skipped_steps: .* 3 steps in a row"):
        run(tmp_path / "run", *flags)


def test_evaluating_a_run_repeats_its_final_figures(finished: Path) -> None:
    before = read_metrics(finished / "metrics.jsonl")
    results = evaluate_run(
        EvaluateConfig(run=str(finished), attacks=Names(["clean", "fgsm", "pgd-2"]))
    )
    clean, fgsm, pgd = (result.accuracy for result in results)
    final = [e for e in before if e["event"] == "evaluation" and e["weights"] == "last"]
    assert clean == final[0]["accuracy"]
    assert pgd <= clean
    assert fgsm <= clean
    added = read_metrics(finished / "metrics.jsonl")[len(before) :]
    assert [event["attack"] for event in added] == ["clean", "fgsm", "pgd-2"]


def test_evaluating_takes_any_data_that_fits(finished: Path, tmp_path: Path) -> None:
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:50] * 255 / 16).round().astype("uint8")
    file = tmp_path / "mine.npz"
    np.savez(file, images=images, labels=digits.target[:50])
    results = evaluate_run(
        EvaluateConfig(run=str(finished), path=str(file), attacks=Names(["clean"]), num_images=40)
    )
    assert results[0].num_images == 40


@pytest.mark.slow
def test_an_interrupted_run_ends_without_a_traceback(server: Server, tmp_path: Path) -> None:
    import signal
    import time

    folder = tmp_path / "run"
    words = ["-m", "safer_fast.train", "--output", str(folder), *SMALL, "--epochs=4000"]
    process = server.program(*words, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder / "best.safetensors").exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 130
    assert "Traceback" not in output
    assert read_metrics(folder / "metrics.jsonl")[0]["event"] == "run"
    assert weights(folder, "best.safetensors")
