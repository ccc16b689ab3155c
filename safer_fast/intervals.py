"""How sure a share is that was counted."""

from __future__ import annotations

from math import sqrt

_Z = 1.959964  # of a normal distribution, 95 % lie within so many standard deviations


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` trials, at least one (Wilson, 1927)."""
    squares = _Z**2 / count
    centre = (share + squares / 2) / (1 + squares)
    half = _Z * sqrt(share * (1 - share) / count + squares / (4 * count)) / (1 + squares)
    return max(0.0, centre - half), min(1.0, centre + half)
