"""Settings that have no effect beside others: a line for each that is not the usual one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from safer_fast.config.schema import Config
from safer_fast.config.settings.data import GIVEN


class Rule(NamedTuple):
    """Settings of one group that have no effect where `applies` is true, and a reason for it."""

    group: str
    names: tuple[str, ...]
    applies: Callable[[Config], bool]
    reason: str


RULES = (
    Rule(
        "selection",
        ("criterion", "fraction", "from_block", "candidates"),
        lambda config: config.selection.layers is not None,
        "selection.layers decide",
    ),
    Rule(
        "selection",
        ("fraction", "from_block", "candidates", "rho", "num_images"),
        lambda config: config.selection.criterion == "all" and config.selection.layers is None,
        "selection.criterion all trains everything",
    ),
    Rule(
        "attack",
        ("name", "loss", "step_size", "max_steps"),
        lambda config: config.attack.is_none,
        "training has no attack",
    ),
    Rule(
        "attack",
        ("max_steps",),  # recipes set attack.strength, and leave attack.steps to the user
        lambda config: config.attack.steps != "auto",
        "it is one of attack.steps auto",
    ),
    Rule(
        "attack",
        ("audit_every", "audit_images"),
        lambda config: config.attack.steps != "auto" and config.attack.precision == "amp",
        "nothing is audited",
    ),
    Rule(
        "attack",
        ("audit_ratio",),
        lambda config: config.attack.precision == "amp",
        "attack.precision is amp",
    ),
    Rule(
        "attack",
        ("fp8_from",),
        lambda config: config.attack.precision != "fp8",
        "attack.precision is not fp8",
    ),
    Rule(
        "objective",
        ("beta",),
        lambda config: config.objective.name not in ("trades", "mart"),
        "objective.name is neither trades nor mart",
    ),
    Rule(
        "objective",
        ("temperature",),
        # an evaluation of a tower may bring text embeddings later
        lambda config: (
            config.objective.text_embeddings is None
            and config.objective.name not in ("fare", "tecoa")
        ),
        "it is one of objective.text_embeddings",
    ),
    Rule(
        "sam",
        ("adaptive", "layerwise", "sync"),
        lambda config: not config.sam.rho,
        "sam.rho is 0",
    ),
    Rule(
        "optim",
        ("momentum",),
        lambda config: config.optim.name not in ("sgd", "apex-sgd"),
        "optim.name is not sgd",
    ),
    Rule(
        "optim",
        ("betas",),
        lambda config: config.optim.name in ("sgd", "apex-sgd"),
        "optim.name is sgd",
    ),
    Rule(
        "optim",
        ("milestones", "decay"),
        lambda config: config.optim.schedule != "step",
        "optim.schedule is not step",
    ),
    Rule(
        "optim",
        ("min_learning_rate",),
        lambda config: config.optim.schedule != "cosine",
        "optim.schedule is not cosine",
    ),
    Rule(
        "objective",
        ("label_smoothing",),
        lambda config: config.objective.name == "fare",
        "objective.name fare compares embeddings",
    ),
    Rule(
        "data",
        ("extra_fraction",),
        lambda config: config.data.extra_path is None and config.data.path != GIVEN,
        "there is no data.extra_path",
    ),
    Rule(
        "data",
        ("validation_fraction",),
        lambda config: config.data.validation_path is not None,
        "data.validation_path is given",
    ),
)


def unused_settings(config: Config) -> list[str]:
    """A line for each setting that has no effect, unless it has its default; each once."""
    found: dict[str, str] = {}
    usual = Config()
    for rule in RULES:
        if not rule.applies(config):
            continue
        own, others = getattr(config, rule.group), getattr(usual, rule.group)
        for name in rule.names:
            value = getattr(own, name)
            if value != getattr(others, name):
                line = f"{rule.group}.{name}: {_shown(value)} does nothing, {rule.reason}"
                found.setdefault(f"{rule.group}.{name}", line)
    return list(found.values())


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
