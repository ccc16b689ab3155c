"""Gradient masking: signs that attacks failed for want of gradients, not for a robust model.

An accuracy under a gradient attack bounds the robust accuracy from above. Carlini et al. ("On
Evaluating Adversarial Robustness", 2019, arXiv 1902.06705, section 4) and Croce et al. ("Reliable
Evaluation of Adversarial Robustness", 2020, arXiv 2003.01690; "Evaluating the Adversarial
Robustness of Adaptive Test-time Defenses", 2022, arXiv 2202.13711) name signs that the bound is
loose. Those used here:

- the gradient is exactly zero or not finite on over 5 % of the images;
- an attack without gradients (square) or on another loss (cw, apgd-dlr) leaves clearly less than
  the strongest attack on the cross-entropy, or apgd-ce clearly less than pgd; autoattack over 10
  points less, as models trained with PGD lose 3 to 5 to its targeted attacks and hide nothing;
- more iterations leave clearly more;
- a random start alone fools clearly more.

Clearly is over 3 points, and more than chance gives: the 95 % interval of the difference (Agresti &
Caffo, 2000) leaves 0 out. Beaten attacks must have ten iterations, or as many as the other one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safer_fast.config.attack_names import facts_of, has_restarts

Row = Mapping[str, Any]
"""An evaluation as metrics.jsonl has it."""
MOST_BLIND = 0.05
SMALLEST_GAP = 0.03
ENSEMBLE_GAP = 0.10
ENOUGH_STEPS = 10
_Z = 1.959964  # of a normal distribution, 95 % lie within so many standard deviations
_PLACE = ("weights", "split", "norm", "epsilon", "source", "num_images")


def suspicions(rows: Sequence[Row]) -> list[list[str]]:
    """Reasons, for each row, why its accuracy may be far above the robust one; empty: no sign.

    Rows are compared where weights, split, norm, epsilon, source and number of images are the same.
    """
    places = defaultdict(list)
    for row in rows:
        places[_place(row)].append(row)
    return [_reasons(row, places[_place(row)]) for row in rows]


def with_verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with their `suspicions` as `gradient_masking`, and `upper_bound`: any of them."""
    found = suspicions(rows)
    return [
        {**row, "gradient_masking": reasons, "upper_bound": bool(reasons)}
        for row, reasons in zip(rows, found, strict=True)
    ]


def has_gradients(attack: str) -> bool:
    """True for an attack whose images without a gradient of use are counted."""
    facts = facts_of(attack)
    return facts is not None and facts.has_gradients


def starts_at_random(attack: str) -> bool:
    """True for an attack whose random start is classified too."""
    return has_gradients(attack) and has_restarts(attack)


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) or None for name in _PLACE)


def _reasons(row: Row, others: Iterable[Row]) -> list[str]:
    if not (has_gradients(str(row["attack"])) and row["epsilon"] and _is_measured(row)):
        return []
    known = [other for other in others if _is_measured(other)]
    found = [_without_gradient(row), _worse_than_its_start(row)]
    if not row.get("source"):  # what more iterations gain on one model may be lost on another
        found += [_worse_than_another_loss(row, known), _worse_than_fewer_steps(row, known)]
    return [reason for reason in found if reason]


def _without_gradient(row: Row) -> str:
    count, num_images = row.get("num_zero_gradients") or 0, row["num_images"]
    # an image that is wrong anyhow does not raise the accuracy
    if min(count, round(row["accuracy"] * num_images)) <= MOST_BLIND * num_images:
        return ""
    return f"the gradient is zero or not finite on {count} of {num_images} images"


def _worse_than_its_start(row: Row) -> str:
    start = row.get("start_accuracy")
    if start is None or not _is_clear(row["accuracy"], start, row["num_images"]):
        return ""
    return f"its random start alone leaves {start:.1%}"


def _worse_than_another_loss(row: Row, others: Sequence[Row]) -> str:
    """Sign that the strongest attack on the cross-entropy is beaten by one on another loss."""
    plain = [other for other in others if _kind(other)[0] == "cross-entropy"]
    if _kind(row)[0] != "cross-entropy":
        return ""
    for other in sorted(others, key=lambda other: float(other["accuracy"])):
        loss, steps = _kind(other)
        beaten = plain
        if other["attack"] == "apgd-ce" != row["attack"]:  # the same loss, raised further
            beaten = [one for one in plain if one["attack"] != "apgd-ce"]
        elif loss in ("", "cross-entropy"):
            continue
        best = min(beaten, key=lambda one: (one["accuracy"], -_kind(one)[1]))
        if (
            _kind(best)[1] >= min(ENOUGH_STEPS, steps)
            and _restarts(best) >= _restarts(other)
            and _is_clear(
                best["accuracy"],
                other["accuracy"],
                row["num_images"],
                ENSEMBLE_GAP if loss == "ensemble" else SMALLEST_GAP,
            )
        ):
            return (
                f"{other['attack']} leaves {other['accuracy']:.1%}, the strongest attack on "
                f"the cross-entropy, {best['attack']}, {best['accuracy']:.1%}"
            )
    return ""


def _worse_than_fewer_steps(row: Row, others: Sequence[Row]) -> str:
    loss, num_steps = _kind(row)
    for other in sorted(others, key=lambda other: float(other["accuracy"])):
        same_loss, steps = _kind(other)
        if (
            (same_loss == loss and steps < num_steps)
            and _restarts(other) <= _restarts(row)
            and _is_clear(row["accuracy"], other["accuracy"], row["num_images"])
        ):
            return f"{other['attack']} with fewer iterations leaves {other['accuracy']:.1%}"
    return ""


def _is_clear(higher: float, lower: float, count: int, gap: float = SMALLEST_GAP) -> bool:
    """True where shares of so many images differ by more than the gap, and than chance gives."""
    ones, twos = ((share * count + 1) / (count + 2) for share in (higher, lower))
    noise = _Z * math.sqrt((ones * (1 - ones) + twos * (1 - twos)) / (count + 2))
    return higher - lower > gap and ones - twos > noise


def _kind(row: Row) -> tuple[str, int]:
    """The loss that the attack of a row raises, and its iterations; no loss where not known."""
    facts = facts_of(str(row["attack"]))
    return ("", 0) if facts is None else (facts.loss, facts.steps or 0)


def _restarts(row: Row) -> int:
    return row.get("restarts") or 1


def _is_measured(row: Row) -> bool:
    return row.get("accuracy") is not None and (row.get("num_images") or 0) > 0
