"""Ranges that types cannot say, checked once before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safer_fast.config import SAVINGS, Config

CW_STEPS = 30
LIBRARY_ATTACKS = ("apgd-ce", "apgd-dlr", "square", "autoattack")
"""Attacks of the evaluate command alone."""

_RANGES: dict[str, tuple[str, float, float]] = {
    # flag: (what is expected, smallest, largest); both ends included
    "seed": ("a whole number from 0 to 2^31", 0, 2**31),
    "epochs": ("at least 1", 1, float("inf")),
    "batch_size": ("at least 1", 1, float("inf")),
    "model.patch_size": ("at least 1", 1, float("inf")),
    "model.drop_path_rate": ("a share from 0 to 0.99", 0, 0.99),
    "data.validation_fraction": ("a share from 0.001 to 0.9", 0.001, 0.9),
    "data.max_images": ("at least 1", 1, float("inf")),
    "data.image_size": ("at least 2", 2, float("inf")),
    "data.randaugment": ("a magnitude from 0 to 30", 0, 30),
    "data.random_erasing": ("a share from 0 to 1", 0, 1),
    "data.mixup": ("at least 0", 0, float("inf")),
    "data.cutmix": ("at least 0", 0, float("inf")),
    "data.num_workers": ("at least 0", 0, float("inf")),
    "data.prefetch": ("at least 1", 1, float("inf")),
    "attack.epsilon": ("a radius of at least 0 for pixels in [0, 1]", 0, float("inf")),
    "attack.steps": ("at least 0", 0, float("inf")),
    "attack.step_size": ("at least 0", 0, float("inf")),
    "attack.clean_epochs": ("at least 0", 0, float("inf")),
    "attack.epsilon_warmup_epochs": ("at least 0", 0, float("inf")),
    "attack.fp8_from": ("auto or at least 0", 0, float("inf")),
    "attack.audit_every": ("at least 1", 1, float("inf")),
    "attack.audit_images": ("at least 1", 1, float("inf")),
    "attack.audit_ratio": ("a share from 0 to 1", 0, 1),
    "objective.beta": ("at least 0", 0, float("inf")),
    "objective.label_smoothing": ("a share from 0 to 0.99", 0, 0.99),
    "selection.fraction": ("a share above 0, at most 1", 1e-9, 1),
    "selection.every_epochs": ("at least 0", 0, float("inf")),
    "selection.warmup_epochs": ("at least 0", 0, float("inf")),
    "selection.rho": ("above 0", 1e-12, float("inf")),
    "selection.from_block": ("at least 0", 0, float("inf")),
    "selection.num_images": ("at least 1", 1, float("inf")),
    "selection.lora_rank": ("at least 0", 0, float("inf")),
    "sam.rho": ("at least 0", 0, float("inf")),
    "optim.learning_rate": ("above 0", 1e-12, float("inf")),
    "optim.safer_learning_rate": ("above 0", 1e-12, float("inf")),
    "optim.weight_decay": ("at least 0", 0, float("inf")),
    "optim.momentum": ("a share from 0 to 0.9999", 0, 0.9999),
    "optim.warmup_epochs": ("at least 0", 0, float("inf")),
    "optim.decay": ("a factor from 0 to 1", 0, 1),
    "optim.min_learning_rate": ("at least 0", 0, float("inf")),
    "optim.clip_norm": ("above 0", 1e-12, float("inf")),
    "optim.ema_decay": ("a share from 0 to 0.999999", 0, 0.999999),
    "runtime.num_threads": ("at least 1", 1, float("inf")),
    "runtime.attack_micro_batch": ("auto or at least 1", 1, float("inf")),
    "runtime.train_micro_batch": ("auto or at least 1", 1, float("inf")),
    "runtime.log_every_steps": ("at least 1", 1, float("inf")),
    "runtime.max_skipped_steps": ("at least 1", 1, float("inf")),
    "checkpoint.every_steps": ("at least 1", 1, float("inf")),
    "checkpoint.every_minutes": ("above 0", 1e-9, float("inf")),
    "checkpoint.keep": ("at least 1", 1, float("inf")),
    "checkpoint.grace_s": ("above 0", 1e-3, float("inf")),
    "evaluation.every_epochs": ("at least 1", 1, float("inf")),
    "evaluation.steps": ("at least 1", 1, float("inf")),
    "evaluation.max_images": ("at least 1", 1, float("inf")),
    "evaluation.patience": ("at least 1", 1, float("inf")),
    "evaluation.sentinel_images": ("at least 0", 0, float("inf")),
}


def check_config(config: Config) -> None:
    """Every setting is within its range; raises ValueError with the first flag that is not."""
    for flag, (expected, smallest, largest) in _RANGES.items():
        value = _value(config, flag)
        if value is not None and value != "auto" and not smallest <= value <= largest:
            raise ValueError(f"{_typed(flag)}: expected {expected}, got {value}")
    _check_together(config)


def _check_together(config: Config) -> None:
    if config.resume != "never" and config.output is None:
        raise ValueError(
            f"--resume: expected --output with the folder of the run, got {config.resume} alone"
        )
    selection, attack = config.selection, config.attack
    if selection.warmup_epochs >= config.epochs and selection.warmup_epochs > 0:
        raise ValueError(
            f"--selection.warmup_epochs: expected less than --epochs {config.epochs}, "
            f"got {selection.warmup_epochs}"
        )
    if attack.norm == "linf" and attack.epsilon > 1:
        raise ValueError(
            f"--attack.epsilon: expected a radius in [0, 1] for linf, got {attack.epsilon:g} "
            "(pixels are in [0, 1]; write 8/255, not 8)"
        )
    if attack.precision != "amp" and config.amp == "off":
        raise ValueError(f"--attack.precision: expected amp with --amp off, got {attack.precision}")
    if config.objective.name == "mart":
        for flag in ("objective.label_smoothing", "data.mixup", "data.cutmix"):
            if value := _value(config, flag):
                raise ValueError(
                    f"--{flag}: expected 0 with --objective.name mart, whose labels are class "
                    f"numbers, got {value}"
                )
    if selection.lora_rank:
        for flag in ("optim.ema_decay", "selection.norms"):
            if value := _value(config, flag):
                raise ValueError(
                    f"--{flag}: expected none with --selection.lora_rank, which trains factors "
                    f"alone, got {value}"
                )
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ValueError(f"--optim.betas: expected two shares in [0, 1), got {config.optim.betas}")
    if not all(0 < milestone < 1 for milestone in config.optim.milestones):
        raise ValueError(
            f"--optim.milestones: expected shares in (0, 1), got {config.optim.milestones}"
        )
    if unknown := [name for name in config.runtime.exact_savings if name not in SAVINGS]:
        raise ValueError(
            f"--runtime.exact_savings: expected any of {', '.join(SAVINGS)}, got {unknown[0]!r}"
        )
    for name in config.evaluation.attacks:
        check_attack_name(name, "--evaluation.attacks")


def check_attack_name(name: str, flag: str, others: Sequence[str] = ()) -> None:
    """`name` is clean, fgsm, pgd-K, cw, cw-K or one of `others`.

    Raises ValueError naming `flag` otherwise.
    """
    kind, dash, steps = name.partition("-")
    is_climb = kind in ("pgd", "cw") and dash and steps.isascii() and steps.isdigit()
    if name not in ("clean", "fgsm", "cw", *others) and not (is_climb and int(steps) > 0):
        known = ", ".join(["clean", "fgsm", "pgd-K (such as pgd-20)", "cw", "cw-K", *others])
        raise ValueError(f"{flag}: expected {known}, got {name!r}")


def num_attack_steps(name: str) -> int:
    """Iterations of clean, fgsm, pgd-K, cw or cw-K; 0 for clean."""
    return {"clean": 0, "fgsm": 1, "cw": CW_STEPS}.get(name) or int(name.partition("-")[2] or 0)


def _value(config: Config, flag: str) -> Any:
    value: Any = config
    for name in flag.split("."):
        value = getattr(value, name)
    return value


def _typed(flag: str) -> str:
    """The flag as users type it: --batch-size, but --attack.step_size."""
    return "--" + (flag if "." in flag else flag.replace("_", "-"))
