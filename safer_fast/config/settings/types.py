"""Types of settings that are more than Python's own: radii and lists of names."""

from __future__ import annotations

from typing import Any


class Radius(float):
    """A float that is also accepted as a fraction, such as `8/255`."""


class Names(list[str]):
    """A list of names that is also accepted as one comma-separated string."""


def device_as_text(value: Any) -> Any:
    """The text of a `torch.device`, which settings do not import; any other value as it is."""
    return str(value) if type(value).__name__ == "device" else value
