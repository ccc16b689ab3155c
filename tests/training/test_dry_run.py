"""A dry run prints the cost of the run, and leaves no files."""

import os
import re
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from safer_fast import train_model
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.command_line import parse_config
from safer_fast.evaluation.batch import BatchEvaluator
from safer_fast.models.flops import MATMUL_SIZE, costs, ideal_flops
from safer_fast.runs.cost import table
from safer_fast.runs.gallery import make_gallery
from safer_fast.training import dry_run as module
from safer_fast.training.dry_run import (
    NUM_FULL_STEPS,
    NUM_PROBED_ON_CPU,
    NUM_STEPS,
    NUM_WARM_UP,
    dry_run,
    passes_of_evaluation,
)
from safer_fast.training.learner import Learner
from safer_fast.training.selecting import choose_by_probe
from safer_fast.training.trainer import Trainer
from tests.support.kills import Server
from tests.support.small_runs import TEST_IMAGES

FLAGS = ["--data.max_images=300", "--batch-size=16", "--evaluation.max_images=50"]
FLAGS += ["--selection.num_images=64", "--runtime.num_threads=1", "--attack.steps=3"]
STEPS_PER_EPOCH = -(-300 // 16)
NETWORK = ["--model.arguments={depth: 2, embed_dim: 16, num_heads: 2}"]
SMALL = [*FLAGS, *NETWORK]
ONE_STAGE = [*SMALL, "--epochs=2", "--selection.warmup_epochs=0"]
TWO_STAGES = [*SMALL, "--epochs=2", "--selection.warmup_epochs=1"]
NO_CUT = ["--model.name=xcit_nano_12_p8_224", "--model.patch_size=8", "--data.image_size=16"]
NO_CUT += ["--model.arguments={depth: 1, cls_attn_layers: 1}"]

# its attention multiplies by the weights of qkv itself
UNCALLED = ["--model.name=beit_base_patch16_224", "--model.patch_size=4", *NETWORK]
UNCALLED += ["--selection.layers=blocks.0.attn.qkv"]


@pytest.fixture(autouse=True)
def smaller_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product whose time is the machine's rate takes a second, as long as all steps do."""
    monkeypatch.setitem(MATMUL_SIZE, "cpu", 256)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [*SMALL, "--epochs=7", "--selection.warmup_epochs=4"],
        [*ONE_STAGE, "--sam.rho=0", "--optim.ema_decay=0.9"],
        [*TWO_STAGES, "--attack.steps=0"],
        [*TWO_STAGES, "--attack.epsilon=0"],
        [*ONE_STAGE, "--objective.name=trades", "--amp=bf16"],
        [*FLAGS, "--epochs=2", "--selection.warmup_epochs=0", *NO_CUT],
        [*ONE_STAGE, "--batch-size=150"],
        [*ONE_STAGE, "--selection.lora_rank=2", "--selection.adapter=lora"],
        [*ONE_STAGE, "--selection.lora_rank=2", "--selection.adapter=dora"],
        [*ONE_STAGE, "--attack.name=apgd"],
        [*FLAGS, "--epochs=2", "--selection.warmup_epochs=0", *UNCALLED],
    ],
    ids=lambda flags: " ".join(flags[len(FLAGS) :])[:60],
)
def test_figures_add_up(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(flags)
    cost = dry_run(config)
    warmup = config.selection.warmup_epochs
    names = ["warm-up", "safer"] if warmup else ["safer"]
    assert [stage.name for stage in cost.stages] == names
    assert cost.num_steps == config.epochs * -(-300 // config.batch_size)
    training = sum(stage.num_steps * stage.step_s for stage in cost.stages)
    assert cost.training_s == pytest.approx(training)
    assert cost.duration_s == pytest.approx(training + cost.evaluation_s)
    assert cost.evaluation_s > 0
    for stage in cost.stages:
        assert stage.images_per_second == pytest.approx(config.batch_size / stage.step_s)
        in_a_second = sum(stage.operations.values()) * stage.images_per_second
        assert 0 < stage.mfu(cost.matmul_rate) == pytest.approx(in_a_second / cost.matmul_rate)
        assert stage.peak_memory_mib > 0
    assert str(timedelta(seconds=round(cost.duration_s))) in table(cost)
    assert list(tmp_path.iterdir()) == []


def test_a_step_takes_the_median_of_those_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [60.0] * NUM_WARM_UP + [1.0, 1.0, 2.0, 2.0, 9.0]
    monkeypatch.setattr(module, "_step_times", lambda *_: times)
    cost = dry_run(parse_config(TWO_STAGES))
    assert [stage.step_s for stage in cost.stages] == [2.0, 2.0]
    assert cost.training_s == 2 * STEPS_PER_EPOCH * 2.0


def test_operations_are_those_that_the_method_needs_for_an_image(tmp_path: Path) -> None:
    config = parse_config(TWO_STAGES)
    stages = dry_run(config).stages
    image = torch.zeros(1, 1, 8, 8)
    config.output = str(tmp_path / "run")
    with Trainer(config) as trainer, trainer.model.without_savings():
        for stage, passes in zip(stages, (1, 2), strict=True):
            expected = ideal_flops(
                trainer.model, image, stage.cut, stage.layers, config.attack.steps, passes
            )
            assert stage.operations == expected
    assert stages[0].layers == list(trainer.model.layers)
    assert len(stages[1].layers) == 1


def test_a_loss_that_reads_clean_images_needs_them_in_every_phase(tmp_path: Path) -> None:
    flags = [*ONE_STAGE, "--selection.layers=blocks.1.mlp.fc1"]
    (plain,) = dry_run(parse_config(flags)).stages
    (trades,) = dry_run(parse_config([*flags, "--objective.name=trades"])).stages
    config = parse_config([*flags, "--output", str(tmp_path / "run")])
    with Trainer(config) as trainer, trainer.model.without_savings():
        parts = costs(trainer.model, torch.zeros(1, 1, 8, 8)).values()
    forward = sum(part.forward for part in parts)
    assert trades.operations["attack"] == plain.operations["attack"] + forward
    assert trades.operations["prefix"] == 2 * plain.operations["prefix"] > 0
    assert trades.operations["sam"] == 2 * plain.operations["sam"]
    (apgd,) = dry_run(parse_config([*flags, "--attack.name=apgd"])).stages
    assert apgd.operations == plain.operations | {"attack": plain.operations["attack"] + forward}
    assert apgd.attack == plain.attack.replace("PGD", "APGD")


@pytest.mark.slow
def test_compiled_code_needs_the_same_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_evaluation_seconds", lambda *_: 1.0)  # compiles for its own size
    flags = [*TWO_STAGES, "--batch-size=1", "--data.max_images=40", "--model.arguments.depth=1"]
    eager = dry_run(parse_config(flags)).stages
    compiled = dry_run(parse_config([*flags, "--runtime.compile=on"])).stages
    assert [stage.operations for stage in compiled] == [stage.operations for stage in eager]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [["--epochs=80"], ["--epochs=3", "--selection.warmup_epochs=1"]])
def test_steps_run_under_the_full_attack(
    epochs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, int]] = []
    take_step = Learner.take_step

    def watched(learner: Learner, *arguments: Any) -> float:
        rate = take_step(learner, *arguments)
        seen.append((float(learner.epsilon), learner.step.attack.steps))
        return rate

    monkeypatch.setattr(Learner, "take_step", watched)
    dry_run(parse_config([*SMALL, *epochs]))
    assert len(seen) == 2 * NUM_STEPS
    assert all(epsilon == pytest.approx(0.1) and steps == 3 for epsilon, steps in seen)


