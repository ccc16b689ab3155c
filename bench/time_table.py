"""Tables of `bench.time_to_accuracy` and `bench.studies.warm_start`, from their rows alone."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest

Row = dict[str, Any]


def time_tables(rows: Sequence[Row]) -> str:
    """For each case: seconds of every implementation, and accuracies with 95 % intervals."""
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        first, attacks = own[0], list(own[0]["accuracies"])
        caption = (
            f"{case}; {first['dtype']}, {'compiled' if first['compiled'] else 'eager'}; trains "
            f"{', '.join(f'`{name}`' for name in first['layers'])}; {first['device']}, torch "
            f"{first['torch']}; {first['date'][:10]}. Accuracy in % on {first['num_images']} test "
            "images, with 95 % intervals:"
        )
        lines = [
            [
                row["implementation"],
                f"{row['seconds']:.0f}",
                f"{row['speed_of_ours']:.2f}",
                f"{row['iterations']:,}",
                *(_accuracy(row["accuracies"][name], row["num_images"]) for name in attacks),
            ]
            for row in own
        ]
        heads = ["training", "seconds", "times as long as auto", "iterations of attacks", *attacks]
        parts.append(textwrap.fill(caption, 100) + "\n\n" + _markdown(heads, lines))
    return "\n".join(parts)


def warm_start_table(rows: Sequence[Row]) -> str:
    """Mean strength of each way to attack, a line for each case."""
    first, names = rows[0], list(rows[0]["strengths"])
    lines = [
        [row["case"], *(f"{statistics.mean(row['strengths'][name]):.3f}" for name in names)]
        for row in rows
    ]
    caption = (
        f"{first['device']}, torch {first['torch']}; {first['date'][:10]}; loss over PGD-20's:"
    )
    return f"{caption}\n\n" + _markdown(["case", *names], lines)


def _accuracy(share: float, num_images: int) -> str:
    interval = binomtest(round(share * num_images), num_images).proportion_ci(method="wilson")
    return f"{100 * share:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
