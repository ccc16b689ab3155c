"""What select prints: a row for each layer, a column for each criterion, and how they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safer_fast.select_scores import Scores

_COLUMN = 19


def score_table(scores: Mapping[str, Scores], selected: Mapping[str, Sequence[str]]) -> str:
    """Scores with their places, the first criterion's highest on top; * marks what is selected."""
    places = {name: _places(by_layer) for name, by_layer in scores.items()}
    order = next(iter(places.values()))
    width = max(len(layer) for layer in order) + 1
    lines = [" " * width + "".join(f"{name:>{_COLUMN}}" for name in scores)]
    for layer in order:
        cells = (
            f"{by_layer[layer]:.3e} {places[name][layer]:>4}"
            f"{'*' if layer in selected[name] else ' '}"
            for name, by_layer in scores.items()
        )
        lines.append(f"{layer:<{width}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def correlation_table(correlations: Mapping[str, Mapping[str, float | None]]) -> str:
    """Spearman's rank correlation of each criterion with each; - where one ranks nothing."""
    width = max(len(name) for name in correlations) + 1
    lines = ["rank correlation (Spearman)", " " * width + "".join(f"{n:>20}" for n in correlations)]
    for name, row in correlations.items():
        values = ("-" if value is None else f"{value:.3f}" for value in row.values())
        lines.append(f"{name:<{width}}" + "".join(f"{value:>20}" for value in values))
    return "\n".join(lines)


def _places(scores: Scores) -> dict[str, int]:
    """The place of each layer, 1 for the highest score; equal scores are ordered by name."""
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    return {name: place for place, name in enumerate(ranked, start=1)}
