"""The tables of FP8, from rows of bench.studies.float8, float8_accuracy, accuracy and traffic."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from bench.experiment.table import paired

Row = dict[str, Any]


def float8_tables(rows: Sequence[Row]) -> str:
    """Speeds of layers, iterations and steps; how strong the attack is; what training against it
    gives.
    """
    accuracies = [row for row in rows if row["part"] == "accuracy" and "amp_accuracy" in row]
    trainings = [row for row in rows if row["part"] == "training"]
    timed = [row for row in rows if "amp_ms" in row]
    speeds = [row for row in timed if not _is_simulated(row)]
    parts = [_speeds(speeds)] if speeds else []
    parts += [_accuracies(accuracies)] if accuracies else []
    for case in dict.fromkeys(row["case"] for row in trainings):
        parts.append(_trainings([row for row in trainings if row["case"] == case]))
    return "\n".join(parts) or "Not measured yet.\n"


def traffic_table(rows: Sequence[Row]) -> str:
    """A line for each case and precision, and what it can gain at best."""
    at_best = {row["case"]: row["at_best_ms"] for row in rows if row["implementation"] == "amp"}
    lines = [
        [
            row["case"],
            row["implementation"],
            *(
                str(row[name])
                for name in ("num_kernels", "num_float8", "megabytes", "outside_products")
            ),
            f"{row['at_best_ms']:.2f}",
            f"{at_best[row['case']] / row['at_best_ms']:.2f}",
        ]
        for row in rows
        if row["case"] in at_best
    ]
    days = sorted({row["date"][:10] for row in rows})
    caption = (
        "One block under attack, forward and backward, read off the code that torch.compile writes "
        f"for an {rows[0]['gpu']}, nothing of it timed; torch {rows[0]['torch']}; {days[-1]}:"
    )
    heads = ["block of", "attack.precision", "kernels", "products in FP8", "MB"]
    heads += ["MB outside products", "at best, ms", "times as fast as amp"]
    return markdown_table(caption, heads, lines)


def _speeds(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["case"],
            f"{row['part']} {row.get('layer', '')}".strip(),
            f"{row['amp_ms']['p50_ms']:.3f}",
            *(_speed(row, name) for name in ("bf16", "fp8", "fp8_rescaled")),
        ]
        for row in rows
    ]
    heads = ["case", "part", "amp, ms", "bf16, ms, times as fast", "FP8, ms, times as fast"]
    heads += ["FP8 scaled afterwards"]
    return markdown_table(
        "The attack in amp, with features in bf16, and in FP8, alternating in one process; "
        f"{_origin(rows)}:",
        heads,
        lines,
    )


def _speed(row: Row, name: str) -> str:
    if f"{name}_ms" not in row:
        return "-"
    return f"{row[f'{name}_ms']['p50_ms']:.3f}, {row[f'{name}_speed']:.2f}"


def _accuracies(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["case"],
            f"PGD-{row['steps']}, {row['epsilon']:.3g}",
            f"FP8, gradients {row['backward']}" if row["dtype"] == "fp8" else "features in bf16",
            str(row["num_images"]),
            f"{100 * row['amp_accuracy']:.1f}",
            f"{100 * row['own_accuracy']:.1f}",
            f"{row['only_amp_fools']}, {row['only_own_fools']}",
            f"{row['p']:.2g}",
            f"{100 * row['sign_agreement']:.1f} %",
        ]
        for row in rows
    ]
    heads = ["model", "attack, epsilon", "cheaper attack", "images", "attacked in amp", "cheaper"]
    heads += ["fooled by one alone: amp, cheaper", "p", "signs that agree"]
    how = "simulated, " if all(row["simulated"] for row in rows) else ""
    caption = (
        f"Robust accuracy in %, the attack in amp (bf16) and cheaper (FP8: {how}every matrix of "
        "the blocks, and features in bf16), the network judging in amp; p: McNemar's exact test; "
        f"{_origin(rows)}:"
    )
    return markdown_table(caption, heads, lines)


def _trainings(rows: Sequence[Row]) -> str:
    """A line for each seed, and the differences over all of them."""
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    columns = [(weights, attack) for weights in ("best", "last") for attack in attacks]
    found = {
        (row["seed"], row["weights"], row["attack"], row["implementation"]): row["accuracy"]
        for row in rows
    }
    seeds = sorted(
        {seed for seed, *_, precision in found if precision == "fp8"}
        & {seed for seed, *_, precision in found if precision == "bf16"}
    )
    lines = [
        [
            str(seed),
            *(
                " / ".join(f"{100 * found[seed, *column, of]:.1f}" for of in ("bf16", "fp8"))
                for column in columns
            ),
        ]
        for seed in seeds
    ]
    pairs = [[(found[s, *c, "fp8"], found[s, *c, "bf16"]) for s in seeds] for c in columns]
    lines.append(["FP8 - bf16", *map(paired, pairs)])
    first = rows[0]
    attacked = max(row["epsilon"] for row in rows)
    how = "simulated, every matrix of the blocks" if _is_simulated(first) else "large matrices"
    caption = (
        f"Trained against the attack in bf16 / in FP8 ({how}): {first['case']}, {first['model']}, "
        f"{first['epochs']} epochs; accuracy in % on the {first['num_images']} images of the "
        f"{first['split']} split, epsilon {attacked:.3g}, evaluated in bf16; p of a paired t-test; "
        f"{_origin(rows)}:"
    )
    heads = ["seed", *(f"{attack}, {weights}" for weights, attack in columns)]
    return markdown_table(caption, heads, lines)


def _is_simulated(row: Row) -> bool:
    return bool(row["device"].startswith("cpu"))


def _origin(rows: Sequence[Row]) -> str:
    days = sorted({row["date"][:10] for row in rows})
    machines = dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in rows)
    return f"{'; '.join(machines)}; {' to '.join(sorted({days[0], days[-1]}))}"


def markdown_table(caption: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown below its caption."""
    rows = [f"| {' | '.join(cells)} |\n" for cells in [heads, *lines]]
    table = "".join([rows[0], f"|{'---|' * len(heads)}\n", *rows[1:]])
    return textwrap.fill(caption, 100, break_on_hyphens=False) + "\n\n" + table
