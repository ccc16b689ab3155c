"""Evaluations agree with other libraries, resume where they were killed, and measure once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from pyautoattack import AutoAttack
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import safer_fast.evaluation.run
from safer_fast import evaluate as command
from safer_fast import evaluate_run, train_model
from safer_fast.attacks.autoattack import LibraryAttacks, check_suits
from safer_fast.attacks.named import AttackSpec, ThreatModel, attack_spec, margin
from safer_fast.attacks.pgd import pgd
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import EvaluateConfig
from safer_fast.config.schema import Names, Radius
from safer_fast.data import Batch, as_pixels, load_data
from safer_fast.evaluation.accuracy import Accuracy, evaluate
from safer_fast.evaluation.progress import ProgressDisplay
from safer_fast.evaluation.store import Outcome, Store, names_of
from safer_fast.runs.accuracies import class_table, interval
from safer_fast.runs.folder import load_run
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime.command import run
from safer_fast.runtime.cuda_graphs import Phase, Replays
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.runtime.seeds import derive_seed
from tests.support.kills import Moment, send
from tests.support.networks import PlainNetwork, build, images_and_labels
from tests.support.ranks import Ending, Team, assert_status

FLAGS = [
    "--data.path=digits",
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 2, embed_dim: 32, num_heads: 2}",
    "--model.patch_size=2",
    "--batch-size=25",
    "--selection.warmup_epochs=0",
    "--selection.fraction=1.0",
    "--selection.criterion=all",
    "--sam.rho=0",
    "--attack.epsilon=0.1",
    "--attack.steps=1",
    "--attack.clean_epochs=12",
    "--optim.learning_rate=0.004",
    "--optim.warmup_epochs=1",
    "--optim.clip_norm=1",
    "--evaluation.max_images=10",
    "--evaluation.attacks=clean",
    "--evaluation.steps=1",
    "--evaluation.sentinel_images=0",
    "--runtime.device=cpu",
    "--runtime.attention=math",
    "--runtime.num_threads=1",
]
RIGHT = "safer_fast.evaluation.store.Store.add"


def train_in(folder: Path, *flags: str) -> Path:
    return train_model(parse_config([*FLAGS, "--output", str(folder), *flags]))


@pytest.fixture(scope="module")
def trained(once: Any) -> Path:
    """A small model that classifies most digits, some of them under attack; left as it is."""
    torch.set_num_threads(1)
    return Path(once("evaluated", lambda folder: train_in(folder, "--epochs=16")))


@pytest.fixture(scope="module")
def other(once: Any) -> Path:
    """A model of other patches, less trained, in bf16."""
    torch.set_num_threads(1)
    flags = [
        "--epochs=6",
        "--seed=1",
        "--attack.clean_epochs=6",
        "--model.patch_size=4",
        "--amp=bf16",
    ]
    return Path(once("evaluated-too", lambda folder: train_in(folder, *flags)))


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run to evaluate."""
    return shutil.copytree(trained, tmp_path / "run")


def settings(folder: Path, attacks: str = "clean,fgsm,pgd-3", **others: Any) -> EvaluateConfig:
    words: dict[str, Any] = {"num_images": 60, "batch_size": 23, "device": "cpu", **others}
    return EvaluateConfig(run=str(folder), attacks=Names(attacks.split(",")), **words)


def digits(num_images: int) -> tuple[Tensor, Tensor]:
    """The first test images that the runs are evaluated on, and their labels."""
    data = load_data(parse_config(FLAGS).data, batch_size=50, seed=0)
    assert data.test is not None
    batches = list(data.test.epoch(1, limit=num_images))
    images = torch.cat([as_pixels(batch.images[: batch.num_images]) for batch in batches])
    return images, torch.cat([batch.labels[: batch.num_images] for batch in batches])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows that evaluations appended after the run, without keys that hold seconds."""
    events = read_metrics(folder / "metrics.jsonl")
    rows = [event for event in events if "per_class_accuracy" in event]
    return [{key: row[key] for key in row if key not in ("seconds", "time_s")} for row in rows]


def attacked_by(
    attack: ReplayedAttack, spec: AttackSpec, start: Tensor, images: Tensor, *others: Any
) -> Tensor:
    """The images after the attack; others: labels, epsilon."""
    settings: dict[str, Any] = {"steps": spec.steps, "start": start, "loss": spec.loss}
    return attack.attack_images(images, *others, spec.step_size, **settings)


ONE_IN_200 = 1 / 200 + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.3)])
def test_our_pgd_figure_is_that_of_torchattacks_from_the_same_start(
    folder: Path, norm: Any, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_run(folder, device="cpu").model
    images, labels = digits(200)

    def attacked(steps: int) -> Tensor:
        kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
        torch.manual_seed(0)
        adversarial: Tensor = kind(
            model, eps=epsilon, alpha=epsilon / 8, steps=steps, random_start=True
        )(images, labels)
        return adversarial

    start = attacked(0)
    is_right = (model(images).argmax(1) == labels) & (model(attacked(20)).argmax(1) == labels)
    expected = is_right.double().mean().item()

    def placed(images: Tensor, *_: object, position: int, **__: object) -> Tensor:
        return start[position : position + len(images)]

    monkeypatch.setattr("safer_fast.attacks.named.placed_start", placed)
    config = settings(folder, "clean,pgd-20", num_images=200, norm=norm, epsilon=Radius(epsilon))
    clean, robust = evaluate_run(config)
    assert 0.1 < robust.accuracy < clean.accuracy - 0.1
    assert abs(robust.accuracy - expected) <= ONE_IN_200


def small_network() -> torch.nn.Module:
    """A classifier of grey images of 8x8 pixels that is soon attacked."""
    torch.manual_seed(0)
    layers = (torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh())
    network = torch.nn.Sequential(*layers, torch.nn.Linear(32, 10))
    return network.eval().requires_grad_(False)


@pytest.fixture
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square asks 300 times in place of 5,000, which take most of an ensemble's time."""
    set_version = AutoAttack._set_version

    def with_fewer_queries(self: Any, version: str) -> None:
        set_version(self, version)
        self.square.n_queries = 300

    monkeypatch.setattr(AutoAttack, "_set_version", with_fewer_queries)


