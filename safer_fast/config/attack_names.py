"""The table of attacks by name, free of torch: it decides what flags accept."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from safer_fast.config import ranges
from safer_fast.config.messages import meant, shortened


@dataclass(frozen=True)
class ThreatModel:
    """The ball around each image that attacks stay in.

    norm: linf, l2 or, for attacks of AutoAttack, l1. epsilon: radius, for pixels in [0, 1]. Raises
    ValueError for another norm, and a radius below 0.

    >>> ThreatModel("linf", 8 / 255).norm
    'linf'
    """

    norm: Literal["linf", "l2", "l1"]
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in (norms := ("linf", "l2", "l1")):
            got = f"{shortened(repr(self.norm))}{meant(self.norm, norms)}"
            raise ValueError(f"norm: expected linf, l2 or l1, got {got}")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon: expected a radius of at least 0, got {self.epsilon!r}")

    def __str__(self) -> str:
        radius = f"{self.epsilon:.4g}"
        if self.norm == "linf":
            radius = f"{self.epsilon * 255:.4g}/255"
        return f"{self.norm} {radius}"


@dataclass(frozen=True)
class AttackFacts:
    """A row of the table.

    loss: the loss that is raised; none: no gradients are asked for; empty: nothing attacks. steps:
    iterations of the plain name; None: it needs a number, as in NAME-K. takes_steps: NAME-K is an
    attack too. has_gradients: images without a gradient of use are counted. is_random: it starts at
    a random point, and can be restarted. is_library: pyautoattack computes it, for the evaluate
    command alone. least_classes: its loss compares so many logits. least_size_l2: edge in pixels of
    the smallest images that it is made for in l2 and l1. Only attacks of the library are made for
    l1, and clean, which is in no ball.
    """

    loss: str
    steps: int | None
    takes_steps: bool = False
    has_gradients: bool = False
    is_random: bool = False
    is_library: bool = False
    least_classes: int = 2
    least_size_l2: int = 1


_PGD = AttackFacts("cross-entropy", None, takes_steps=True, has_gradients=True, is_random=True)
_LIBRARY = AttackFacts("none", 5000, is_library=True)

ATTACKS = {
    "clean": AttackFacts("", 0),
    "fgsm": AttackFacts("cross-entropy", 1, has_gradients=True),
    "pgd": _PGD,
    "cw": replace(_PGD, loss="margin", steps=30),
    "apgd-ce": replace(_LIBRARY, loss="cross-entropy", steps=100, has_gradients=True),
    "apgd-dlr": replace(_LIBRARY, loss="dlr", steps=100, has_gradients=True, least_classes=3),
    "square": replace(_LIBRARY, least_size_l2=5),
    "autoattack": replace(_LIBRARY, loss="ensemble", least_classes=4, least_size_l2=5),
}
"""All attacks, in the order in which messages name them. A gradient attack on another loss needs a
row here and the loss in `attacks.named.LOSSES`; `register_attack` adds both from outside."""
LIBRARY_ATTACKS = tuple(name for name, facts in ATTACKS.items() if facts.is_library)
"""Attacks of the evaluate command alone."""


def facts_of(name: str) -> AttackFacts | None:
    """The row of an attack such as fgsm, pgd-20 or cw, with its number of steps; None: unknown."""
    row = ATTACKS.get(name)
    if row is not None and row.steps is not None:
        return row
    found = re.fullmatch(r"(.+)-([0-9]{1,9})", name)
    row = None if found is None else ATTACKS.get(found[1])
    if found is None or row is None or not row.takes_steps:
        return None
    return replace(row, steps=int(found[2]))


def check_attack_name(name: str, flag: str, others: Sequence[str] = ()) -> None:
    """Raise ValueError naming `flag` unless `name` is a gradient attack, clean or one of `others`.

    Numbers of steps are at least 1.
    """
    facts = facts_of(name)
    is_known = facts is not None and (not facts.is_library or name in others)
    if not is_known or (name != "clean" and facts is not None and not facts.steps):
        known = ", ".join(_shown(others))
        hint = _meant(name, others)
        raise ValueError(f"{flag}: expected {known}, got {shortened(repr(name))}{hint}")
    if facts is not None and not facts.is_library and (facts.steps or 0) > ranges.ITERATIONS:
        raise ValueError(f"{flag}: expected at most {ranges.ITERATIONS:,} iterations, got {name}")


def fits_norm(name: str, norm: str) -> bool:
    """True if an attack by this name is made for a norm."""
    facts = facts_of(name)
    return norm != "l1" or name == "clean" or (facts is not None and facts.is_library)


def num_attack_steps(name: str) -> int:
    """Iterations of an attack that `check_attack_name` accepts; 0 for clean."""
    facts = facts_of(name)
    return 0 if facts is None else facts.steps or 0


def has_restarts(name: str) -> bool:
    """True for an attack that starts at a random point and can be restarted."""
    facts = facts_of(name)
    return facts is not None and facts.is_random


def _meant(name: str, others: Sequence[str]) -> str:
    """The words `, did you mean ...?` for an unknown attack, with its number of steps if it has."""
    own = [other for other, facts in ATTACKS.items() if not facts.is_library]
    beginning, _, steps = re.sub("_", "-", name).partition("-")
    if beginning in own and ATTACKS[beginning].takes_steps:
        is_number = re.fullmatch(r"[1-9][0-9]{0,8}", steps)
        return f", did you mean {beginning}-{steps if is_number else 20}?"
    if found := re.fullmatch(r"(.*?)[-_]?([1-9][0-9]{0,8})", name):
        known = [other for other in own if ATTACKS[other].takes_steps]
        hint = f", did you mean {found[1]}?" if found[1] in known else meant(found[1], known)
        return hint.replace("?", f"-{found[2]}?")
    return meant(name, [*(other for other in own if ATTACKS[other].steps is not None), *others])


def _shown(others: Sequence[str]) -> list[str]:
    """Names as a message lists them."""
    shown = []
    for name, facts in ATTACKS.items():
        if facts.is_library:
            continue
        if facts.steps is not None:
            shown.append(name)
        if facts.takes_steps:
            shown.append(f"{name}-K (such as pgd-20)" if name == "pgd" else f"{name}-K")
    return [*shown, *others]
