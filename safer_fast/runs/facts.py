"""Facts of a run that its config.json holds beside timm's settings, checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safer_fast.data.splits import KnownData

KEY = "safer_fast"
"""Name in config.json that they lie under."""
_MOST_PIXELS = 2**16  # along an edge, more than anybody trains on


def checked_facts(facts: Any, file: Path) -> dict[str, Any]:
    """The facts with those that earlier versions did not write; raise ValueError naming `file`."""
    from safer_fast.data.images import short_side

    expected = {"class_names": list, "num_channels": int, "image_size": int}
    for name, kind in expected.items():
        value = facts.get(name) if isinstance(facts, dict) else None
        is_sane = type(value) is kind and (bool(value) if kind is list else _is_size(value))
        if not is_sane:
            raise ValueError(f"{file}: expected {name} of a run under {KEY}, got {value!r:.40}")
    known = facts.get("short_side", short_side(facts["image_size"]))
    if not _is_size(known) or known < facts["image_size"]:
        raise ValueError(f"{file}: expected short_side of a run under {KEY}, got {known!r:.40}")
    return {**facts, "short_side": known}


def known_data(facts: dict[str, Any]) -> KnownData:
    """The facts of the data that the run was trained on; a tower's have no classes."""
    from safer_fast.data.splits import KnownData

    return KnownData(
        None if facts.get("tower") is True else facts["class_names"],
        facts["num_channels"],
        facts["image_size"],
        facts.get("validation_rows"),
        knows_rows="validation_rows" in facts,
        num_extra=facts.get("num_extra", 0),
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MOST_PIXELS
