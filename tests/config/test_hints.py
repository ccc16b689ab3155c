"""Classes of settings in Python: what is set wrongly is refused when it is set."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from typing import Any

import pytest

from safer_fast import AttackConfig, Config, EvaluateConfig
from safer_fast.config.checks import checked
from safer_fast.config.commands import ExportConfig, SelectConfig
from safer_fast.config.schema import Names

UNKNOWN: list[tuple[Any, str, str]] = [
    (Config(), "epoches", "Config: unknown setting 'epoches', did you mean 'epochs'?"),
    (Config(), "lr", "Config: unknown setting 'lr', did you mean 'optim.learning_rate'?"),
    (Config().optim, "lr", "OptimConfig: unknown setting 'lr', did you mean 'learning_rate'?"),
    (Config().optim, "lrr", "OptimConfig: unknown setting 'lrr', did you mean 'learning_rate'?"),
    (Config().optim, "bates", "OptimConfig: unknown setting 'bates', did you mean 'betas'?"),
    (Config().attack, "epsilom", "AttackConfig: unknown setting 'epsilom', did you mean 'epsilon'"),
    (Config(), "to_dict", "Config: unknown setting 'to_dict'"),
    (Config(), "_cache", "Config: unknown setting '_cache'"),
    (EvaluateConfig("run"), "attack", "unknown setting 'attack', did you mean 'attacks'?"),
    (SelectConfig("run"), "fracton", "unknown setting 'fracton', did you mean 'fraction'?"),
    (ExportConfig("run"), "fromat", "unknown setting 'fromat', did you mean 'format'?"),
]


@pytest.mark.parametrize(("settings", "name", "message"), UNKNOWN, ids=lambda v: str(v)[:20])
def test_an_attribute_that_is_no_setting_is_refused_when_it_is_set(
    settings: Any, name: str, message: str
) -> None:
    before = dict(vars(settings))
    with pytest.raises(AttributeError, match=f"{re.escape(message)}") as caught:
        setattr(settings, name, 1)
    assert "\n" not in str(caught.value)
    assert vars(settings) == before


def test_a_dictionary_that_is_set_becomes_its_group() -> None:
    config = Config()
    config.attack = {"epsilon": "4/255", "steps": 3}  # type: ignore[assignment]
    assert config.attack == AttackConfig(epsilon="4/255", steps=3)  # type: ignore[arg-type]
    assert config.attack.norm == "linf"
    config.attack = {"epsilom": 1}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"unknown setting 'attack.epsilom'"):
        checked(config)


def test_settings_are_copied_replaced_and_pickled_as_other_dataclasses_are() -> None:
    config = Config(epochs=3, attack=AttackConfig(norm="l2"))
    config.optim.learning_rate = 0.5
    for other in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config),
        Config(**vars(config)),
        Config(**dataclasses.asdict(config)),
    ):
        assert other == config
        assert vars(other.attack) == vars(config.attack)
    assert dataclasses.replace(config, epochs=4).epochs == 4
    assert dataclasses.replace(config.attack, steps=4).norm == "l2"


def test_a_class_of_settings_can_be_made_into_another() -> None:
    @dataclasses.dataclass
    class Mine(AttackConfig):
        strong: bool = False

    mine = Mine(norm="l2", strong=True)
    mine.strong = False
    with pytest.raises(AttributeError, match="Mine: unknown setting 'stronk'"):
        mine.stronk = True  # type: ignore[attr-defined]


def test_a_configuration_shows_its_changes_and_can_be_made_again_of_them() -> None:
    config = Config.from_recipe("cifar10-safer", amp="bf16", attack={"epsilon": "4/255"})
    config.selection.layers = Names(["head", "blocks.*"])
    config.optim.betas = (0.9, 0.95)
    config.model.arguments = {"depth": 4}
    for other in (Config(), Config(epochs=3), config):
        assert eval(repr(other), {"Config": Config}) == other
        assert "\n" not in repr(other)
    assert repr(Config()) == "Config()"
    assert repr(Config(epochs=3, attack=AttackConfig(steps=2))) == (
        "Config(epochs=3, attack={'steps': 2})"
    )
    assert repr(AttackConfig(norm="l2")) == "AttackConfig(norm='l2')"
    evaluation = EvaluateConfig("runs/x", attacks=Names(["clean"]))
    assert repr(evaluation) == "EvaluateConfig(run='runs/x', attacks=['clean'])"
    assert eval(repr(evaluation)) == evaluation
    assert str(config) == repr(config)
    assert config.to_dict()["attack"]["norm"] == "linf"
    wrong = Config(optim="muon", attack={"epsilom": 1})  # type: ignore[arg-type]
    assert repr(wrong) == "Config(attack={'epsilom': 1}, optim='muon')"


def test_a_recipe_is_changed_by_known_names_alone_and_settings_have_names() -> None:
    with pytest.raises(TypeError, match=r"unknown setting 'epochz', did you mean 'epochs'\?$"):
        Config.from_recipe("cifar10-safer", epochz=3)
    with pytest.raises(TypeError, match="positional"):
        Config("bf16", 3)  # type: ignore[misc]
