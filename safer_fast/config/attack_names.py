"""Names of attacks as users type them: checks, and the number of steps in a name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from safer_fast.config import ranges
from safer_fast.config.messages import shortened

CW_STEPS = 30
LIBRARY_ATTACKS = ("apgd-ce", "apgd-dlr", "square", "autoattack")
"""Attacks that only the evaluate command has."""


def check_attack_name(name: str, flag: str, others: Sequence[str] = ()) -> None:
    """Raise ValueError unless `name` is clean, fgsm, pgd-K, cw, cw-K or one of `others`."""
    climb = re.fullmatch(r"(?:pgd|cw)-0*([1-9][0-9]{0,8})", name)
    if name not in ("clean", "fgsm", "cw", *others) and climb is None:
        known = ", ".join(["clean", "fgsm", "pgd-K (such as pgd-20)", "cw", "cw-K", *others])
        raise ValueError(f"{flag}: expected {known}, got {shortened(repr(name))}")
    if climb is not None and int(climb[1]) > ranges.ITERATIONS:
        raise ValueError(f"{flag}: expected at most {ranges.ITERATIONS:,} iterations, got {name}")


def num_attack_steps(name: str) -> int:
    """Number of iterations of clean, fgsm, pgd-K, cw or cw-K; 0 for clean."""
    return {"clean": 0, "fgsm": 1, "cw": CW_STEPS}.get(name) or int(name.partition("-")[2] or 0)