@pytest.mark.slow
@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_is_pyautoattack_called_directly(norm: Any) -> None:
    model, images = small_network(), images_and_labels(16)[0][:, :1, :8, :8]
    labels = model(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 10  # what is wrong from the start is left alone
    epsilon = {"linf": 0.01, "l2": 0.06}[norm]
    suite = AutoAttack(
        model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, seed=7, device="cpu"
    )
    suite.verbose = False
    expected = suite.run_standard_evaluation(images, labels, batch_size=16)[0]
    is_fooled = model(expected).argmax(1) != labels
    assert 3 < is_fooled.sum() < 16
    library = LibraryAttacks(model, norm, 10, MicroBatch())
    assert torch.equal(library("autoattack", images, labels, epsilon, 7), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "square"])
def test_parts_of_autoattack_are_those_of_pyautoattack(name: str) -> None:
    model, images = small_network(), images_and_labels(8)[0][:, :1, :8, :8]
    labels = model(images).argmax(1)
    suite = AutoAttack(model, eps=0.05, seed=3, device="cpu")
    part = suite.square if name == "square" else suite.apgd
    suite.apgd.loss = name.removeprefix("apgd-")
    expected = part.perturb(images, labels)
    library = LibraryAttacks(model, "linf", 10, MicroBatch())
    assert torch.equal(library(name, images, labels, 0.05, 3), expected)
    assert not torch.equal(expected, images)


def test_the_command_gives_autoattack_the_images_that_are_right_and_a_seed_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Tensor, Tensor, float, int]] = []

    def recorded(self: Any, name: str, images: Tensor, labels: Tensor, *others: Any) -> Tensor:
        given.append((images, labels, *others[:2]))
        assert name == "autoattack"
        return images.flip(3)

    monkeypatch.setattr(LibraryAttacks, "__call__", recorded)
    clean, attacked = evaluate_run(settings(folder, "clean,autoattack", seed=5))
    model = load_run(folder, device="cpu").model
    images, labels = digits(60)
    is_right = model(images).argmax(1) == labels
    assert torch.equal(torch.cat([images for images, *_ in given]), images[is_right])
    assert torch.equal(torch.cat([labels for _, labels, *_ in given]), labels[is_right])
    survives = model(images.flip(3)).argmax(1) == labels
    assert attacked.accuracy == (is_right & survives).sum().item() / 60
    assert clean.accuracy == is_right.sum().item() / 60
    # 797 images in 35 batches of 23, but for the last
    seeds = [derive_seed(5, "evaluation autoattack", position) for position in (0, 23, 46)]
    assert [seed for *_, seed in given] == seeds
    assert all(epsilon == 0.1 for _, _, epsilon, _ in given)


def test_the_library_disturbs_neither_output_nor_draws_nor_tracing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = PlainNetwork().eval()
    images, labels = images_and_labels(4)
    lines: list[str] = []
    library = LibraryAttacks(model, "linf", 10, MicroBatch(), lines.append)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    torch.nn.init.zeros_(flat[1].weight)
    torch.nn.init.zeros_(flat[1].bias)
    before = torch.random.get_rng_state()
    tracer = sys.gettrace()
    seen = lambda *_: None  # noqa: E731
    sys.settrace(seen)
    try:
        library("apgd-ce", images, labels, 0.01, 0)
        zero = LibraryAttacks(flat, "linf", 10, MicroBatch(), lines.append)
        for count in (4, 3):
            zero("apgd-dlr", images[:count], torch.zeros(count).long(), 0.01, 0)
        zero("autoattack", images[:1], labels[:1], 0.0, 0)
        assert sys.gettrace() is seen
    finally:
        sys.settrace(tracer)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")
    assert sum("zero gradient" in line for line in lines) == 1
    assert all(line.startswith("note: autoattack: ") for line in lines)


def test_the_margin_is_that_of_carlini_and_wagner() -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0], [0.5, 0.0, 4.0]], requires_grad=True)
    labels = torch.tensor([1, 0])
    loss = margin(logits, labels)
    assert loss.item() == (1.0 - 3.0) + (4.0 - 0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1, -1, 0], [-1, 0, 1]]


