"""Number of attack iterations chosen by audits: the rule, the measurement, and whole runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from safer_fast.attacks.adaptive import HELD, USUAL_PATIENCE, AdaptiveSteps, Strength
from safer_fast.attacks.audit import Audit
from safer_fast.attacks.pgd import default_step_size, pgd, random_start
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import AttackConfig
from safer_fast.evaluation.overfitting import AttackGap
from safer_fast.runtime.cuda_graphs import Replays
from safer_fast.runtime.ranks import connected
from safer_fast.runtime.seeds import derive_seed
from safer_fast.train import main
from safer_fast.training.trainer import Trainer
from safer_fast.training.validation import Validator
from tests.support.commands import last_line
from tests.support.networks import build, images_and_labels
from tests.support.ranks import FLAGS, together, write_digits
from tests.support.reports import with_reports
from tests.support.small_runs import SMALL, run
from tests.support.tape import TapeRecorder

EPSILON = 0.1


def found(**ratios: float) -> dict[int, Strength]:
    """Strengths of numbers of iterations, `k2=0.99` and so on; as many images right as after 20."""
    return {int(name[1:]): Strength(ratio, 1.0, 40, 40, 64) for name, ratio in ratios.items()}


def searched(**changes: Any) -> AdaptiveSteps:
    """A choice whose first audit found three iterations enough."""
    chosen = AdaptiveSteps(AttackConfig(**changes))
    chosen.update(found(k2=0.97, k3=0.995), EPSILON)
    return chosen


# -- the rule


def test_a_phase_begins_at_the_most_iterations_and_its_first_audit_finds_the_fewest() -> None:
    chosen = AdaptiveSteps(AttackConfig())
    assert chosen.steps == 10
    assert chosen.is_due(EPSILON, 7)
    assert chosen.candidates() == list(range(2, 11))
    chosen.update(found(k2=0.97, k3=0.98, k4=0.991), EPSILON)
    assert chosen.steps == 4
    assert chosen.strength == pytest.approx(0.991)
    assert not chosen.is_due(EPSILON, 7)
    chosen.begin_phase()
    assert chosen.steps == 10
    assert chosen.is_due(EPSILON, 7)


def test_nothing_is_enough_but_the_most() -> None:
    chosen = AdaptiveSteps(AttackConfig(max_steps=3))
    chosen.update(found(k2=0.9, k3=0.95), EPSILON)
    assert chosen.steps == 3


@pytest.mark.parametrize("losses", [(math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf)])
def test_a_loss_that_is_not_finite_is_no_evidence(losses: tuple[float, float]) -> None:
    chosen = AdaptiveSteps(AttackConfig(max_steps=3))
    chosen.update({steps: Strength(*losses, 0, 0, 64) for steps in (2, 3)}, EPSILON)
    assert chosen.steps == 3


def test_it_is_raised_at_once() -> None:
    chosen = searched()
    assert chosen.candidates() == list(range(2, 11))
    chosen.update(found(k2=0.9, k3=0.98, k4=0.985, k5=0.993), EPSILON)
    assert chosen.steps == 5
    # of this audit alone: losses of earlier ones, under a smaller epsilon, are another size
    chosen.update(found(k4=0.99, k5=0.997), EPSILON)
    assert chosen.strength == pytest.approx(0.997)


def test_it_is_lowered_after_several_audits_in_a_row() -> None:
    chosen = searched()
    chosen.update(found(k2=0.995, k3=0.999), EPSILON)
    chosen.update(found(k2=0.98, k3=0.999), EPSILON)  # the row begins anew
    for _ in range(USUAL_PATIENCE):
        assert chosen.steps == 3
        chosen.update(found(k2=0.995, k3=0.999), EPSILON)
    assert chosen.steps == 2


def test_one_iteration_needs_more_audits_than_others() -> None:
    chosen = searched()
    steps = []
    for _ in range(12):
        chosen.update({k: Strength(1, 1, 4, 4, 64) for k in (1, 2, 3) if k >= chosen.steps - 1}, 1)
        steps.append(chosen.steps)
    assert steps == [3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1]


def test_images_that_the_strong_attack_alone_breaks_count_too() -> None:
    chosen = searched()
    strong = dict.fromkeys(range(2, 4), Strength(0.999, 1.0, 40, 40, 64))
    for _ in range(2):  # one image of 64 is no evidence, two of 120 are
        assert chosen.steps == 3
        chosen.update(strong | {3: Strength(0.999, 1.0, 41, 40, 64)} | {4: strong[3]}, EPSILON)
    assert chosen.steps == 4


@pytest.mark.parametrize("is_by_audit", [True, False])
def test_signs_of_catastrophic_overfitting_hold_the_most_iterations(is_by_audit: bool) -> None:
    chosen = searched()
    if is_by_audit:
        assert "ceased to work" in str(chosen.update(found(k2=0.3, k3=0.4, k4=1.0), EPSILON))
    else:
        chosen.sound_alarm()
    for _ in range(HELD):
        assert chosen.steps == 10
        assert not chosen.is_due(EPSILON, 7)
        assert chosen.candidates() == [10]
        chosen.update(found(k10=1.0), EPSILON)
    assert chosen.is_due(EPSILON, 7)
    chosen.update(found(k2=0.999), EPSILON)
    assert chosen.steps == 2
    assert chosen.candidates()[0] == 2  # one is not tried again
    chosen.begin_phase()
    chosen.update(found(k2=0.999), EPSILON)
    assert chosen.candidates()[0] == 1


def test_a_ramp_is_audited_as_epsilon_grows() -> None:
    chosen = AdaptiveSteps(AttackConfig())
    assert not chosen.is_due(0.0, 0)
    audited = []
    for number in range(1, 100):
        if chosen.is_due(number / 100, number):
            chosen.update(found(k2=0.999), number / 100)
            audited.append(number)
    assert audited == [1, 3, 7, 15, 31, 63]


def test_its_state_is_numbers_that_json_keeps() -> None:
    chosen, other = searched(), AdaptiveSteps(AttackConfig())
    chosen.update(found(k2=0.995, k3=0.999), EPSILON)
    other.load_state_dict(json.loads(json.dumps(chosen.state_dict())))
    assert other.state_dict() == chosen.state_dict()
    assert other.strength == chosen.strength == 0.999
    for choice in (chosen, other):
        choice.update(found(k2=0.995, k3=0.9, k4=1.0), EPSILON)
    assert other.steps == chosen.steps == 4
    other.load_state_dict({})  # of a run before there were audits of steps
    assert other.steps == 10


# -- the measurement


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_strength_is_the_loss_after_the_attack_over_that_after_pgd_20(norm: Any) -> None:
    model = build()
    images, labels = images_and_labels(64)
    config = AttackConfig(norm=norm, epsilon=0.2, audit_images=64, strength=0.0)
    audit = Audit(ReplayedAttack(model, norm=norm, steps=10), config)
    audit.choose_steps(0, images, labels, 1.0)
    assert audit.attack_steps == 2
    measured = audit.state_dict()
    starts = []
    images, labels = images[:32], labels[:32]
    for number, part in enumerate(images.split(16)):  # quarters, each from a start of its own
        draws = torch.Generator().manual_seed(derive_seed(0, "audit", 0, number, 0))
        starts.append(random_start(part, torch.tensor(0.2), norm, draws))
    for name, steps in (("own", 2), ("strong", 20)):
        attacked = pgd(
            model,
            images,
            labels,
            epsilon=0.2,
            step_size=default_step_size(0.2, steps),
            steps=steps,
            norm=norm,
            start=torch.cat(starts),
        )
        with torch.no_grad():
            logits = model(attacked)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        assert measured[f"2 {name}_loss"] == pytest.approx(float(loss), rel=1e-4)
        assert measured[f"2 {name}_right"] == (logits.argmax(1) == labels).sum()
    assert measured["2 own_loss"] < measured["2 strong_loss"]
    assert measured["2 num_images"] == 32
    assert audit.take_seconds() > 0
    assert audit.take_seconds() == 0


@pytest.mark.slow
def test_an_audit_leaves_the_training_attack_as_it_was() -> None:
    model = build()
    images, labels = images_and_labels(16)
    epsilon, step_size = torch.tensor(EPSILON), torch.tensor(0.05)
    attacked = []
    for is_audited in (False, True):
        attack = ReplayedAttack(
            model,
            steps=2,
            generator=torch.Generator().manual_seed(1),
            replays=Replays(TapeRecorder()),
        )
        audit = Audit(attack, AttackConfig(epsilon=EPSILON, max_steps=2))
        for number in range(6):  # warmed up, recorded, replayed
            if is_audited:
                audit.begin_phase()
                audit.choose_steps(number, images, labels, 1.0)
            attacked.append(attack(images, labels, epsilon, step_size).clone())
    for alone, beside in zip(attacked[:6], attacked[6:], strict=True):
        assert torch.equal(alone, beside)
    assert {key[0] for key in attack.replays.recorded} == {"attack", "audit"}


# -- runs

AUTO = ("--attack.steps=auto", "--attack.max_steps=4", "--attack.audit_every=2")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of this kind."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


@pytest.mark.slow
def test_a_run_says_how_many_iterations_it_took_and_how_strong_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with with_reports():
        folder = run(tmp_path / "run", *AUTO)
    steps = events(folder, "step")
    assert all(line["attack_steps"] == 0 for line in steps if line["epoch"] == 1)
    attacked = [line for line in steps if line["epoch"] > 2]  # a ramp begins at 0
    assert {line["attack_steps"] for line in attacked} <= {1, 2, 3, 4}
    assert min(line["attack_steps"] for line in attacked) < 4
    assert all(0.9 < line["attack_strength"] < 1.1 for line in attacked)
    assert all(len(line["attack_success"]) == 5 for line in attacked)
    epochs = events(folder, "epoch")
    assert epochs[0]["attack_strength"] is None
    assert all(0 < line["audit_fraction"] < 1 for line in epochs[1:])
    said = capsys.readouterr().out
    assert "PGD of at most 4 steps" in said
    assert "(strength " in said
    assert "Strength of the training attack" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_fixed_number_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "--attack.steps=3", "--epochs=3")
    attacked = [line for line in events(folder, "step") if line["epoch"] == 3]
    assert all(line["attack_steps"] == 3 for line in attacked)
    assert all(line["attack_strength"] is None for line in attacked)
    assert all(line["audit_fraction"] == 0 for line in events(folder, "epoch"))


@pytest.mark.slow
def test_the_sentinel_raises_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Validator, "attack_gap", lambda *_: AttackGap(0.9, 0.0, 64))
    folder = run(tmp_path / "run", *AUTO, "--epochs=3")
    attacked = [line for line in events(folder, "step") if line["epoch"] == 3]
    assert attacked
    assert all(line["attack_steps"] == 4 for line in attacked)
    assert "attack.steps: 4 for the next audits" in capsys.readouterr().out


def choices(flags: list[str]) -> tuple[list[int], dict[str, float]]:
    """Iterations of the first steps of a run on this rank, and what its audits found."""
    with connected(wants_gpu=False) as ranks, Trainer(parse_config(flags), ranks) as trainer:
        trainer.begin_epoch(1)
        steps = []
        for index, batch in zip(range(4), trainer.data.train.epoch(1), strict=False):
            number = len(trainer.data.train)
            trainer.learner.take_step(trainer.stage, 1, index, number, batch, index)
            steps.append(trainer.step.attack.steps)
        return steps, trainer.engine.audit.state_dict()


@pytest.mark.slow
def test_ranks_choose_alike(tmp_path: Path) -> None:
    flags = [*FLAGS, *AUTO, f"--data.path={write_digits(tmp_path / 'digits.npz')}"]
    flags += ["--attack.clean_epochs=0", "--attack.epsilon_warmup_epochs=0"]
    flags += ["--attack.strength=0.999", f"--output={tmp_path / 'run'}"]
    first, second = together(2, choices, flags)
    assert first == second
    assert first[1]["2 num_images"] > 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--attack.steps=some", "--attack.steps: expected auto or a whole number, got some"),
        ("--attack.steps=-1", "--attack.steps: expected auto or at least 0, got -1"),
        ("--attack.strength=1.1", "--attack.strength: expected a share from 0 to 1, got 1.1"),
        ("--attack.max_steps=0", "--attack.max_steps: expected at least 1, got 0"),
    ],
)
def test_other_values_are_refused(
    flag: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert last_line(capsys, main, *SMALL, flag) == f"error: {message}\n"
