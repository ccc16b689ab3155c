"""The tables of FP8, from rows of bench.float8, float8_accuracy, accuracy and traffic."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from bench.experiment_table import paired

Row = dict[str, Any]


def float8_tables(rows: Sequence[Row]) -> str:
    """Speeds of layers, iterations and steps; how strong the attack is; what training against it
    gives.
    """
    accuracies = [row for row in rows if row["part"] == "accuracy"]
    trainings = [row for row in rows if row["part"] == "training"]
    timed = [row for row in rows if row not in accuracies and row not in trainings]
    speeds = [row for row in timed if not _is_simulated(row)]
    parts = [_speeds(speeds)] if speeds else []
    parts += [_accuracies(accuracies)] if accuracies else []
    for case in dict.fromkeys(row["case"] for row in trainings):
        parts.append(_trainings([row for row in trainings if row["case"] == case]))
    return "\n".join(parts) or "Not measured yet.\n"


def traffic_table(rows: Sequence[Row]) -> str:
    """A line for each case: both precisions, and what FP8 can gain at best."""
    pairs = {
        case: {row["implementation"]: row for row in rows if row["case"] == case}
        for case in dict.fromkeys(row["case"] for row in rows)
    }
    lines = []
    for case, pair in pairs.items():
        cells = [
            f"{pair['bf16'][name]} / {pair['fp8'][name]}"
            for name in ("num_kernels", "megabytes", "outside_products", "at_best_ms")
        ]
        gain = pair["bf16"]["at_best_ms"] / pair["fp8"]["at_best_ms"]
        lines.append([case, str(pair["fp8"]["num_float8"]), *cells, f"{gain:.2f}"])
    first = rows[0]
    days = sorted({row["date"][:10] for row in rows})
    caption = (
        "One block under attack, forward and backward, read off the code that torch.compile writes "
        f"for an {first['gpu']}, nothing of it timed; torch {first['torch']}; {days[-1]}; "
        "bf16 / FP8:"
    )
    heads = ["block of", "products in FP8", "kernels", "MB", "of these outside products"]
    return markdown_table(caption, [*heads, "at best, ms", "at best, times as fast"], lines)


def _speeds(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["case"],
            f"{row['part']} {row.get('layer', '')}".strip(),
            f"{row['bf16_ms']['p50_ms']:.3f}",
            f"{row['fp8_ms']['p50_ms']:.3f}",
            f"{row['fp8_speed']:.2f}",
        ]
        for row in rows
    ]
    heads = ["case", "part", "bf16, ms", "FP8, ms", "times as fast"]
    return markdown_table(
        f"FP8 against bf16, alternating in one process; {_origin(rows)}:", heads, lines
    )


def _accuracies(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["case"],
            f"PGD-{row['steps']}, {row['epsilon']:.3g}",
            row["backward"],
            str(row["num_images"]),
            f"{100 * row['bf16_accuracy']:.1f}",
            f"{100 * row['fp8_accuracy']:.1f}",
            f"{row['only_bf16_fools']}, {row['only_fp8_fools']}",
            f"{row['p']:.2g}",
            f"{100 * row['sign_agreement']:.1f} %",
        ]
        for row in rows
    ]
    heads = ["model", "attack, epsilon", "gradients", "images", "attacked in bf16", "in FP8"]
    heads += ["fooled by one alone: bf16, FP8", "p", "signs that agree"]
    how = "simulated, " if all(row["simulated"] for row in rows) else ""
    caption = (
        f"Robust accuracy in %, the attack in bf16 and in FP8 ({how}every matrix of the blocks), "
        f"the network judging in bf16; p: McNemar's exact test; {_origin(rows)}:"
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
    return textwrap.fill(caption, 100) + "\n\n" + table
