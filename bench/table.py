"""The tables of pages of docs, written from the committed results.

    python -m bench.table [--check]

A table lies between `<!-- table: peers cpu -->` and `<!-- /table -->`: the first word selects what
was measured (peers, attack, ops, attention, data, accuracy, float8, traffic, roofline,
time_to_accuracy, warm_start; experiment, sensitivity, selections, choices, earlier, steps,
search, compared), the second where (cpu, gpu). Of several measurements of the same case the newest
counts. `--check` writes nothing and fails if a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.accuracy import accuracy_tables
from bench.experiment.compared_table import compared_tables, search_tables
from bench.experiment.steps_table import steps_tables
from bench.experiment.table import (
    choice_tables,
    earlier_tables,
    experiment_tables,
    selection_tables,
    sensitivity_tables,
)
from bench.experiment.tasks import IDENTITY
from bench.roofline_table import MEASURED, roofline_table
from bench.studies.float8_table import float8_tables, traffic_table
from bench.time_table import time_tables, warm_start_table

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
PAGES = tuple(f"docs/{name}.md" for name in ("results", "experiment", "selections", "performance"))
MARKED = re.compile(r"(<!-- table: (\w+) (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
SAME = (
    *("what", "case", "layers", "dtype", "deterministic", "compiled", "captured", "num_workers"),
    *("weights", "attack", "epsilon", "figure", "split"),
    "late_id",
    *("part", "layer", "backward", "steps", "gpu"),
    *(name for name in IDENTITY if name != "case"),
)
OF_EXPERIMENT = (
    "sensitivity",
    "selections",
    "choices",
    "earlier",
    "steps",
    "search",
    "compared",
)
OURS = ("native", "triton", "fallback")


def main() -> None:
    """The pages have the tables of the results; with --check, status 1 says that they have not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    arguments = parser.parse_args()
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        wanted = with_tables(text, committed_rows(), name)
        if not arguments.check:
            page.write_text(wanted)
        elif text != wanted:
            sys.exit(
                f"{name}: its tables are not those of bench/results; run python -m bench.table"
            )


