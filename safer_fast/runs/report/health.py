"""Drawings of the report on a run's health and its speed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from safer_fast.runs.figures.canvas import RUN_COLOURS
from safer_fast.runs.figures.curves import Curve, draw_areas, draw_bars, draw_curves
from safer_fast.runs.report.reading import ReportedRun
from safer_fast.runs.report.training import Figure, LegendEntry, curve_figure

_STAGES = ("data", "attack", "ascent", "descent", "update")
_MOST_LINES = 5  # epochs of one run in the drawing of the attack


def health_figures(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Success of the attack, and the rise of the loss where SAM looks."""
    drawn = [
        _attack_figure(runs),
        *_audit_figures(runs),
        curve_figure(
            [_only_with_sam(run) for run in runs],
            "loss_rise",
            "SAM: rise of the loss",
            "Loss at w + e over that at w; rho is too small near 0, too large near the loss.",
        ),
        curve_figure(
            runs,
            "gradient_norm",
            "Norm of the gradient",
            "Over the trained layers; a jump is instability, a new selection or a rising epsilon.",
        ),
        curve_figure(
            runs,
            "gradient_cosine",
            "SAM: cosine of both gradients",
            "Between the gradients of both passes; rho is too small at 1, too large near 0.",
        ),
    ]
    return [figure for figure in drawn if figure is not None]


def speed_figures(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Speed of the runs, and the time of each part of a step."""
    speed = curve_figure(
        runs,
        "images_per_second",
        "Speed",
        "Training images per second; selections change the work of a step.",
    )
    drawn = [speed, _stage_figure(runs)]
    return [figure for figure in drawn if figure is not None]


def _attack_figure(runs: Sequence[ReportedRun]) -> Figure | None:
    """Success of the attack by its steps: in the last epoch of each run, or in some of one run."""
    curves, legend = [], []
    for index, run in enumerate(runs):
        measured = [event for event in run.epochs if event.get("attack_success")]
        shown = _thinned(run, measured) if len(runs) == 1 else measured[-1:]
        for number, event in enumerate(shown, start=1):
            success, opacity = event["attack_success"], round(number / len(shown), 2)
            curves.append(Curve(range(len(success)), success, index, opacity=opacity))
            legend.append(LegendEntry(f"epoch {event['epoch']}", index, opacity=opacity))
    if not curves:
        return None
    title = "Attack, step by step"
    caption = (
        "Training images classified wrongly by the step of the attack; a line that still rises at "
        "its end has too few"
    )
    if len(runs) > 1:
        caption += " (last epoch of each run)"
    drawing = draw_curves(
        curves, identity="attack", title=title, is_share=True, across="step of the attack"
    )
    return Figure(title, [drawing], f"{caption}.", legend if len(runs) == 1 else [])


def _audit_figures(runs: Sequence[ReportedRun]) -> list[Figure | None]:
    """Iterations that audits chose, and their strength, where a run's audits choose."""
    if not any(value is not None for run in runs for value in run.series("attack_strength")):
        return []
    return [
        curve_figure(
            runs,
            "attack_steps",
            "Iterations of the training attack",
            "Chosen by audits, as few as attack nearly as well as PGD-20.",
        ),
        curve_figure(
            runs,
            "attack_strength",
            "Strength of the training attack",
            "Loss after it over that after PGD-20; well below attack.strength, the model overfits.",
        ),
    ]


def _thinned(run: ReportedRun, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first and the last epoch, and between them those after a selection, not too many."""
    selected_at = {event["epoch"] for event in run.selections}
    ends = {event["epoch"] for event in (*measured[:1], *measured[-1:])}
    shown = [event for event in measured if event["epoch"] in selected_at | ends]
    if len(shown) <= _MOST_LINES:
        return shown
    step = (len(shown) - 1) / (_MOST_LINES - 1)
    return [shown[round(number * step)] for number in range(_MOST_LINES)]


def _only_with_sam(run: ReportedRun) -> ReportedRun:
    """The run without the rises of its epochs without SAM, which are 0."""
    epochs = [
        event | {"loss_rise": None} if event.get("gradient_cosine") is None else event
        for event in run.epochs
    ]
    return replace(run, epochs=epochs)


def _stage_figure(runs: Sequence[ReportedRun]) -> Figure | None:
    """Time of a step by its parts: over the epochs of one run, or in the end of each run."""
    found = {name for run in runs for event in run.epochs for name in event.get("stage_ms") or {}}
    known = [name for name in _STAGES if name in found]
    names = [*known, *sorted(found - set(known))][: len(RUN_COLOURS)]
    timed = [(run, [event for event in run.epochs if event.get("stage_ms")]) for run in runs]
    timed = [(run, events) for run, events in timed if events]
    if not timed or not names:
        return None
    title = "Time of a step by stage"
    caption = "Mean milliseconds of the parts of a step"
    if len(runs) == 1:
        epochs = [event["epoch"] for event in timed[0][1]]
        layers = {name: [_stage_ms(event, name) for event in timed[0][1]] for name in names}
        drawing = draw_areas(epochs, layers, identity="stages", title=title)
    else:
        caption += ", median since the last selection of each run"
        layers = {name: [_recent_ms(*one, name) for one in timed] for name in names}
        labels = [run.name for run, _ in timed]
        drawing = draw_bars(labels, layers, identity="stages", title=title)
    legend = [LegendEntry(name, index, is_area=True) for index, name in enumerate(names)]
    return Figure(title, [drawing], f"{caption}.", legend, has_line_for_each_run=False)


def _recent_ms(run: ReportedRun, events: Sequence[dict[str, Any]], name: str) -> float:
    since = run.selections[-1]["epoch"] if run.selections else 0
    recent = [event for event in events if event["epoch"] >= since] or events
    return statistics.median(_stage_ms(event, name) for event in recent)


def _stage_ms(event: dict[str, Any], name: str) -> float:
    return event["stage_ms"].get(name) or 0.0
