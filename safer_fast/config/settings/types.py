"""Types of settings that are more than Python's own: radii and lists of names."""

from __future__ import annotations


class Radius(float):
    """A float that is also accepted as a fraction, such as `8/255`."""


class Names(list[str]):
    """A list of names that is also accepted as one comma-separated string."""