def committed_rows() -> list[Row]:
    """Every row in bench/results."""
    files = sorted((ROOT / "bench" / "results").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def with_tables(text: str, rows: Iterable[Row], name: str = "docs/results.md") -> str:
    """The text of the page `name` with what lies between each pair of marks written anew.

    Raises ValueError for a mark that names no table.
    """
    rows = list(rows)

    def table(match: re.Match[str]) -> str:
        start, what, where, end = match.groups()
        if what not in TABLES or where not in ("cpu", "gpu"):
            raise ValueError(
                f"{name}: expected a table of {', '.join(TABLES)} on cpu or gpu, "
                f"got '{what} {where}'"
            )
        of = "experiment" if what in OF_EXPERIMENT else what
        chosen = [row for row in rows if kind(row) == of and place(row) == where]
        if what == "roofline":  # what was measured stands beside it
            chosen += [row for row in rows if kind(row) in MEASURED and place(row) == "gpu"]
        body = TABLES[what](newest(chosen)) if chosen else "Not measured yet.\n"
        return f"{start}\n{body}\n{end}"

    return MARKED.sub(table, text)


def kind(row: Row) -> str:
    """Which table a row belongs to; rows of `bench.ops` name the operation that they are of."""
    return "ops" if "bytes" in row else str(row["what"])


def place(row: Row) -> str:
    """Where a row was measured: cpu or gpu."""
    return "cpu" if row["device"].startswith("cpu") else "gpu"


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row by date of each case, setting and implementation, in order of appearance."""
    found: dict[str, Row] = {}
    for row in rows:
        # rows from before there was a switch are rows with it off
        key = str([row.get(name) or None for name in (*SAME, "implementation")])
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


def peers_tables(rows: list[Row]) -> str:
    """For each case: speed in every setting, and all figures in the one that is fastest."""
    parts = []
    for case in _distinct(_peers_case(row) for row in rows):
        own = [row for row in rows if _peers_case(row) == case]
        fastest = max(own, key=lambda row: row["images_per_second"])
        full = [row for row in own if setting(row) == setting(fastest)]
        parts.append(
            _caption(f"{case}; {_origin(own)}. Images/s, and how many times as fast ours is:")
            + f"{_speeds(own)}\n"
            + _caption(f"{setting(fastest)} in full:")
            + _figures(full)
        )
    return "\n".join(parts)


def setting(row: Row) -> str:
    """Precision and mode of a row, in a few words."""
    precision = "fp32" if row["dtype"] == "off" else row["dtype"]
    mode = "compiled" if row["compiled"] else "eager"
    return f"{precision} {mode}" + (" captured" if row.get("captured") else "")


def attack_table(rows: list[Row]) -> str:
    """A line for each case and mode."""
    lines = [
        [
            f"{row['case']}, {setting(row)}",
            f"{row['p50_ms']:.2f} ({row['p20_ms']:.2f} to {row['p80_ms']:.2f})",
            f"{row['images_per_second']:.1f}",
            _percent(row.get("mfu")),
            _number(row.get("peak_memory_mib"), ".0f"),
        ]
        for row in rows
    ]
    heads = ["iteration", "ms (p20 to p80)", "images/s", "MFU", "peak MiB"]
    return _caption(f"{_origin(rows)}:") + _markdown(heads, lines)


def ops_table(rows: list[Row]) -> str:
    """A line for each operation and dtype: ours against plain PyTorch and a copy."""
    ours = [row for row in rows if row["implementation"] in OURS]
    lines = [
        [
            f"`{row['what']}`",
            row["case"],
            row["dtype"],
            f"{row['p50_ms']:.2f}",
            f"{row['ratio_reference']:.1f}",
            f"{row['ratio_copy']:.2f}",
        ]
        for row in ours
    ]
    heads = ["operation", "size", "dtype", "ms", "times as fast as PyTorch", "as a copy"]
    return _caption(f"{_origin(ours)}:") + _markdown(heads, lines)


def attention_table(rows: list[Row]) -> str:
    """A line for each case, the kernels side by side; only some repeat bit for bit."""
    kernels = _distinct(row["implementation"] for row in rows)
    cells = {(_attention_case(row), row["implementation"]): f"{row['p50_ms']:.2f}" for row in rows}
    lines = [
        [case, *(cells.get((case, kernel), "-") for kernel in kernels)]
        for case in _distinct(_attention_case(row) for row in rows)
    ]
    heads = ["attention, ms forward and backward", *kernels]
    return _caption(f"{_origin(rows)}:") + _markdown(heads, lines)


def data_tables(rows: list[Row]) -> str:
    """For each case: the speed of every loader, and what share of the time training waits."""
    parts = []
    for case in _distinct(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        lines = _waits(own) if "data_wait_fraction" in own[0] else _loaders(own)
        parts.append(_caption(f"{case}; {_origin(own)}:") + lines)
    return "\n".join(parts)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "peers": peers_tables,
    "attack": attack_table,
    "ops": ops_table,
    "attention": attention_table,
    "data": data_tables,
    "accuracy": accuracy_tables,
    "float8": float8_tables,
    "traffic": traffic_table,
    "roofline": roofline_table,
    "experiment": experiment_tables,
    "sensitivity": sensitivity_tables,
    "selections": selection_tables,
    "choices": choice_tables,
    "earlier": earlier_tables,
    "steps": steps_tables,
    "search": search_tables,
    "compared": compared_tables,
    "time_to_accuracy": time_tables,
    "warm_start": warm_start_table,
}


def _speeds(rows: list[Row]) -> str:
    settings = _distinct(setting(row) for row in sorted(rows, key=_effort))
    cells = {
        (row["implementation"], setting(row)): (
            f"{row['images_per_second']:.1f}, {row['speed_of_ours']:.2f}x"
        )
        for row in rows
    }
    lines = [
        [name, *(cells.get((name, column), "-") for column in settings)]
        for name in _distinct(row["implementation"] for row in rows)
    ]
    return _markdown(["step", *settings], lines)


def _effort(row: Row) -> tuple[bool, bool, bool]:
    """Orders settings from the plainest to the fastest."""
    return row["dtype"] != "off", row["compiled"], bool(row.get("captured"))


def _figures(rows: list[Row]) -> str:
    lines = [
        [
            row["implementation"],
            f"{row['p50_ms']:.0f} ({row['p20_ms']:.0f} to {row['p80_ms']:.0f})",
            _percent(row.get("mfu")),
            _number(row.get("counted_per_ideal"), ".3f"),
            _number(row.get("peak_memory_mib"), ".0f"),
            ", ".join(f"{name} {ms:.1f}" for name, ms in row.get("stages_ms", {}).items()) or "-",
        ]
        for row in rows
    ]
    heads = ["step", "ms (p20 to p80)", "MFU", "counted / ideal", "peak MiB", "stages, ms"]
    return _markdown(heads, lines)


def _loaders(rows: list[Row]) -> str:
    lines = [
        [
            row["implementation"],
            str(row["num_workers"]),
            f"{row['images_per_second']:.0f}",
            _number(row["images_per_core_second"], ".0f"),
            _number(row["ratio_torch"], ".2f"),
            _number(row["ratio_torch_per_core"], ".2f"),
        ]
        for row in rows
    ]
    heads = ["loader", "workers", "images/s", "per core", "times our torch", "per core"]
    return _markdown(heads, lines)


def _waits(rows: list[Row]) -> str:
    lines = [
        [
            row["implementation"],
            str(row["num_workers"]),
            f"{row['images_per_second']:.1f}",
            ", ".join(f"{100 * share:.2f} %" for share in row["data_wait_fraction"]),
        ]
        for row in rows
    ]
    heads = ["data from", "workers", "images/s", "waited for data, each epoch"]
    return _markdown(heads, lines)


def _peers_case(row: Row) -> str:
    return f"{row['case']}; {', '.join(f'`{name}`' for name in row['layers'])} selected"


def _attention_case(row: Row) -> str:
    return f"{row['case']}, {row['dtype']}" + (", deterministic" if row["deterministic"] else "")


def _origin(rows: list[Row]) -> str:
    """On what and when the rows were measured; of several runs, the days of the first and last."""
    days = sorted({row["date"][:10] for row in rows})
    machines = _distinct(f"{row['device']}, torch {row['torch']}" for row in rows)
    return f"{'; '.join(machines)}; {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")


def _caption(text: str) -> str:
    return textwrap.fill(text, 100) + "\n\n"


def _markdown(heads: list[str], lines: list[list[str]]) -> str:
    head, *rows = (f"| {' | '.join(cells)} |\n" for cells in [heads, *lines])
    return "".join([head, f"|{'---|' * len(heads)}\n", *rows])


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