def test_attacks_do_what_their_names_say() -> None:
    assert attack_spec("fgsm", 0.3)[:3] == (1, 0.3, False)
    assert attack_spec("pgd-20", 0.4)[:3] == (20, 2.5 * 0.4 / 20, True)
    assert attack_spec("cw", 0.4)[:3] == (30, 2.5 * 0.4 / 30, True)
    assert attack_spec("cw-7", 0.4)[0] == 7
    assert attack_spec("cw-7", 0.4).loss is margin


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_one_step_of_epsilon_along_the_gradient(norm: Any) -> None:
    model = build()
    images, labels = images_and_labels()
    images = images * 0.5 + 0.25
    pixels = images.clone().requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(model(pixels), labels, reduction="sum"), pixels)[0]
    if norm == "linf":
        direction = gradient.sign()
    else:
        direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = attacked_by(
        ReplayedAttack(model, norm=norm), attack_spec("fgsm", 0.02), images, images, labels, 0.02
    )
    torch.testing.assert_close(found, images + 0.02 * direction)


@pytest.mark.parametrize("savings", [[], ["patch-order", "class-token"]])
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_replayed_attack_does_what_pgd_does(savings: list[str], multiple: int) -> None:
    images, labels = images_and_labels()
    start = (images + 0.01).clamp(0, 1)
    plain, saving = build(), build()
    saving.enable_savings(savings, 32)
    expected = pgd(
        plain, images, labels, epsilon=0.03, step_size=0.01, steps=5, start=start, objective=margin
    )
    spec, attack = AttackSpec(5, 0.01, True, margin), ReplayedAttack(saving, multiple=multiple)
    found = attacked_by(attack, spec, start, images, labels, 0.03)
    assert found.shape == images.shape
    assert ((found - expected).abs() > 1e-5).double().mean() < 0.01


def test_attacks_are_replayed_by_loss_and_shape() -> None:
    recorded: list[Any] = []

    class Recorder:
        def warm_up(self, phase: Phase) -> None:
            phase()

        def record(self, phase: Phase) -> Phase:
            recorded.append(phase)
            return phase

    images, labels = images_and_labels()
    model, lines = build(), list[str]()
    replays = Replays(Recorder(), lines.append)
    replayed = ReplayedAttack(model, replays=replays, multiple=4)
    for name in ("pgd-5", "cw-5", "pgd-6"):
        for count in (6, 5, 3):
            chosen = images[:count]
            call = (attack_spec(name, 0.03), chosen, chosen, labels[:count], 0.03)
            plain = ReplayedAttack(model, multiple=4)
            assert torch.equal(attacked_by(replayed, *call), attacked_by(plain, *call))
    assert len(recorded) == 4  # two losses, and batches of 8 and of 4
    assert not lines


@pytest.mark.slow
def test_a_frozen_run_asks_for_no_gradient_of_weights_and_classifies_alike(other: Path) -> None:
    plain, frozen = (load_run(other, device="cpu", is_frozen=flag) for flag in (False, True))
    images, _ = digits(40)
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())
    assert frozen.model.network.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16  # type: ignore[union-attr,index]
    assert plain.model.network.blocks[0].mlp.fc1.weight.dtype == torch.float32  # type: ignore[union-attr,index]
    with torch.no_grad():
        mine, theirs = frozen.model(images), plain.model(images)
    torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)
    assert torch.equal(mine.argmax(1), theirs.argmax(1))
    full = load_run(other, device="cpu", amp="off", is_frozen=True).model
    assert full.network.blocks[0].mlp.fc1.weight.dtype == torch.float32  # type: ignore[union-attr,index]


def test_only_images_that_are_still_right_are_attacked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    original = ReplayedAttack.attack_images

    def recorded(
        self: ReplayedAttack, images: Tensor, *others: Any, start: Tensor, **settings: Any
    ) -> Tensor:
        attacked = original(self, images, *others, start=start, **settings)
        given.append((start, images, attacked))
        return attacked

    monkeypatch.setattr(ReplayedAttack, "attack_images", recorded)
    (result,) = evaluate_run(settings(folder, "pgd-3", restarts=3, batch_size=797))
    model = load_run(folder, device="cpu", is_frozen=True).model
    images, labels = digits(60)
    standing = model(images).argmax(1) == labels
    assert len(given) == 3
    for start, chosen, attacked in given:
        assert torch.equal(chosen, images[standing])
        assert not torch.equal(start, chosen)
        standing[standing.clone()] = model(attacked).argmax(1) == labels[standing]
    assert result.accuracy == standing.sum().item() / 60
    assert len({len(chosen) for _, chosen, _ in given}) > 1
    (first, earlier, _), (second, later, _) = given[:2]
    same = (earlier == later[0]).flatten(1).all(1)
    assert not torch.equal(first[same][0], second[0])


def test_figures_are_those_of_the_images_one_by_one(folder: Path) -> None:
    results = evaluate_run(settings(folder, "clean,fgsm"))
    model = load_run(folder, device="cpu").model
    images, labels = digits(60)
    fgsm = attack_spec("fgsm", 0.1)
    attacked = attacked_by(ReplayedAttack(model), fgsm, images, images, labels, 0.1)
    is_clean = model(images).argmax(1) == labels
    is_robust = is_clean & (model(attacked).argmax(1) == labels)
    last = torch.where(is_clean[:, None, None, None], attacked, images)
    row = rows_of(folder)[1]
    for result, right, shown in zip(results, (is_clean, is_robust), (images, last), strict=True):
        assert result.accuracy == right.double().mean().item()
        loss = cross_entropy(model(shown), labels).item()
        assert result.loss == pytest.approx(loss, abs=2e-5)
    for number, accuracy in enumerate(row["per_class_accuracy"]):
        assert accuracy == is_robust[labels == number].double().mean().item()
    assert (row["norm"], row["epsilon"], row["source"]) == ("linf", 0.1, None)


