"""Checks of settings beyond their types, made before anything is loaded or written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import yaml

from safer_fast.config import ranges
from safer_fast.config.attack_names import LIBRARY_ATTACKS, check_attack_name
from safer_fast.config.commands import EvaluateConfig
from safer_fast.config.conversion import converted
from safer_fast.config.messages import meant, shortened, typed
from safer_fast.config.parser import parse_radius
from safer_fast.config.resolution import Resolution
from safer_fast.config.schema import SAVINGS, Config
from safer_fast.config.settings.types import Radius

T = TypeVar("T")


def checked(config: Config) -> Config:
    """Convert and check a configuration made in Python; returns a copy."""
    if not isinstance(config, Config):
        raise ValueError(f"config: expected Config, got {shortened(repr(config))}")
    config = converted(config)
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise ValueError naming the first setting out of its range or contradicting another."""
    check_ranges(config)
    _check_arguments(config.model.arguments)
    _check_together(config)


def check_ranges(config: Any) -> None:
    """Raise ValueError naming the first setting whose number is out of its range."""
    for flag, limits in ranges.find_ranges(config).items():
        value = _value(config, flag)
        if value is None or value == "auto":
            continue
        if expected := limits.expected(value):
            got = f"{value:.10g}" if isinstance(value, float) else shortened(str(value))
            raise ValueError(f"{typed(flag)}: expected {expected}, got {got}")


def as_radius(name: str, value: str | T) -> T | Radius:
    """Convert a text such as 8/255 to its number; any other value is returned as it is.

    Raise ValueError for a text that is neither a number nor a fraction.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_radius(value)
    except ValueError:
        got = shortened(repr(value))
        expected = "a number or a fraction such as 8/255"
        raise ValueError(f"{name}: expected {expected}, got {got}") from None


def check_number(name: str, value: Any, largest: float = math.inf) -> None:
    """Raise ValueError for a function's argument that is no number from 0 to `largest`."""
    is_number = isinstance(value, Real)
    if not is_number:
        raise ValueError(f"{name}: expected a number, got {shortened(repr(value))}")
    if not 0 <= value <= largest:
        expected = f"at most {largest:,.10g}" if value > largest else "at least 0"
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_ball(
    norm: str,
    epsilon: float,
    step_size: float | None = None,
    *,
    shape: Sequence[int] | None = None,
    flags: tuple[str, str] = ("--attack.epsilon", "--attack.step_size"),
) -> None:
    """Raise ValueError for a radius beyond all images, or a step longer than the ball's diameter.

    shape: of an image [C, H, W]; None: not known yet, the largest possible is assumed. flags: names
    of radius and step in messages.
    """
    if norm == "linf":
        largest, words = 1.0, "0 to 1"
    else:
        channels, *edges = shape or (ranges.CHANNELS, ranges.EDGE, ranges.EDGE)
        largest = float(math.prod((channels, *edges)))
        largest = math.sqrt(largest) if norm == "l2" else largest
        words = f"a radius for {norm} of at most {largest:.4g}, the diagonal of all images"
        if shape:
            words += " of " + "x".join(map(str, shape))
    if not 0 <= epsilon <= largest:
        raise ValueError(f"{flags[0]}: expected {words}, got {_in_255ths(epsilon)}")
    diameter = 2 * (epsilon or largest)
    if step_size is not None and not 0 <= step_size <= diameter * (1 + 1e-6):
        raise ValueError(
            f"{flags[1]}: expected at most {diameter:.4g}, the diameter of the ball, got "
            f"{_in_255ths(step_size)}"
        )


def _in_255ths(value: float) -> str:
    """A radius out of range, with the fraction that it probably stands for."""
    if 1 <= value <= 255:
        return f"{value:g}: did you mean {value:g}/255?"
    return f"{value:g} (pixels are in [0, 1])"


def check_new(config: Config) -> None:
    """Raise ValueError for settings that a new run must not have.

    They are empty lists, and settings that contradict each other. Earlier runs may have them and
    can still be read.
    """
    selection, model = config.selection, config.model
    if model.checkpoint is not None and model.pretrained:
        raise ValueError(
            "--model.pretrained: expected false with --model.checkpoint, which has weights, got "
            "true"
        )
    if (size := model.arguments.get("img_size")) is not None:
        raise ValueError(
            "--model.arguments: expected no img_size, which is that of the images "
            f"(--data.image_size), got {shortened(str(size))}"
        )
    patch = model.arguments.get("patch_size", model.patch_size)
    if model.patch_size not in (None, patch):
        raise ValueError(
            f"--model.arguments: expected patch_size {model.patch_size} as --model.patch_size, got "
            f"{shortened(str(patch))}"
        )
    for flag, names in {
        "--selection.layers": selection.layers,
        "--selection.candidates": selection.candidates,
    }.items():
        if names is not None and not names:
            raise ValueError(f"{flag}: expected at least one name or pattern, got none")
    if not config.evaluation.attacks:
        raise ValueError("--evaluation.attacks: expected at least one attack, got none")


