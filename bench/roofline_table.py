"""The table of bench.roofline: predicted times, and measured ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.studies.float8_table import markdown_table

Row = dict[str, Any]
MEASURED = {"attack": "iteration", "step": "step"}
"""Parts that rows of bench.attack and bench.step measure, by what these rows are."""


def roofline_table(rows: Sequence[Row]) -> str:
    """A line for each case and precision; rows of `MEASURED` on the same GPU are put beside it."""
    predicted = [row for row in rows if row["what"] == "roofline"]
    measured = [row for row in rows if row["what"] in MEASURED]
    if not predicted:
        return "Not measured yet.\n"
    columns = list(dict.fromkeys(_column(row) for row in predicted))
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in predicted:
        key = row["gpu"], row["case"].partition(", PGD-")[0], row["implementation"]
        groups.setdefault(key, {})[_column(row)] = row
    lines = [
        [
            *key,
            *(f"{own['block'][name]:.3g}" for name in ("num_kernels", "gigabytes", "teraflop")),
            f"{1e3 * own['block']['tera_instructions']:.3g}",
            *(_times(own[column], measured) if column in own else "-" for column in columns),
            f"{100 * own['iteration']['expected_mfu']:.0f} %",
        ]
        for key, own in groups.items()
    ]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in predicted[0]["shares"].items())
    days = sorted({row["date"][:10] for row in predicted})
    caption = (
        "Arithmetic, nothing of it timed: ms at best / expected"
        + (" / measured" if measured else "")
        + f", expected at these shares of the GPU's peak rates: {shares}; "
        f"{', '.join(f'`{name}`' for name in dict.fromkeys(_layers(predicted)))} selected; "
        f"torch {predicted[0]['torch']}; {days[-1]}:"
    )
    heads = ["GPU", "case", "attack.precision", "a block: kernels", "GB", "TFLOP"]
    heads += ["10^9 instructions", *columns, "MFU expected of an iteration"]
    return markdown_table(caption, heads, lines)


def _column(row: Row) -> str:
    return f"step, PGD-{row['steps']}" if row["part"] == "step" else str(row["part"])


def _times(row: Row, measured: Sequence[Row]) -> str:
    times = [row["at_best_ms"], row["expected_ms"]]
    times += [other["p50_ms"] for other in measured if _is_of(other, row)][-1:]
    return " / ".join(f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in times)


def _is_of(measured: Row, row: Row) -> bool:
    """True for a captured run of the same part and case, in amp, on a GPU of the same kind."""
    kind = row["gpu"].split()[1]  # NVIDIA H100 SXM
    return (
        MEASURED[measured["what"]] == row["part"]
        and measured["case"] == row["case"]
        and kind in measured["device"]
        and (row["implementation"], measured["dtype"]) == ("amp", "bf16")
        and bool(measured["captured"])
        and (row["part"] != "step" or measured["layers"] == row["layers"])
    )


def _layers(rows: Sequence[Row]) -> list[str]:
    return [name for row in rows for name in row["layers"]]
