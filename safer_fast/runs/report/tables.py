"""Tables of the report: results, selected layers, settings."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from safer_fast.runs.report.reading import ReportedRun, flatten

NOTHING = "\N{EN DASH}"
_NUM_SHOWN = 12  # entries of a long list that are shown


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and a note in small print below it."""

    text: str
    note: str = ""
    is_different: bool = False


@dataclass(frozen=True)
class Table:
    """Headings and rows; the first `num_keys` cells of a row name it."""

    headings: list[str]
    rows: list[list[Cell]]
    num_keys: int = 1


def overview(runs: Sequence[ReportedRun]) -> Table:
    """Each run in a dozen lines: model and data, progress, accuracies, speed."""
    columns = [_overview(run) for run in runs]
    rows = [[Cell(name), *(column[name] for column in columns)] for name in columns[0]]
    return Table(["", *_columns(runs, "")], [row for row in rows if _has_text(row[1:])])


def without_empty_columns(table: Table) -> Table:
    """The table without columns that hold nothing, but for those that name its rows."""
    used = [
        index
        for index in range(len(table.headings))
        if index < table.num_keys or _has_text([row[index] for row in table.rows])
    ]
    rows = [[row[index] for index in used] for row in table.rows]
    return Table([table.headings[index] for index in used], rows, table.num_keys)


def _has_text(cells: Iterable[Cell]) -> bool:
    return any(cell.text != NOTHING or cell.note for cell in cells)


def selections(runs: Sequence[ReportedRun]) -> Table:
    """Every selection of every run over time."""
    headings = ["epoch", "criterion", "selected layers", "cut"]
    rows = [
        [Cell(run.name)] * (len(runs) > 1)
        + [
            Cell(shown(event.get("epoch"))),
            Cell(shown(event.get("criterion"))),
            Cell(shown(event.get("selected", []))),
            Cell(shown(event.get("cut"))),
        ]
        for run in runs
        for event in run.selections
    ]
    return without_empty_columns(Table(["run"] * (len(runs) > 1) + headings, rows))


def settings(runs: Sequence[ReportedRun]) -> Table:
    """The configurations side by side, settings that differ marked."""
    return _side_by_side("setting", runs, [flatten(run.config) for run in runs])


def environment(runs: Sequence[ReportedRun]) -> Table:
    """Machine and versions of the runs, and facts of the method from their config.json."""
    columns = []
    for run in runs:
        about = {key: run.model.get(key, "") for key in ("architecture", "safer_fast")}
        facts = flatten(run.environment) | (flatten(about) if run.model else {})
        columns.append({name: fact for name, fact in facts.items() if not _is_table(fact)})
    return _side_by_side("", runs, columns)


def shown(value: Any) -> str:
    """A value as the report prints it: short, with long lists cut."""
    if value is None or value == "" or value == [] or value == {}:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        texts = [shown(item) for item in value[:_NUM_SHOWN]]
        if len(value) > _NUM_SHOWN:
            texts.append(f"and {len(value) - _NUM_SHOWN:,} more")
        return ("\n" if any(" " in text for text in texts[:_NUM_SHOWN]) else ", ").join(texts)
    return str(value)


def radius(epsilon: float) -> str:
    """An epsilon as users write it: 8/255 where it is one."""
    steps = epsilon * 255
    if epsilon > 0 and abs(steps - round(steps)) < 1e-4:
        return f"{round(steps)}/255"
    return f"{epsilon:.4g}"


def percent(share: float) -> str:
    """A share in [0, 1] as percent with one digit."""
    return f"{100 * share:.1f} %"


