"""Attacks that fail for want of gradients say so: in tables, metrics, reports and model cards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nan

from safer_fast import train_model
from safer_fast.attacks.gradient_watch import Watch, is_blind
from safer_fast.attacks.masking import suspicions
from safer_fast.attacks.named import attack_spec
from safer_fast.attacks.pgd import pgd
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.command_line import parse_config
from safer_fast.evaluate import main
from safer_fast.export import main as export
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runs.report.page import write_report
from safer_fast.runtime.cuda_graphs import Phase, Replays
from tests.support.networks import build, images_and_labels

FLAGS = [
    "--data.path=digits",
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 32, num_heads: 2}",
    "--model.patch_size=2",
    "--batch-size=25",
    "--selection.criterion=random",
    "--sam.rho=0",
    "--attack.steps=1",
    "--attack.epsilon=0.1",
    "--evaluation.steps=2",
    "--evaluation.sentinel_images=0",
    "--evaluation.max_images=50",
    "--runtime.device=cpu",
    "--runtime.num_threads=1",
]
ATTACKS = ["clean", "fgsm", "pgd-10", "cw-10", "apgd-ce", "square"]


def train(folder: Path, *flags: str) -> Path:
    return train_model(parse_config([*FLAGS, f"--output={folder}", *flags]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that classifies most digits, trained without attack."""
    torch.set_num_threads(1)
    ordinary = ["--selection.warmup_epochs=0", "--attack.clean_epochs=12", "--epochs=12"]
    ordinary += ["--optim.learning_rate=0.005", "--optim.clip_norm=1", "--selection.criterion=all"]
    ordinary += ["--selection.fraction=1.0", "--optim.warmup_epochs=1"]
    return train(
        tmp_path_factory.mktemp("trained") / "run", "--evaluation.attacks=clean", *ordinary
    )


def saturated(folder: Path, path: Path) -> Path:
    """A copy of the run whose decisions are the same, its margins ten thousand times as wide."""
    shutil.copytree(folder, path)
    weights = load_file(path / "model.safetensors")
    for name in ("head.weight", "head.bias"):
        weights[name] *= 1e4
    save_file(weights, path / "model.safetensors")
    return path


def evaluated(folder: Path, *flags: str, attacks: list[str]) -> dict[str, dict[str, Any]]:
    main([str(folder), "--attacks", ",".join(attacks), "--device=cpu", *flags])
    events = read_metrics(folder / "metrics.jsonl")
    return {event["attack"]: event for event in events if "per_class_accuracy" in event}