def check_evaluation(config: EvaluateConfig, is_given: bool = False) -> None:
    """Raise ValueError for settings that fit no run; is_given: data is given in Python."""
    if config.attacks is not None and not config.attacks:
        raise ValueError("--attacks: expected at least one attack, got none")
    for name in config.attacks or ():
        check_attack_name(name, "--attacks", LIBRARY_ATTACKS)
    check_ranges(config)
    if config.source is None and config.source_weights != "last":
        raise ValueError(
            "--source-weights: expected --source beside it, "
            f"got only {shortened(config.source_weights)}"
        )
    for name in ("image_column", "label_column"):
        if (column := getattr(config, name)) is not None and config.path is None and not is_given:
            raise ValueError(f"--data.{name}: expected --data.path beside it, got only {column}")


def check_file(path: str | None, flag: str) -> None:
    """Raise ValueError if no file can be written at a path, before any work is done."""
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ValueError(
            f"{flag}: expected a file in a folder that exists, got {shortened(repr(path))}"
        )


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for names that are no identifiers, and values that YAML cannot hold."""
    for name in arguments:
        if not str(name).isidentifier():
            hint = "; a space follows each colon" if ":" in str(name) else ""
            raise ValueError(
                "--model.arguments: expected names with values such as {depth: 4}, got "
                f"{{{shortened(str(name))}}}{hint}"
            )
    try:
        yaml.safe_dump(dict(arguments))
    except yaml.representer.RepresenterError as error:
        raise ValueError(
            "--model.arguments: expected numbers, texts, lists and names with values, got "
            f"{shortened(repr(error.args[-1]))}"
        ) from None


def _check_together(config: Config) -> None:
    if config.resume != "never" and config.output is None:
        raise ValueError(
            f"--resume: expected --output with the folder of the run, got {config.resume} alone"
        )
    selection, attack = config.selection, config.attack
    Resolution.of(config)
    if selection.warmup_epochs >= config.epochs and selection.warmup_epochs > 0:
        raise ValueError(
            f"--selection.warmup_epochs: expected less than --epochs {config.epochs}, "
            f"got {selection.warmup_epochs}; give --selection.warmup_epochs "
            f"{3 * config.epochs // 4} too, where a recipe sets it"
        )
    size = config.data.image_size
    shape = None if size is None else (ranges.CHANNELS, size, size)
    check_ball(attack.norm, attack.epsilon, attack.step_size, shape=shape)
    if attack.precision not in ("auto", "amp") and config.amp == "off":
        raise ValueError(f"--attack.precision: expected amp with --amp off, got {attack.precision}")
    if attack.name == "apgd" and attack.steps == "auto":
        raise ValueError("--attack.steps: expected a number with --attack.name apgd, got auto")
    if attack.name == "apgd" and attack.step_size is not None:
        raise ValueError(
            "--attack.step_size: expected none with --attack.name apgd, which begins at 2 epsilon, "
            f"got {attack.step_size:g}"
        )
    if config.objective.name == "mart":
        _check_class_numbers(config, "--objective.name mart", "objective.label_smoothing")
    if attack.loss in ("margin", "dlr"):
        _check_class_numbers(config, f"--attack.loss {attack.loss}")
    if selection.lora_rank:
        for flag in ("optim.ema_decay", "selection.norms"):
            if value := _value(config, flag):
                raise ValueError(
                    f"--{flag}: expected none with --selection.lora_rank, which trains factors "
                    f"alone, got {value}"
                )
    elif selection.adapter == "dora":
        raise ValueError("--selection.adapter: expected --selection.lora_rank N with dora, got 0")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ValueError(f"--optim.betas: expected two shares in [0, 1), got {config.optim.betas}")
    _check_rates(config)
    if unknown := [name for name in config.runtime.exact_savings if name not in SAVINGS]:
        raise ValueError(
            f"--runtime.exact_savings: expected any of {', '.join(SAVINGS)}, got "
            f"{shortened(repr(unknown[0]))}{meant(unknown[0], SAVINGS)}"
        )
    for name in config.evaluation.attacks:
        check_attack_name(name, "--evaluation.attacks")


def _check_class_numbers(config: Config, reason: str, *others: str) -> None:
    """Raise ValueError for settings that make other labels of class numbers."""
    for flag in (*others, "data.mixup", "data.cutmix"):
        if value := _value(config, flag):
            raise ValueError(
                f"--{flag}: expected 0 with {reason}, whose labels are class numbers, got {value}"
            )


def _check_rates(config: Config) -> None:
    optim = config.optim
    milestones = list(optim.milestones)
    if not all(0 < milestone < 1 for milestone in milestones) or milestones != sorted(milestones):
        raise ValueError(
            f"--optim.milestones: expected rising shares in (0, 1), got {optim.milestones}"
        )
    safer = optim.safer_learning_rate or optim.learning_rate
    peak = min(safer, optim.learning_rate) if config.selection.warmup_epochs else safer
    if optim.schedule == "cosine" and optim.min_learning_rate > peak:
        raise ValueError(
            f"--optim.min_learning_rate: expected at most {peak:g}, the peak that the rate falls "
            f"from, got {optim.min_learning_rate:g}"
        )


def _value(config: Any, flag: str) -> Any:
    value = config
    for name in flag.split("."):
        value = getattr(value, name)
    return value