def test_what_is_right_only_under_attack_is_not_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = lambda self, images, *_, **__: images  # noqa: E731
    monkeypatch.setattr(ReplayedAttack, "attack_images", still)
    clean, fgsm = evaluate_run(settings(folder, "clean,fgsm", num_images=None, batch_size=800))
    assert fgsm.accuracy == clean.accuracy < 1


@pytest.mark.slow
def test_the_command_measures_what_training_logged(folder: Path, tmp_path: Path) -> None:
    attacks = "clean,fgsm,pgd-3,cw-2"
    still = ["--epochs=1", "--attack.clean_epochs=0", "--optim.learning_rate=1e-9"]
    still += [f"--model.checkpoint={folder / 'model.safetensors'}", "--optim.warmup_epochs=0"]
    run = train_in(tmp_path / "again", *still, f"--evaluation.attacks={attacks}", "--seed=3")
    events = read_metrics(run / "metrics.jsonl")
    logged = [event for event in events if event["event"] == "evaluation"]
    logged = [event for event in logged if event["weights"] == "last"]
    command.main([str(run), "--attacks", attacks, "--device=cpu"])
    measured = rows_of(run)
    model = load_run(run, device="cpu").model
    images, labels = digits(10**6)
    is_clean = model(images).argmax(1) == labels
    fooled_only_when_clean = 0
    assert [event["attack"] for event in logged] == attacks.split(",")
    for mine, theirs in zip(logged, measured, strict=True):
        shared = set(mine) - {"gradient_masking", "time_s", "step", "epoch", "loss"}
        assert {name: mine[name] for name in shared} == {name: theirs[name] for name in shared}
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["accuracy"] <= is_clean.double().mean().item()
        fooled_only_when_clean += mine["accuracy"] < is_clean.double().mean().item()
    assert fooled_only_when_clean >= 2