@pytest.mark.slow
def test_an_ordinary_model_has_no_verdict(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    rows = evaluated(folder, "--num-images=40", "--epsilon=0.06", attacks=ATTACKS)
    assert rows["clean"]["accuracy"] > max(0.5, rows["pgd-10"]["accuracy"] + 0.1)
    for row in rows.values():
        assert (row["gradient_masking"], row["upper_bound"]) == ([], False), row
    assert [row["num_zero_gradients"] for row in rows.values()] == [None, 0, 0, 0, 0, None]
    assert rows["pgd-10"]["accuracy"] <= rows["pgd-10"]["start_accuracy"]
    assert [rows[name]["start_accuracy"] for name in ("clean", "fgsm", "square")] == [None] * 3
    assert "masking" not in capsys.readouterr().out
    assert "masking" not in write_report([folder]).read_text()
    export([str(folder), "--format=hub"])
    assert "at most" not in (folder / "export-hub/README.md").read_text()


@pytest.mark.slow
def test_a_saturated_model_is_reported_everywhere(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saturated(trained, tmp_path / "run")
    few = ["--num-images=100", "--batch-size=40"]
    rows = evaluated(folder, *few, attacks=ATTACKS[:-1])
    table = capsys.readouterr().out
    blind = [name for name in rows if rows[name]["upper_bound"]]
    assert blind == ["fgsm", "pgd-10", "apgd-ce"]
    for name in blind:
        row = rows[name]
        assert row["num_zero_gradients"] > 0.3 * row["num_images"]
        assert row["accuracy"] > rows["cw-10"]["accuracy"] + 0.2
        assert "the gradient is zero or not finite on" in row["gradient_masking"][0]
        assert f"last, test, {name}: gradient masking suspected (" in table
        assert f"<={row['accuracy']:.4f}" in table
        assert any("cw-10 leaves" in reason for reason in row["gradient_masking"])
    page = write_report([folder]).read_text()
    assert "gradient masking suspected under last test fgsm, last test pgd-10" in page
    assert f"\N{LESS-THAN OR EQUAL TO} {100 * rows['pgd-10']['accuracy']:.1f} %" in page
    export([str(folder), "--format=hub"])
    card = (folder / "export-hub/README.md").read_text()
    assert f"| at most {rows['pgd-10']['accuracy']:.4f} |" in card
    assert "pgd-10, test split: an upper bound, as gradient masking is suspected" in card
    capsys.readouterr()
    evaluated(folder, *few, attacks=ATTACKS[:-1])  # nothing is measured, all is known
    assert capsys.readouterr().out == table


def test_counts_are_kept_with_what_is_measured(trained: Path, tmp_path: Path) -> None:
    folder = saturated(trained, tmp_path / "run")
    half = evaluated(folder, "--num-images=40", "--batch-size=20", attacks=["pgd-3"])["pgd-3"]
    whole = evaluated(folder, "--num-images=80", "--batch-size=20", attacks=["pgd-3"])["pgd-3"]
    fresh = ("--num-images=80", "--batch-size=20", "--fresh")
    again = evaluated(folder, *fresh, attacks=["pgd-3"])["pgd-3"]
    assert 0 < half["num_zero_gradients"] < whole["num_zero_gradients"]
    for name in ("num_zero_gradients", "start_accuracy", "gradient_masking"):
        assert again[name] == whole[name]


def test_final_figures_of_a_training_have_verdicts_too(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = saturated(trained, tmp_path / "start") / "model.safetensors"
    still = ["--epochs=1", "--selection.warmup_epochs=0", "--optim.learning_rate=1e-9"]
    still += ["--evaluation.attacks=clean,pgd-5", "--data.max_images=100"]
    folder = train(tmp_path / "run", *still, f"--model.checkpoint={start}")
    said = capsys.readouterr().out
    assert "GRADIENT MASKING suspected" in said
    assert "last, test, pgd-5: gradient masking suspected" in said
    events = read_metrics(folder / "metrics.jsonl")
    final = [event for event in events if event["event"] == "evaluation"][-1]
    assert final["upper_bound"]
    assert final["num_zero_gradients"] > 0.3 * final["num_images"]
    assert next(event["gradient_masking"] for event in events if event["event"] == "epoch")


def row(attack: str, accuracy: float, num_images: int = 1000, **others: Any) -> dict[str, Any]:
    place = {"weights": "last", "split": "test", "norm": "linf", "epsilon": 8 / 255}
    return {**place, "attack": attack, "accuracy": accuracy, "num_images": num_images, **others}


SUSPICIOUS: list[tuple[list[dict[str, Any]], list[bool]]] = [
    ([row("fgsm", 0.5), row("pgd-20", 0.45), row("cw-20", 0.38)], [True, True, False]),
    ([row("pgd-20", 0.5), row("square", 0.4)], [True, False]),
    ([row("pgd-20", 0.5), row("apgd-ce", 0.41), row("square", 0.4)], [True, False, False]),
    ([row("pgd-20", 0.5), row("autoattack", 0.3)], [True, False]),
    ([row("fgsm", 0.4), row("pgd-20", 0.5)], [False, True]),
    ([row("cw-5", 0.4), row("cw-20", 0.5)], [False, True]),
    ([row("pgd-20", 0.5, start_accuracy=0.4)], [True]),
    ([row("pgd-20", 0.5, num_zero_gradients=51)], [True]),
    ([row("pgd-20", 0.5, source="other", num_zero_gradients=51)], [True]),
    ([row("pgd-20", 1.0, 4), row("cw-20", 0.0, 4)], [True, False]),
]
SOUND: list[list[dict[str, Any]]] = [
    [row("fgsm", 0.55), row("pgd-20", 0.5), row("cw-20", 0.48), row("autoattack", 0.45)],
    [row("pgd-20", 0.5, 60), row("cw-20", 0.42, 60)],  # five images may be chance
    [row("fgsm", 0.0, 1), row("pgd-20", 1.0, 1)],
    [row("pgd-20", 1.0), row("cw-20", 1.0), row("square", 1.0)],  # withstands everything
    [row("pgd-20", 0.0, num_zero_gradients=900)],
    [row("pgd-20", 0.03, num_zero_gradients=900)],
    [row("pgd-20", 0.5, num_zero_gradients=50)],
    [row("pgd-20", 0.9, epsilon=0, num_zero_gradients=900)],
    [row("pgd-3", 0.5), row("square", 0.4)],  # a weak attack is no sign
    [row("pgd-20", 0.5), row("cw-20", 0.4, restarts=5)],
    [row("fgsm", 0.4, source="other"), row("pgd-20", 0.5, source="other")],
    [row("pgd-20", 0.5), row("cw-20", 0.4, split="validation")],
    [row("pgd-20", 0.5), row("cw-20", 0.4, epsilon=16 / 255)],
    [row("pgd-20", 0.5), row("cw-20", 0.4, 100)],
    [row("pgd-20", 0.5), row("mine", 0.1), row("pgd-0x", 0.1)],
]


@pytest.mark.parametrize(("rows", "expected"), SUSPICIOUS)
def test_signs_of_masking_are_seen(rows: list[dict[str, Any]], expected: list[bool]) -> None:
    assert [bool(reasons) for reasons in suspicions(rows)] == expected


@pytest.mark.parametrize("rows", SOUND)
def test_what_is_no_sign_of_masking_is_none(rows: list[dict[str, Any]]) -> None:
    assert suspicions(rows) == [[]] * len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_that_are_of_no_use_are_not_mistaken_for_tiny_ones(dtype: torch.dtype) -> None:
    gradient = torch.zeros(6, 3, 4, 4, dtype=dtype)
    gradient[1, 0, 0, 0] = torch.finfo(dtype).tiny
    gradient[2, 2, 3, 3] = nan
    gradient[3] = torch.inf
    gradient[4] = -1
    gradient[5] = 1
    gradient[5, 1, 1, 1] = nan
    expected = [True, False, True, True, False, True]
    assert is_blind(gradient).tolist() == expected
    assert is_blind(gradient.to(memory_format=torch.channels_last)).tolist() == expected
    assert is_blind(gradient.flatten(1)).tolist() == expected


@pytest.mark.parametrize("is_replayed", [False, True])
def test_flags_of_an_attack_are_those_of_its_images(is_replayed: bool) -> None:
    class Recorder:
        def warm_up(self, phase: Phase) -> None:
            phase()

        def record(self, phase: Phase) -> Phase:
            return phase

    images, labels = images_and_labels(6)
    model = build()
    labels[:3] = model(images[:3]).argmax(1)
    with torch.no_grad():  # the first three are right by far too much, the others wrong by as much
        model.network.head.weight.mul_(1e4)  # type: ignore[union-attr, operator]
        model.network.head.bias.mul_(1e4)  # type: ignore[union-attr, operator]
    right = model(images).argmax(1) == labels
    replays = Replays(Recorder() if is_replayed else None)
    attack = ReplayedAttack(model, replays=replays, multiple=4)

    def watched(name: str, chosen: slice, watch: Watch) -> None:
        spec, start = attack_spec(name, 1e-6), images[chosen]
        radii = 1e-6, spec.step_size
        settings: dict[str, Any] = {"steps": spec.steps, "start": start, "loss": spec.loss}
        attack.attack_images(start, labels[chosen], *radii, **settings, watch=watch)

    watch = Watch(6, images.device)
    for _ in range(2):
        watched("pgd-6", slice(6), watch)
        assert watch.blind.tolist() == right.tolist()
        assert watch.starts_right.tolist() == right.tolist()
    one = Watch(2, images.device)
    watched("cw-6", slice(1, 3), one)
    assert one.blind.tolist() == [False, False]


def test_a_network_that_looks_at_nothing_hides_nothing() -> None:
    images, labels = images_and_labels(6)
    model, watch = build(), Watch(6, images.device)
    with torch.no_grad():
        model.network.head.weight.zero_()  # type: ignore[union-attr, operator]
    pgd(model, images, labels, epsilon=0.1, step_size=0.1, steps=2, watch=watch)
    assert not watch.blind.any()
