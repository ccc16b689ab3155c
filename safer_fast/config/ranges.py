"""Ranges of the numbers that users give; each stands beside its field in the dataclass."""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

EPOCHS = 10**6
STEPS = 10**9
IMAGES = 10**9
ITERATIONS = 10**4
"""Most iterations of an attack: each is a forward and a backward pass."""
EDGE = 2**14
"""Most pixels along an edge of an image."""
CHANNELS = 4
"""Most channels of an image whose data are not known yet."""
FACTOR = 10**3
"""Largest rate, weight or radius of weights; no run is known to need a tenth of it."""
T = TypeVar("T")


class Range(NamedTuple):
    """An interval of numbers, both ends included, and the words for numbers outside of it.

    smallest: with a meaning. largest: sane. too_small: words for what is expected in place of a
    smaller number or NaN; too_large: in place of a larger one.
    """

    smallest: float
    largest: float
    too_small: str
    too_large: str

    def expected(self, value: float) -> str | None:
        """The words for what is expected in place of `value`; None for a value inside."""
        if self.smallest <= value <= self.largest:
            return None
        return self.too_large if value > self.largest else self.too_small


def at_least(smallest: float, largest: float) -> Range:
    """Numbers from `smallest` to `largest`, both named in messages."""
    return Range(smallest, largest, f"at least {smallest:g}", f"at most {largest:,.10g}")


def above_zero(largest: float, smallest: float = 1e-12) -> Range:
    """Numbers above 0, to `largest`; below `smallest` they count as 0."""
    return Range(smallest, largest, "above 0", f"at most {largest:,.10g}")


def between(smallest: float, largest: float, noun: str = "a share") -> Range:
    """Numbers from `smallest` to `largest`, named in messages as one interval."""
    return _in_words(smallest, largest, f"{noun} from {smallest:g} to {largest:g}")


def ranged(default: T, limits: Range) -> T:
    """A dataclass field with its range; the words "auto" and null are outside of any range."""
    if default == "auto":
        limits = limits._replace(
            too_small=f"auto or {limits.too_small}", too_large=f"auto or {limits.too_large}"
        )
    return field(default=default, metadata={"range": limits})


def find_ranges(config: Any) -> dict[str, Range]:
    """The ranges of all numbers in a configuration, by flag (`attack.epsilon`)."""
    found = {}
    for item in fields(config):
        if is_dataclass(group := getattr(config, item.name)):
            found.update({f"{item.name}.{flag}": r for flag, r in find_ranges(group).items()})
        elif "range" in item.metadata:
            found[item.name] = item.metadata["range"]
    return found


def _in_words(smallest: float, largest: float, words: str) -> Range:
    return Range(smallest, largest, words, words)


SEED = _in_words(0, 2**31, "a whole number from 0 to 2^31")
FRACTION = _in_words(1e-9, 1, "a share above 0, at most 1")
EPSILON = Range(
    0,
    2 * EDGE,
    "a radius of at least 0",
    "a radius for pixels in [0, 1] such as 8/255",
)
"""The ball's own limits follow from the norm and the images: `checks.check_ball`."""
STEP_SIZE = Range(0, 4 * EDGE, "at least 0", EPSILON.too_large)