@pytest.mark.parametrize("attacks_wrong", [False, True])
def test_training_counts_no_image_that_is_wrong_without_the_attack(
    attacks_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = images_and_labels(12)
    model = build()
    labels[:6] = model(images[:6]).argmax(1)  # the first six are right without an attack
    helped = images.flip(0)

    def attack(*_: Any, rows: Tensor, **__: Any) -> Tensor:
        return helped[rows]

    monkeypatch.setattr("safer_fast.evaluation.batch.attack_by_name", attack)
    labels[6:] = model(helped[6:]).argmax(1)  # the others under it
    is_clean = model(images).argmax(1) == labels
    is_attacked = model(helped).argmax(1) == labels
    assert is_attacked[6:].all()
    assert not is_clean[6:].all()
    batches = [Batch(images, labels)]
    threat, settings = ThreatModel("linf", 0.03), {"attacks_wrong": attacks_wrong}
    (found,) = evaluate(model, batches, ["pgd-2"], threat, **settings)
    assert found.accuracy == (is_clean & is_attacked).sum().item() / 12
    losses = cross_entropy(model(images), labels, reduction="none")
    attacked = cross_entropy(model(helped), labels, reduction="none")
    expected = attacked if attacks_wrong else torch.where(is_clean, attacked, losses)
    assert found.loss == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.slow
def test_transfer_attacks_the_source_and_counts_for_the_run(folder: Path, other: Path) -> None:
    config = settings(folder, "fgsm,apgd-ce", source=str(other), source_weights="best")
    fgsm, apgd = evaluate_run(config)
    own, own_apgd = evaluate_run(settings(folder, "fgsm,apgd-ce"))
    model = load_run(folder, device="cpu", is_frozen=True).model
    source = load_run(other, "best", device="cpu", amp="run", is_frozen=True).model
    images, labels = digits(60)
    spec = attack_spec("fgsm", 0.1)
    attacked = attacked_by(ReplayedAttack(source), spec, images, images, labels, 0.1)
    is_right = (model(images).argmax(1) == labels) & (model(attacked).argmax(1) == labels)
    assert fgsm.accuracy == is_right.sum().item() / 60
    assert fgsm.accuracy > own.accuracy
    assert apgd.accuracy > own_apgd.accuracy
    assert [row["source"] for row in rows_of(folder)] == [f"{other} (best)"] * 2 + [None] * 2


def no_attack(*_: Any) -> Any:
    raise AssertionError("this was measured before")


def test_the_same_command_measures_nothing_twice_and_appends_nothing_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = load_file(folder / "best.safetensors")
    best["head.bias"] += 0.01  # the best epoch may be the last, whose weights are measured already
    save_file(best, folder / "best.safetensors")
    first = evaluate_run(settings(folder))
    table = capsys.readouterr().out
    lines = (folder / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(safer_fast.evaluation.run.Evaluator, "_measure", no_attack)
        assert evaluate_run(settings(folder)) == first
        fewer = evaluate_run(settings(folder, num_images=23))
        for changed in ({"seed": 1}, {"epsilon": Radius(0.05)}, {"weights": "best"}):
            with pytest.raises(AssertionError, match="measured before"):
                evaluate_run(settings(folder, **changed))
        with pytest.raises(AssertionError, match="measured before"):
            evaluate_run(settings(folder, fresh=True))
    assert capsys.readouterr().out.startswith(table)
    assert (folder / "metrics.jsonl").read_bytes().startswith(lines)
    assert [result.num_images for result in fewer] == [23] * 3
    assert len(rows_of(folder)) == 6
    assert evaluate_run(settings(folder)) == first  # what --fresh forgot
    assert len(rows_of(folder)) == 6


def test_other_pixels_of_the_same_labels_are_other_images(folder: Path, tmp_path: Path) -> None:
    images, labels = digits(40)
    pixels = (images[:, 0] * 255).round().to(torch.uint8)
    figures = []
    for values in (pixels, pixels.flip(1)):
        np.savez(tmp_path / "mine.npz", images=values.numpy(), labels=labels.numpy())
        config = settings(folder, "clean", path=str(tmp_path / "mine.npz"), num_images=None)
        figures.append(evaluate_run(config)[0].accuracy)
    assert figures[1] < figures[0]


@pytest.mark.parametrize("is_joint", [False, True])
def test_names_tell_images_labels_and_places_apart(is_joint: bool) -> None:
    images = torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4)
    labels = torch.tensor([0, 1, 2])
    names = names_of(images, labels, 0, is_joint)
    assert len(set(names)) == 3
    assert names == names_of(images.clone(), labels.clone(), 0, is_joint)
    assert not set(names) & set(names_of(images, labels, 1, is_joint))
    assert not set(names) & set(names_of(images + 1, labels, 0, is_joint))
    assert not set(names) & set(names_of(images, labels + 1, 0, is_joint))
    part = names_of(images[1:], labels[1:], 1, is_joint)
    assert (part == names[1:]) is not is_joint
    floats = images.float() / 255
    assert len(set(names_of(floats, labels, 0, is_joint))) == 3


def command_in_a_process(folder: str, flags: list[str], *moments: Moment) -> None:
    """`python -m safer_fast.evaluate FOLDER FLAGS`, to which something happens."""
    for moment in moments:
        moment.arm()
    sys.argv = ["evaluate", folder, "--device=cpu", *flags]
    run(command.main)


ATTACKS = ["--attacks=clean,pgd-3,cw-2,apgd-ce", "--num-images=60", "--batch-size=23"]
ATTACKS += ["--restarts=2"]


def evaluated(
    num_ranks: int, folder: Path, *moments: Moment, seconds: float = 120, flags: str = ""
) -> list[Ending]:
    words = [*ATTACKS, *flags.split()]
    team = Team(num_ranks, command_in_a_process, str(folder), words, *moments)
    return team.endings(seconds)


def test_ranks_with_other_data_measure_nothing(folder: Path, tmp_path: Path) -> None:
    images = np.zeros((20, 8, 8, 1), np.uint8)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        np.savez(tmp_path / str(rank) / "set.npz", images=images, labels=(np.arange(20) + rank) % 9)
    endings = Team(2, command_beside_own_data, str(tmp_path), str(folder)).endings()
    assert_status(2, endings)
    (said,) = [line for ending in endings for line in ending.output.splitlines() if line]
    assert said.startswith("error: --path: expected the same images and labels on all ranks")
    assert not (folder / "evaluation").exists()


def command_beside_own_data(root: str, folder: str) -> None:
    os.chdir(Path(root, os.environ["RANK"]))
    command_in_a_process(folder, ["--attacks=clean", "--data.path=set.npz"])


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_at_the_next_batch_with_the_same_figures(
    folder: Path, tmp_path: Path
) -> None:
    whole = shutil.copytree(folder, tmp_path / "whole")
    assert_status(0, evaluated(1, whole))
    for call, is_after in ((3, True), (2, False)):
        (ending,) = evaluated(1, folder, Moment(RIGHT, call=call, is_after=is_after))
        assert ending.status == -signal.SIGKILL
        assert not rows_of(folder)
    files = sorted((folder / "evaluation").iterdir())
    with files[-1].open("ab") as file:
        file.write(b'{"names": "torn')
    last = Moment(RIGHT, call=12 - 3 - 1, is_after=True, act=kill_nothing)
    assert_status(0, evaluated(1, folder, last))
    assert rows_of(folder) == rows_of(whole)
    assert len(rows_of(whole)) == 4
    measured = [
        [len(path.read_text().splitlines()) for path in sorted((run / "evaluation").iterdir())]
        for run in (folder, whole)
    ]
    assert measured == [[4] * 4] * 2  # a header and three batches: none was measured twice


def kill_nothing() -> None:
    """The moment comes, and that is all."""


@pytest.mark.parametrize(
    ("number", "flags", "how"),
    [(signal.SIGTERM, "", ""), (signal.SIGINT, "--fresh", " without --fresh")],
)
def test_an_evaluation_that_is_asked_to_stop_says_how_to_go_on(
    folder: Path, number: signal.Signals, flags: str, how: str
) -> None:
    act = {signal.SIGTERM: terminate, signal.SIGINT: interrupt}[number]
    (ending,) = evaluated(1, folder, Moment(RIGHT, call=5, act=act), flags=flags)
    assert ending.status == 128 + number
    line = ending.output.splitlines()[-1]
    assert line.startswith(f"{number.name}: stopped at ")
    assert line.endswith(f"the same command{how} resumes it")
    assert "Traceback" not in ending.output


def terminate() -> None:
    send(signal.SIGTERM)


def interrupt() -> None:
    send(signal.SIGINT)


@pytest.mark.slow
def test_ranks_find_what_one_process_finds_and_go_on_with_what_others_measured(
    folder: Path, tmp_path: Path
) -> None:
    alone, half = (shutil.copytree(folder, tmp_path / name) for name in ("alone", "half"))
    assert_status(0, evaluated(1, alone))
    assert_status(0, evaluated(2, folder))
    # draws of apgd hang on the images of a batch
    own = [row for row in rows_of(folder) if row["attack"] != "apgd-ce"]
    assert own == [row for row in rows_of(alone) if row["attack"] != "apgd-ce"]
    assert len(own) == 3
    assert len(list((folder / "evaluation").iterdir())) == 8
    killed = evaluated(2, half, Moment(RIGHT, call=5))
    assert {ending.status for ending in killed} == {-signal.SIGKILL}
    assert_status(0, evaluated(1, half))
    assert rows_of(half)[:3] == rows_of(alone)[:3]
    assert rows_of(half)[3] == rows_of(alone)[3]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    store = Store(tmp_path, {"attack": "x"})
    store.add(["a" * 16, "b" * 16], [Outcome(True, 5, 0.5), Outcome(False, None, 0.5)])
    return store.files[0]


def load(folder: Path) -> Store:
    store = Store(folder, {"attack": "x"})
    store.load()
    return store


def test_outcomes_are_read_as_they_were_written(tmp_path: Path, stored: Path) -> None:
    store = load(tmp_path)
    expected = [Outcome(False, None, 0.5), Outcome(True, 5, 0.5)]
    assert store.get(["b" * 16, "a" * 16]) == expected
    assert store.get(["a" * 16, "c" * 16]) is None
    with stored.open("ab") as file:
        file.write(b'{"names": "cccc')
    store = load(tmp_path)
    store.add(["c" * 16], [Outcome(True, 1, 0.0)])
    assert load(tmp_path).get(["c" * 16, "b" * 16]) is not None


def line_of(**changed: str) -> bytes:
    """A line for one image in which these values, as JSON, stand in place of the right ones."""
    values = {"names": f'"{"a" * 16}"', "right": '"1"', "finite": '"1"', "gradient": '"1"'}
    values |= {"start": '"1"', "loss": "[1]", "seconds": "1.0"} | changed
    text = "{" + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "}"
    check = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f'{text[:-1]}, "check": "{check}"}}\n'.encode()


DAMAGED = [
    b"\xff\n",
    b"[]\n",
    b"{}\n",
    b"[" * 100_000 + b"\n",
    line_of().replace(b'"loss": [1]', b'"loss": [2]'),
    line_of().replace(b'"loss": [1]', b'"loss": [ 1]'),
    line_of().replace(b', "check"', b', "chfck"'),
    line_of(right='"2"'),
    line_of(right='"11"'),
    line_of(finite="1"),
    line_of(gradient="null"),
    line_of(start='""'),
    line_of(names=f'"{"a" * 15}"'),
    line_of(loss="[1e999]"),
    line_of(loss=f"[{'9' * 5000}]"),
    line_of(loss="[]"),
    line_of(seconds="NaN"),
    line_of(names='""', right='""', finite='""', gradient='""', start='""', loss="[]"),
]


def test_a_line_with_nothing_changed_is_read(tmp_path: Path, stored: Path) -> None:
    with stored.open("ab") as file:
        file.write(line_of())
    assert load(tmp_path).get(["a" * 16]) == [Outcome(True, 1, 1.0)]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, stored: Path, line: bytes) -> None:
    with stored.open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=rf"^{stored}, line 3: expected [^\n]*--fresh[^\n]*$"):
        load(tmp_path)


