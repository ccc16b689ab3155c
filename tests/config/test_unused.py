"""Settings that have no effect beside others are told, each in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from safer_fast import train
from safer_fast.config.command_line import parse_config
from safer_fast.config.recipe_files import recipes
from safer_fast.config.unused import RULES, unused_settings
from tests.support.small_runs import TINY


@pytest.mark.parametrize("name", recipes())
def test_recipes_set_nothing_that_has_no_effect(name: str) -> None:
    assert unused_settings(parse_config(["--config", name, "--data.path=digits"])) == []


def test_rules_are_on_settings_and_the_usual_ones_are_no_news() -> None:
    usual = parse_config([])
    for rule in RULES:
        assert all(hasattr(getattr(usual, rule.group), name) for name in rule.names)
    assert unused_settings(usual) == []


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            "--attack.steps=5 --attack.max_steps=3",
            ["attack.max_steps: 3 does nothing, it is one of attack.steps auto"],
        ),
        (
            "--objective.beta=2 --objective.temperature=3",
            [
                "objective.beta: 2.0 does nothing, objective.name is neither trades nor mart",
                "objective.temperature: 3.0 does nothing, it is one of objective.text_embeddings",
            ],
        ),
        ("--objective.name=trades --objective.beta=2", []),
        ("--objective.name=fare --objective.temperature=3", []),
        (
            "--objective.name=fare --objective.label_smoothing=0.1",
            [
                "objective.label_smoothing: 0.1 does nothing, objective.name fare compares "
                "embeddings"
            ],
        ),
        (
            "--data.extra_fraction=0.2",
            ["data.extra_fraction: 0.2 does nothing, there is no data.extra_path"],
        ),
        (
            "--attack.name=apgd --attack.steps=0",
            ["attack.name: apgd does nothing, training has no attack"],
        ),
        (
            "--attack.steps=0 --attack.max_steps=3",
            ["attack.max_steps: 3 does nothing, training has no attack"],
        ),
        (
            "--selection.criterion=all --selection.candidates=blocks.0.*,head --sam.rho=0 "
            "--sam.adaptive=true",
            [
                "selection.candidates: blocks.0.*,head does nothing, selection.criterion all "
                "trains everything",
                "sam.adaptive: True does nothing, sam.rho is 0",
            ],
        ),
        (
            "--optim.momentum=0.5 --optim.decay=0.5 --optim.schedule=constant "
            "--optim.min_learning_rate=1e-5",
            [
                "optim.momentum: 0.5 does nothing, optim.name is not sgd",
                "optim.decay: 0.5 does nothing, optim.schedule is not step",
                "optim.min_learning_rate: 1e-05 does nothing, optim.schedule is not cosine",
            ],
        ),
        ("--optim.name=sgd --optim.momentum=0.5 --optim.schedule=step --optim.decay=0.5", []),
    ],
)
def test_each_setting_without_effect_has_a_line(flags: str, lines: list[str]) -> None:
    assert unused_settings(parse_config(flags.split())) == lines


def test_a_run_tells_them_and_counts_final_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data.max_images=24", "--evaluation.final_images=10", "--objective.beta=2"]
    train.main([*TINY, *flags, "--output", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "note:       objective.beta: 2.0 does nothing, objective.name is neither" in printed
    assert "figures of 10 of 797 images, stratified by class" in printed
    assert printed.count("10 of 797") >= 7  # the start's, the best and the last weights' rows
