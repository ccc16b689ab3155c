"""Stages, epsilon, learning rate and selections follow the configuration."""

import pytest

from safer_fast.attacks.radii import radii_at
from safer_fast.config.schema import (
    AttackConfig,
    Config,
    Names,
    OptimConfig,
    Radius,
    SelectionConfig,
)
from safer_fast.training.schedule import learning_rate_at, stage_of, weaknesses


def test_warm_up_comes_first_and_each_stage_has_its_own_peak() -> None:
    config = Config(epochs=10, selection=SelectionConfig(warmup_epochs=4, every_epochs=3))
    config.optim.learning_rate, config.optim.safer_learning_rate = 0.1, 0.02
    stages = [stage_of(config, epoch) for epoch in range(1, 11)]
    assert [stage.name for stage in stages] == ["warm-up"] * 4 + ["safer"] * 6
    assert [stage.learning_rate for stage in stages] == [0.1] * 4 + [0.02] * 6
    selects = [stage.selects_at(epoch, 3) for epoch, stage in enumerate(stages, start=1)]
    assert [epoch for epoch, yes in enumerate(selects, start=1) if yes] == [1, 5, 8]
    once = [stage.selects_at(epoch, 0) for epoch, stage in enumerate(stages, start=1)]
    assert [epoch for epoch, yes in enumerate(once, start=1) if yes] == [1, 5]


def test_without_warm_up_safer_starts_at_once() -> None:
    stage = stage_of(Config(epochs=3), 1)
    assert (stage.name, stage.first_epoch, stage.num_epochs) == ("safer", 1, 3)


def test_epsilon_waits_then_rises_and_its_step_with_it() -> None:
    config = AttackConfig(epsilon=Radius(0.2), steps=4, clean_epochs=2, epsilon_warmup_epochs=4)
    epsilons, steps = zip(*(radii_at(config, done) for done in (0, 2, 3, 4.5, 6, 9)), strict=True)
    assert epsilons == pytest.approx((0, 0, 0.05, 0.125, 0.2, 0.2))
    assert steps == pytest.approx([2.5 / 4 * epsilon for epsilon in epsilons])


def test_without_a_ramp_epsilon_is_whole_from_the_start() -> None:
    config = AttackConfig(epsilon=Radius(0.2), step_size=Radius(0.07))
    assert radii_at(config, 0) == pytest.approx((0.2, 0.07))
    only_clean = AttackConfig(epsilon=Radius(0.2), clean_epochs=3)
    assert radii_at(only_clean, 2.9)[0] == 0
    assert radii_at(only_clean, 3.1)[0] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("step", [1.0, 1.0, 0.1, 0.01]),
        ("cosine", [1.0, 0.55, 0.1 + 0.9 * 0.1464466, 0.1]),
    ],
)
def test_the_learning_rate_has_the_shape_asked_for(schedule: str, expected: list[float]) -> None:
    config = OptimConfig(schedule=schedule, milestones=(0.75, 0.9), min_learning_rate=0.1)  # type: ignore[arg-type]
    rates = [learning_rate_at(config, 1.0, step, 100, 10) for step in (0, 50, 75, 100)]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_warms_up_linearly() -> None:
    config = OptimConfig(schedule="constant", warmup_epochs=1.0)
    rates = [learning_rate_at(config, 1.0, step, 100, 9) for step in range(10)]
    assert rates == pytest.approx([step / 10 for step in range(1, 11)])


def test_a_ramp_that_ends_before_its_peak_is_told() -> None:
    attack = AttackConfig(epsilon=Radius(0.2), steps=4, clean_epochs=2, epsilon_warmup_epochs=4)
    warmup = SelectionConfig(warmup_epochs=4)
    optim = OptimConfig(warmup_epochs=3)
    config = Config(epochs=7, attack=attack, selection=warmup, optim=optim)
    assert weaknesses(config) == []
    late = weaknesses(Config(epochs=4, attack=attack))
    assert len(late) == 1
    assert "attack.epsilon: reaches 0.1 of 0.2 by the end of --epochs 4" in late[0]
    assert "reaches 0 of 0.2" in weaknesses(Config(epochs=2, attack=attack))[0]
    slow = weaknesses(Config(epochs=6, selection=warmup, optim=optim))
    assert len(slow) == 1
    assert "the 2 of stage safer, whose learning rate reaches 67% of its peak" in slow[0]
    still = weaknesses(Config(attack=AttackConfig(step_size=Radius(0))))
    assert still == ["attack.step_size: 0 leaves every attack at its random start"]
    named = SelectionConfig(layers=Names(["head"]), fraction=0.5, criterion="random")
    assert weaknesses(Config(selection=named)) == [
        "selection.criterion: random does nothing, selection.layers decide",
        "selection.fraction: 0.5 does nothing, selection.layers decide",
    ]
    assert weaknesses(Config(epochs=2, attack=AttackConfig(steps=0, clean_epochs=9))) == []