def test_evaluations_are_counted_as_a_run_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--epochs=5", "--selection.warmup_epochs=1", "--evaluation.every_epochs=2"]
    flags += ["--evaluation.steps=2", "--evaluation.attacks=clean,fgsm,pgd-3"]
    flags += ["--data.max_images=64", "--attack.steps=0", "--output", str(tmp_path / "run")]
    config = parse_config([*SMALL, f"--data.test_path={TEST_IMAGES}", *flags])
    num_passes = 0

    def attacked(own: Any, images: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        nonlocal num_passes
        num_passes += len(images) * 2 * settings["steps"]
        return attack_images(own, images, *arguments, **settings)

    def classified(own: Any, images: torch.Tensor, labels: torch.Tensor) -> Any:
        nonlocal num_passes
        num_passes += len(images)
        _, losses, are_finite = classify(own, images, labels)
        return torch.ones_like(are_finite), losses, are_finite  # so that every attack has to try

    def shown(model: Any, images: torch.Tensor, *arguments: Any) -> Any:
        nonlocal num_passes
        num_passes += 2 * len(images)
        return make_gallery(model, images, *arguments)

    monkeypatch.setattr("safer_fast.training.validation.make_gallery", shown)
    attack_images = ReplayedAttack.attack_images
    monkeypatch.setattr(ReplayedAttack, "attack_images", attacked)
    classify = BatchEvaluator._classify
    monkeypatch.setattr(BatchEvaluator, "_classify", classified)
    train_model(config)
    config.output = str(tmp_path / "other")
    with Trainer(config) as trainer:
        assert passes_of_evaluation(trainer) == num_passes


@pytest.mark.parametrize("flag", [["--dry-run"], ["--dry-run=true"], ["--dry-run", "true"]])
def test_the_flag_needs_no_value_and_takes_one(flag: list[str]) -> None:
    assert parse_config([*flag, "--epochs=80"]).dry_run
    assert parse_config(["--epochs=80", *flag]).dry_run
    assert not parse_config(["--dry-run", "false", "--epochs=80"]).dry_run


@pytest.mark.slow
def test_the_command_prints_both_stages_and_writes_nothing(server: Server, tmp_path: Path) -> None:
    result = command(server, tmp_path, *SMALL, "--epochs=80", "--dry-run")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines.index("warm-up") < lines.index("safer") < lines.index("the whole run")
    for words in (" and 6 more", "images/s", "GFLOP per image", "TFLOP/s", "MiB", "it ends 2"):
        assert words in result.stdout
    assert f"  training    {80 * STEPS_PER_EPOCH} steps, 0:" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_each_size_of_images_is_timed_and_the_gain_printed(server: Server, tmp_path: Path) -> None:
    flags = ["--epochs=10", "--selection.warmup_epochs=4", "--data.resolution_schedule=4@0.6,8"]
    result = command(server, tmp_path, *SMALL, "--model.patch_size=2", *flags, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "resolution: 4 pixels from epoch 1 on, 8 pixels from epoch 7 on, in training" in (
        result.stdout
    )
    table = result.stdout.split("evaluation: of")[1].split("the whole run")[0]
    _, *parts = re.split(r"^(?=warm-up at|safer at)", table, flags=re.MULTILINE)
    heads = ["warm-up at 4 pixels", "safer at 4 pixels", "safer at 8 pixels"]
    assert [part.splitlines()[0] for part in parts] == heads

    def figures(words: str) -> list[float]:
        return [float(number) for part in parts for number in re.findall(words, part)]

    gain = r"gain        ([\d.]+) times the [\d.]+ images/s \(.* ms, PGD-3\) of images of the full"
    assert len(figures(gain)) == 2, table
    whole = result.stdout.split("the whole run")[1]
    assert re.search(
        r"gain        [\d.]+ times the 0:.* of images of the full size throughout", whole
    )
    operations = figures(r"attack ([\d.e-]+)")
    assert operations[0] == operations[1] < operations[2]
    num_steps = figures(r"training    (\d+) steps")
    assert [number / STEPS_PER_EPOCH for number in num_steps] == [4, 2, 4]


def test_a_mistake_is_one_line_all_the_same(server: Server, tmp_path: Path) -> None:
    for flags, message in (
        (["--attack.epsilon=8"], "--attack.epsilon: expected"),
        (["--data.max_images=0"], "--data.max_images: expected at least 1, got 0"),
        (
            ["--data.resolution_schedule=4@0.5,8", "--data.image_size=16"],
            "--data.resolution_schedule: expected 16",
        ),
        (["--data.resolution_schedule=4@0.5,16"], "--data.resolution_schedule: expected 8"),
        (["--data.resolution_schedule=3@0.5,8"], "--data.resolution_schedule: expected sizes"),
    ):
        result = command(server, tmp_path, "--dry-run", *flags)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {message}")
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_training_itself_refuses_to_pass_for_a_dry_run(tmp_path: Path) -> None:
    config = parse_config(["--dry-run", "--output", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=r"^dry_run: expected false"):
        train_model(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_slow_steps_end_with_the_time_and_the_table_says_how_many_there_were(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, taken = [0.0], 0
    take_step = Learner.take_step

    def slow(learner: Learner, *arguments: Any) -> float:
        nonlocal taken
        taken += 1
        clock[0] += seconds
        return take_step(learner, *arguments)

    def now() -> float:
        clock[0] += 1e-4
        return clock[0]

    monkeypatch.setattr(Learner, "take_step", slow)
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(f"time.{name}", now)
    for seconds, expected in ((7.0, 4), (100.0, 1), (0.4, NUM_STEPS)):
        taken = 0
        # kernels of attention would be timed by this clock
        cost = dry_run(parse_config([*TWO_STAGES, "--runtime.attention=math"]))
        # a minute for both stages
        assert [stage.num_taken for stage in cost.stages] == [expected] * 2
        assert taken == 2 * expected
        assert [stage.step_s for stage in cost.stages] == [pytest.approx(seconds, abs=0.01)] * 2
        said = capsys.readouterr().out
        assert said.count(f"after {expected} steps") == 2
        # no terminal: lines now and then
        assert ("warm-up: step " in said) == (seconds * expected > 10)


def test_on_a_cpu_few_images_choose_the_layers() -> None:
    probed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "safer_fast.training.selecting.choose_by_probe",
            lambda config, *others: (
                probed.append(config.selection.num_images) or choose_by_probe(config, *others)
            ),
        )
        dry_run(parse_config([*TWO_STAGES, "--runtime.device=cpu"]))
    assert probed == [NUM_PROBED_ON_CPU]


def command(server: Server, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return server.run("-m", "safer_fast.train", *flags, cwd=folder, env=one_thread, timeout=250)


def test_the_most_iterations_and_those_that_an_audit_finds_enough_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    take_step = Learner.take_step

    def watched(learner: Learner, *arguments: Any) -> float:
        rate = take_step(learner, *arguments)
        seen.append(learner.step.attack.steps)
        return rate

    monkeypatch.setattr(Learner, "take_step", watched)
    flags = [*ONE_STAGE, "--attack.steps=auto", "--attack.max_steps=6", "--attack.strength=0.5"]
    cost = dry_run(parse_config(flags))
    assert seen == [2] * NUM_STEPS + [6] * NUM_FULL_STEPS
    (stage,) = cost.stages
    assert stage.attack == "PGD-2"
    assert stage.full_step_s is not None
    assert ", PGD-2\n" in table(cost)
    assert "with attack.max_steps" in table(cost)