def _is_table(value: Any) -> bool:
    """True for a list of dictionaries, such as the accuracies: it has a table of its own."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _columns(runs: Sequence[ReportedRun], alone: str) -> list[str]:
    return [run.name for run in runs] if len(runs) > 1 else [alone]


def _side_by_side(
    heading: str, runs: Sequence[ReportedRun], columns: Sequence[dict[str, Any]]
) -> Table:
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = []
    for name in names:
        texts = [shown(column.get(name)) for column in columns]
        is_different = len(set(texts)) > 1
        rows.append([Cell(name), *(Cell(text, is_different=is_different) for text in texts)])
    return Table([heading, *_columns(runs, "value" if heading else "")], rows)


def _overview(run: ReportedRun) -> dict[str, Cell]:
    memory = _measured(run, "peak_memory_mib").values()
    skipped = _measured(run, "skipped_steps").values()
    best, last = _best_and_last(run)
    nearest, last_distance = _best_and_last_distance(run)
    return {
        "model": Cell(shown(run.setting("model.name"))),
        "attack in training": Cell(_attack(run)),
        "method": Cell(_method(run)),
        "epochs": Cell(progress(run), "" if run.is_finished else "not finished"),
        "training time": Cell(_duration(run.time_s)),
        "best robust accuracy": best,
        "last robust accuracy": last,
        "robust gap": _gap(run),
        "best embedding distance": nearest,
        "last embedding distance": last_distance,
        "speed": _speed(run),
        "peak memory": Cell(f"{max(memory):,.0f} MiB" if memory else NOTHING),
        "skipped steps": Cell(f"{sum(skipped):.0f}"),
    }


def _best_and_last(run: ReportedRun) -> tuple[Cell, Cell]:
    """Best and last robust accuracy on the validation split during training."""
    robust = _measured(run, "robust_accuracy")
    if not robust:
        return Cell(NOTHING), Cell(NOTHING)
    best, last = int(run.best_epoch()), max(robust)
    lost = 100 * (robust[best] - robust[last])
    note = f"{lost:.1f} points below the best" if lost >= 0.05 else "as good as the best"
    return (
        Cell(percent(robust[best]), f"{validation_attack(run)}, epoch {best}"),
        Cell(percent(robust[last]), f"{validation_attack(run)}, epoch {last}, {note}"),
    )


def _best_and_last_distance(run: ReportedRun) -> tuple[Cell, Cell]:
    """Smallest and last embedding distance under attack on the validation split in training."""
    found = _measured(run, "embedding_distance")
    if not found:
        return Cell(NOTHING), Cell(NOTHING)
    epochs = min(found, key=lambda epoch: found[epoch]), max(found)
    best, last = (
        Cell(f"{found[epoch]:.3g}", f"{validation_attack(run)}, epoch {epoch}") for epoch in epochs
    )
    return best, last


def validation_attack(run: ReportedRun) -> str:
    """Facts that accuracies on the validation split depend on, as far as they are known."""
    facts = ["validation"]
    steps, epsilon = run.number("evaluation.steps"), run.number("attack.epsilon")
    if steps is not None:
        facts.append(f"PGD-{steps:.0f}")
    if epsilon is not None:
        facts.append(f"{shown(run.setting('attack.norm'))} {radius(epsilon)}")
    if (most := run.number("evaluation.max_images")) is not None:
        facts.append(f"at most {most:,.0f} images")
    return ", ".join(facts)


def caution(runs: Sequence[ReportedRun]) -> str:
    """Warning where validation accuracies of the runs do not compare, else an empty text."""
    ways = {run.name: validation_attack(run) for run in runs}
    ways = {
        name: f"{way}, {shown(run.setting('data.path'))}"
        for run, (name, way) in zip(runs, ways.items(), strict=True)
    }
    if len(set(ways.values())) < 2:
        return ""
    named = "; ".join(f"{name}: {way}" for name, way in ways.items())
    return f"Accuracies during training do not compare between these runs ({named})."


def _speed(run: ReportedRun) -> Cell:
    """Median speed since the last selection: each selection changes the work of a step."""
    since = run.selections[-1].get("epoch", 0) if run.selections else 0
    speeds = _measured(run, "images_per_second")
    recent = [value for epoch, value in speeds.items() if epoch >= since]
    if not recent:
        return Cell(NOTHING)
    note = f"median since epoch {since}, the last selection" if since else "median of all epochs"
    return Cell(f"{statistics.median(recent):,.0f} images/s", note)


def _measured(run: ReportedRun, key: str) -> dict[int, float]:
    pairs: Iterable[tuple[int, Any]] = zip(run.series("epoch"), run.series(key), strict=True)
    return {epoch: float(value) for epoch, value in pairs if value is not None}


def _attack(run: ReportedRun) -> str:
    norm, epsilon = run.setting("attack.norm"), run.number("attack.epsilon")
    steps = run.setting("attack.steps")
    if epsilon is None or steps is None:
        return NOTHING
    if steps == 0 or epsilon == 0:
        return "none, clean training"
    kind = shown(run.setting("attack.name") or "pgd").upper()
    name = "FGSM-RS" if steps == 1 and kind == "PGD" else f"{kind}-{steps}"
    if steps == "auto":
        name = f"PGD of at most {shown(run.setting('attack.max_steps'))} steps"
    raised = run.setting("attack.loss")
    loss = "" if raised in (None, "objective") else f", raising the {shown(raised)}"
    return f"{name}, {shown(norm)}, {radius(epsilon)}{loss}"


def _method(run: ReportedRun) -> str:
    criterion, rho = run.setting("selection.criterion"), run.setting("sam.rho")
    if criterion is None:
        return NOTHING
    sam = f"SAM with rho {shown(rho)}" if rho else "no SAM"
    if run.setting("selection.layers"):
        return f"layers by name, {sam}"
    if criterion == "all":
        return f"all parameters, {sam}"
    share = run.number("selection.fraction")
    return f"{percent(share or 0.0)} of layers by {criterion}, {sam}"


def progress(run: ReportedRun) -> str:
    """Epochs that are done, of those planned."""
    done = max(run.series("epoch"), default=0)
    planned = run.setting("epochs")
    return f"{done} of {planned}" if planned else str(done)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s"


def _gap(run: ReportedRun) -> Cell:
    train, validation = _measured(run, "train_robust_accuracy"), _measured(run, "robust_accuracy")
    since = run.first_epoch_at_full_epsilon()
    both = [epoch for epoch in train.keys() & validation.keys() if epoch >= since]
    if not both:
        return Cell(NOTHING)
    last = max(both)
    note = f"training over validation, epoch {last}"
    return Cell(f"{100 * (train[last] - validation[last]):+.1f} points", note)