def without_seconds(table: str) -> str:
    """The output without the last column, which differs from one measurement to the next."""
    return re.sub(r" +[0-9]+\.[0-9]$", "", table, flags=re.M)


@pytest.mark.slow
def test_no_bit_of_a_stored_evaluation_changes_a_figure_without_a_word(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "--attacks=clean,fgsm", "--num-images=30", "--batch-size=23"]
    words += ["--device=cpu"]
    command.main(words)
    table, rows = capsys.readouterr().out, rows_of(folder)
    num_refused = 0
    for file in (folder / "evaluation").iterdir():
        content = file.read_bytes()
        places = [*range(0, len(content), len(content) // 12), content.index(b"right") + 9]
        for place in [*places, content.index(b"\n"), len(content) - 1]:
            file.write_bytes(flipped(content, 8 * place + place % 8))
            if place == len(content) - 1:  # the end is not whole, as after a kill
                command.main(words)
                out = without_seconds(capsys.readouterr().out)
                assert out.endswith(without_seconds(table))
            else:
                number = content.count(b"\n", 0, place) + 1
                with pytest.raises(ValueError, match=rf"^{file}, line {number}: .*--fresh all$"):
                    command.main(words)
                num_refused += 1
        file.write_bytes(content)
    assert num_refused > 20
    assert rows_of(folder) == rows
    with file.open("wb") as damaged:
        damaged.write(flipped(content, 8 * (len(content) // 2)))
    command.main([*words, "--fresh"])
    assert without_seconds(capsys.readouterr().out) == without_seconds(table)
    assert rows_of(folder) == rows


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_damaged_last_weights_do_not_bar_the_best(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "--attacks=clean", "--num-images=30", "--device=cpu"]
    command.main([*words, "--weights=best"])
    table = capsys.readouterr().out
    for damaged in (flipped((folder / "model.safetensors").read_bytes(), 8 * 3000), b""):
        (folder / "model.safetensors").write_bytes(damaged)
        command.main([*words, "--weights=best", "--fresh"])
        assert capsys.readouterr().out == table
        with pytest.raises(ValueError, match=r"^[^\n]*model\.safetensors[^\n]*$"):
            command.main(words)
    (folder / "model.safetensors").unlink()
    command.main([*words, "--weights=best", "--fresh"])
    assert capsys.readouterr().out == table


def test_no_bit_of_a_line_changes_an_outcome(tmp_path: Path, stored: Path) -> None:
    content = stored.read_bytes()
    for bit in range(8 * len(content) - 8):
        stored.write_bytes(flipped(content, bit))
        with pytest.raises(ValueError, match="expected what was measured"):
            load(tmp_path)


@pytest.mark.slow
def test_evaluations_at_once_write_every_figure_once(folder: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(folder, tmp_path / "alone")
    assert_status(0, evaluated(1, alone))
    start = tmp_path / "start"
    teams = [
        Team(1, command_at_a_signal, str(folder), str(start), flags)
        for flags in ([], [], ["--batch-size=11"])
    ]
    start.touch()
    for team in teams:
        assert_status(0, team.endings())
    logged = [json.dumps(row) for row in rows_of(folder)]
    assert len(logged) == len(set(logged))
    # draws of apgd hang on the images of a batch
    own = [[row for row in rows_of(run) if row["attack"] != "apgd-ce"] for run in (folder, alone)]
    facts = [
        sorted((row["attack"], row["accuracy"], row["per_class_accuracy"]) for row in rows)
        for rows in own
    ]
    assert facts[0] == facts[1]
    assert len(facts[0]) == 3
    for file in (folder / "evaluation").iterdir():
        header, *lines = map(json.loads, file.read_bytes().splitlines())
        names = "".join(line["names"] for line in lines)
        known = [names[first : first + 16] for first in range(0, len(names), 16)]
        assert len(known) == len(set(known))
        assert len(known) == (120 if header["attack"] == "apgd-ce" else 60)


def command_at_a_signal(folder: str, start: str, flags: list[str]) -> None:
    while not Path(start).exists():
        time.sleep(0.001)
    command_in_a_process(folder, [*ATTACKS, *flags])


def test_files_that_are_none_are_neither_read_nor_written(tmp_path: Path, stored: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    stored.unlink()
    stored.symlink_to(precious)
    with pytest.raises(ValueError, match=f"^{stored}: expected a file"):
        load(tmp_path)
    with pytest.raises(OSError, match=stored.name):
        Store(tmp_path, {"attack": "x"}).add(["a" * 16], [Outcome(True, 1, 0.0)])
    stored.unlink()
    os.mkfifo(stored)
    with pytest.raises(ValueError, match=f"^{stored}: expected a plain file"):
        load(tmp_path)
    stored.unlink()
    stored.parent.rename(tmp_path / "elsewhere")
    stored.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="expected a folder of the run, got a link"):
        Store(tmp_path, {"attack": "x"})
    assert precious.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"attacks": Names(["pgd"])},
            r"attacks: expected clean, fgsm, pgd-K .*autoattack, got 'pgd', did you mean pgd-20\?",
        ),
        (
            {"attacks": Names(["cw-0"])},
            r"attacks: expected clean, fgsm.*, got 'cw-0', did you mean cw-20\?",
        ),
        (
            {"attacks": Names(["pgd-²"])},
            r"attacks: expected clean, fgsm.*, got 'pgd-²', did you mean pgd-20\?",
        ),
        (
            {"source_weights": "best"},
            r"source_weights: expected source beside it, got only best",
        ),
        ({"attacks": Names()}, r"attacks: expected at least one attack, got none"),
        ({"restarts": 0}, r"restarts: expected at least 1, got 0"),
        ({"num_images": 0}, r"num_images: expected at least 1, got 0"),
        ({"batch_size": -1}, r"batch_size: expected at least 1, got -1"),
        ({"seed": -1}, r"seed: expected a whole number from 0 to 2\^31, got -1"),
        ({"epsilon": Radius(-1)}, r"epsilon: expected a radius of at least 0, got -1"),
        ({"epsilon": Radius("nan")}, r"epsilon: expected a radius of at least 0, got nan"),
        ({"epsilon": Radius(8)}, r"epsilon: expected 0 to 1, got 8: did you mean 8/255\?"),
        ({"norm": "l2"}, r"epsilon: expected a radius for l2, got none: .*"),
        (
            {"source": "nowhere"},
            r"source: expected a run folder, got nowhere, which does not exist",
        ),
    ],
)
def test_a_mistake_is_one_line(trained: Path, changes: dict[str, Any], expected: str) -> None:
    config = EvaluateConfig(**{"run": str(trained), "device": "cpu", **changes})
    with pytest.raises(ValueError, match=rf"^{expected}$") as caught:
        evaluate_run(config)
    assert "\n" not in str(caught.value)


def test_a_run_whose_settings_are_lost_is_named_by_its_file(folder: Path) -> None:
    file = folder / "run.yaml"
    file.write_text("")
    expected = f"{file}: expected the settings of a run: expected names with values in {file}, got"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)} none$"):
        evaluate_run(settings(folder))


