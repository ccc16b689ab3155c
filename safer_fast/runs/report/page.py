"""The page of a report, assembled from figures, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safer_fast.runs.figures import layer_map
from safer_fast.runs.figures.canvas import RUN_COLOURS, as_svg
from safer_fast.runs.layout import RunFolder
from safer_fast.runs.report import evaluations, health, tables, training, verdict
from safer_fast.runs.report.gallery import galleries
from safer_fast.runs.report.reading import ReportedRun, read_runs
from safer_fast.runs.report.tables import Table
from safer_fast.runs.report.training import Figure
from safer_fast.runtime.files import write_whole

_TEMPLATES = Path(__file__).parent
_MOST_LAYERS = 40  # that one drawing of selections has rows for
_MAX_MAPS = 12  # maps of one run; of more selections, an even sample


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page about these run folders to `output`, and return it.

    Default: report.html in the folder of one run; comparison.html in the current folder for
    several. A run that is not finished is reported as far as it came. Raise ValueError naming a
    folder without metrics.jsonl or a damaged file.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    read = read_runs(runs)
    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("report.html.jinja").render(
        runs=read,
        title=verdict.title(read),
        verdict=verdict.verdict(read),
        alarms=[*training.alarms(read), *evaluations.alarms(read)],
        results=_results(read),
        evaluations=evaluations.all_evaluations(read),
        per_class=evaluations.per_class(read),
        caution=tables.caution(read),
        overview=tables.overview(read),
        curves=training.training_figures(read),
        health=health.health_figures(read),
        speed=health.speed_figures(read),
        maps=_map_figures(read),
        choices=_choice_figures(read),
        galleries=galleries(read),
        selections=tables.selections(read),
        settings=tables.settings(read),
        environment=tables.environment(read),
        num_colours=len(RUN_COLOURS),
        drawing=Markup,
    )
    if output is None:
        output = RunFolder(runs[0]).report if len(read) == 1 else Path("comparison.html")
        # a link in the folder might lead out of it
        write_whole(output, page.lstrip().encode())
    else:
        output.write_text(page.lstrip(), encoding="utf-8")
    return output


def _results(runs: Sequence[ReportedRun]) -> list[tuple[str, Table, str]]:
    """Title, table and note of accuracies and of embedding distances, as far as there are any."""
    weights = evaluations.meaning_of_weights(runs)
    distances = (
        "Mean squared distances of embeddings to those of the clean images by the original "
        f"network. {weights}"
    )
    tables = [
        ("Accuracy", evaluations.headline(runs), f"With 95 % intervals. {weights}"),
        ("Embedding distance", evaluations.headline(runs, of_distances=True), distances),
    ]
    return [one for one in tables if one[1].rows]


def _map_figures(runs: Sequence[ReportedRun]) -> list[Figure]:
    """A figure for each run whose selections have scores."""
    drawn = [_map_figure(run, index, len(runs) > 1) for index, run in enumerate(runs)]
    return [figure for figure in drawn if figure is not None]


def _map_figure(run: ReportedRun, index: int, is_one_of_many: bool) -> Figure | None:
    scored = [event for event in run.selections if event.get("scores")]
    if not scored:
        return None
    shown = _thinned(scored)
    limits = layer_map.score_limits([event["scores"] for event in scored])
    drawings = []
    for number, event in enumerate(shown):
        title = f"epoch {event['epoch']}: {event.get('criterion', 'score')}"
        chosen = event.get("selected", [])
        drawing = layer_map.draw_layer_map(event["scores"], chosen, limits=limits, title=title)
        drawings.append(as_svg(drawing, f"map-{index}-{number}", title))
    caption = "Layers by depth and kind, coloured by score on one scale; white dots are chosen"
    if len(shown) < len(scored):
        caption += f"; {len(shown)} of {len(scored)} selections are shown"
    title = f"Layer map of {run.name}" if is_one_of_many else "Layer map"
    return Figure(title, drawings, f"{caption}.", is_wide=True, has_line_for_each_run=False)


def _choice_figures(runs: Sequence[ReportedRun]) -> list[Figure]:
    """A figure for all runs with at least two selections of not too many layers."""
    drawings = []
    for index, run in enumerate(runs):
        chosen = {event["epoch"]: event.get("selected") or [] for event in run.selections}
        if len(chosen) > 1 and 0 < len(set().union(*chosen.values())) <= _MOST_LAYERS:
            title = run.name if len(runs) > 1 else ""
            drawing = layer_map.draw_choices(chosen, title=title)
            drawings.append(as_svg(drawing, f"choices-{index}", title or "Selections over time"))
    caption = "Layers that were ever selected, and when; rows that go through have settled."
    figure = Figure("", drawings, caption, is_wide=True, has_line_for_each_run=False)
    return [figure] if drawings else []


def _thinned(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `_MAX_MAPS` of the events, evenly spaced, first and last among them."""
    if len(events) <= _MAX_MAPS:
        return events
    step = (len(events) - 1) / (_MAX_MAPS - 1)
    return [events[round(number * step)] for number in range(_MAX_MAPS)]