def test_a_source_of_other_classes_is_refused(folder: Path, trained: Path) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["safer_fast"]["class_names"][0] = "nought"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^source: expected a model of the same classes as RUN"):
        evaluate_run(settings(trained, source=str(folder)))


@pytest.mark.parametrize(
    ("name", "norm", "classes", "size"),
    [("apgd-dlr", "linf", 2, 32), ("autoattack", "linf", 3, 32), ("square", "l2", 10, 4)],
)
def test_attacks_that_do_not_suit_a_model_are_refused(
    name: str, norm: Any, classes: int, size: int
) -> None:
    with pytest.raises(ValueError, match=rf"^--attacks: expected [^\n]* for {name}"):
        check_suits(name, norm, classes, size)
    check_suits(name, norm, classes + 1, size + 1)


@pytest.mark.usefixtures("few_queries")
def test_autoattack_takes_models_of_fewer_classes_than_it_has_targets() -> None:
    model, images = FirstClasses(small_network()), images_and_labels(4)[0][:, :1, :8, :8]
    labels = model(images).argmax(1)
    library = LibraryAttacks(model, "linf", 4, MicroBatch())
    attacked = library("autoattack", images, labels, 0.01, 0)
    assert (model(attacked).argmax(1) == labels).any()  # all targets were tried on it
    assert (attacked - images).abs().max() <= 0.01 + 1e-6


class FirstClasses(torch.nn.Module):
    """A network that knows only four classes."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)[:, :4]
        return logits


def test_the_in_training_evaluation_gives_the_loss_of_what_counts() -> None:
    images, labels = images_and_labels(12)
    model = build()
    batches = [Batch(images[:6], labels[:6]), Batch(images[6:], labels[6:], num_padding=2)]
    results = evaluate(model, iter(batches), ["clean", "cw-2"], ThreatModel("linf", 0.03))
    assert results[0].num_images == 10
    expected = cross_entropy(model(images[:10]), labels[:10]).item()
    assert results[0].loss == pytest.approx(expected, rel=1e-5)
    assert results[1].loss is not None
    assert results[1].loss > expected
    with torch.no_grad():
        model.network.head.bias.fill_(torch.nan)  # type: ignore[union-attr]
    (broken,) = evaluate(model, iter(batches), ["clean"], ThreatModel("linf", 0.03))
    assert broken == Accuracy("clean", 0.0, 0.0, 10, None, 10)


def test_progress_is_told_every_half_minute_with_accuracies_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, lines = 0.0, list[str]()
    monkeypatch.setattr("safer_fast.evaluation.progress.time.monotonic", lambda: now)
    with ProgressDisplay(["clean", "pgd-2"], 40, lines.append) as progress:
        progress.add("clean", 10, 9, 1.0)
        now = 29.0
        progress.add("pgd-2", 10, 5, 20.0)
        assert not lines
        now = 30.0
        progress.tick()
        progress.tick()
        assert lines == [
            "evaluating: 25%, 0:01:03 left, clean 0.900 of 10, pgd-2 0.500 of 10",
        ]
        now = 60.0
        progress.add("clean", 10, 8, None)  # known from before: no time was measured
        assert progress.seconds_left() == 20 * 0.1 + 30 * 2.0
        assert lines[1:] == [
            "evaluating: 38%, 0:01:02 left, clean 0.850 of 20, pgd-2 0.500 of 10",
        ]
    with ProgressDisplay(["clean"], 40, lines.append, is_shown=False) as progress:
        now = 100.0
        progress.tick()
    assert len(lines) == 2


def test_intervals_are_those_of_wilson() -> None:
    # the textbook's: 50 of 100 and 0 of 10
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_tables_name_what_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([str(folder), "--attacks", "clean,pgd-2", "--num-images=50", "--device=cpu"])
    said, *lines = capsys.readouterr().out.splitlines()
    assert said == "test: 50 of 797 images, stratified by class"
    titles = ["weights", "split", "attack", "norm", "epsilon", "accuracy", "95", "%", "images", "s"]
    assert lines[0].split() == titles
    assert lines[1].split()[:3] == ["last", "test", "clean"]
    assert lines[2].split()[:5] == ["last", "test", "pgd-2", "linf", "0.1000"]
    assert " 50 of 797 " in lines[1]
    assert lines[3].split() == ["class", "clean", "pgd-2"]
    assert len(lines) == 4 + 10


def test_of_many_classes_the_worst_are_named_and_nothing_steers_the_terminal() -> None:
    names = [f"class {number}" for number in range(30)] + ["\x1b[31m"]
    shares: list[float | None] = [number / 30 for number in range(30)]
    rows = [{"attack": "fgsm", "per_class_accuracy": [*shares, 0.0]}]
    table = class_table(rows, names)
    assert "\x1b" not in table
    assert [line.split("  ")[0] for line in table.splitlines()[1:-1]] == names[:19]
    assert table.splitlines()[-1].startswith("?[31m")
    rows[0]["per_class_accuracy"] = [None] * 30 + [1.0]
    assert len(class_table(rows, names).splitlines()) == 2
