"""Curves of the report over the epochs of training, each with a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from safer_fast.runs.figures.curves import Curve, Gap, draw_curves
from safer_fast.runs.report.reading import ReportedRun

_CATASTROPHE = "catastrophic_overfitting"


@dataclass(frozen=True)
class LegendEntry:
    """Legend entry of a kind of line or area; without a colour it stands for all runs."""

    name: str
    colour: int | None = None
    is_dashed: bool = False
    is_area: bool = False
    opacity: float = 1.0


@dataclass(frozen=True)
class Figure:
    """Drawings that belong together, with a title and a caption."""

    title: str
    drawings: list[str]
    caption: str
    legend: list[LegendEntry] = field(default_factory=list)
    is_wide: bool = False
    has_line_for_each_run: bool = True


def training_figures(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Losses, accuracies and the schedule, as far as at least one run has values for them."""
    drawn = [
        _robust_figure(runs),
        _clean_figure(runs),
        _distance_figure(runs),
        _loss_figure(runs),
        curve_figure(
            runs,
            "learning_rate",
            "Learning rate",
            "Each stage (warm-up, SAFER) runs the whole schedule.",
        ),
        _epsilon_figure(runs),
    ]
    return [figure for figure in drawn if figure is not None]


def curve_figure(
    runs: Sequence[ReportedRun], key: str, title: str, caption: str, *, scale: float = 1
) -> Figure | None:
    """A curve for each run, or None where no run has a value."""
    curves = []
    for index, run in enumerate(runs):
        values = [None if value is None else scale * value for value in run.series(key)]
        curves.append(Curve(run.series("epoch"), values, index))
    if not any(curve.points() for curve in curves):
        return None
    drawing = draw_curves(curves, identity=key, title=title)
    return Figure(title, [drawing], caption)


def alarms(runs: Sequence[ReportedRun]) -> list[str]:
    """Warnings, one for each run that overfitted catastrophically."""
    sentences = []
    for run in runs:
        if found := _catastrophes(run):
            name = f"{run.name}: " if len(runs) > 1 else ""
            shares = _shares(found[-1])
            sentences.append(
                f"{name}catastrophic overfitting in {_epochs_in_words(found)}. The model "
                f"withstands the attack it is trained with and no other{shares}. What weak attacks "
                "say of its robustness means nothing."
            )
    return sentences


def _shares(event: dict[str, Any]) -> str:
    training, strong = event.get("training_attack_accuracy"), event.get("pgd_20_accuracy")
    if training is None or strong is None:
        return ""
    return (
        f": in epoch {event['epoch']}, {100 * training:.1f} % of training images under that "
        f"attack, {100 * strong:.1f} % under PGD-20"
    )


def _catastrophes(run: ReportedRun) -> list[dict[str, Any]]:
    return [event for event in run.epochs if event.get(_CATASTROPHE)]


def _epochs_in_words(events: Sequence[dict[str, Any]]) -> str:
    shown = ", ".join(str(event["epoch"]) for event in events[:8])
    more = f" and {len(events) - 8} more" if len(events) > 8 else ""
    return f"epoch{'s' * (len(events) > 1)} {shown}{more}"


def _robust_figure(runs: Sequence[ReportedRun]) -> Figure | None:
    gaps = [_gap(run, "train_robust_accuracy", "robust_accuracy", i) for i, run in enumerate(runs)]
    curves = [curve for gap in gaps for curve in (gap.lower, gap.upper)]
    if not any(curve.points() for curve in curves):
        return None
    title = "Robust accuracy, training and validation"
    marks = _selection_marks(runs)
    lines = ", dotted lines are selections of layers" if marks else ""
    is_clean = any(epsilon == 0 for run in runs for epsilon in run.series("epsilon"))
    but = ", but for training in clean epochs" if is_clean else ""
    caption = f"Accuracy under attack{but}; the shaded gap is robust overfitting{lines}."
    caught = [(run, events) for run in runs if (events := _catastrophes(run))]
    for run, events in caught:
        caption += f" Red: CATASTROPHIC OVERFITTING in {_epochs_in_words(events)}"
        caption += f" of {run.name}." if len(runs) > 1 else "."
    red = sorted({event["epoch"] for _, events in caught for event in events})
    drawing = draw_curves(
        curves, identity="robust", title=title, gaps=gaps, marks=marks, alarms=red, is_share=True
    )
    return Figure(title, [drawing], caption, _both_splits(runs))


def _clean_figure(runs: Sequence[ReportedRun]) -> Figure | None:
    gaps = [_gap(run, "train_start_accuracy", "clean_accuracy", i) for i, run in enumerate(runs)]
    curves = [curve for gap in gaps for curve in (gap.lower, gap.upper)]
    if not any(curve.points() for curve in curves):
        return None
    has_training = any(gap.upper.points() for gap in gaps)
    title = "Clean accuracy, training and validation" if has_training else "Clean accuracy"
    caption = "Accuracy without an attack; robustness is usually paid for here."
    if has_training:
        caption = "Accuracy without an attack; in training at the random start of the attack."
    drawing = draw_curves(curves, identity="clean", title=title, is_share=True)
    return Figure(title, [drawing], caption, _both_splits(runs) if has_training else [])


def _distance_figure(runs: Sequence[ReportedRun]) -> Figure | None:
    """Distances of a tower without text embeddings, of attacked and of clean images."""
    curves = []
    for index, run in enumerate(runs):
        epochs = run.series("epoch")
        curves.append(Curve(epochs, run.series("embedding_distance"), index))
        clean = run.series("clean_embedding_distance")
        curves.append(Curve(epochs, clean, index, is_dashed=True))
    if not any(curve.points() for curve in curves):
        return None
    title = "Embedding distance, validation"
    marks = _selection_marks(runs)
    lines = ", dotted lines are selections of layers" if marks else ""
    caption = (
        "Mean squared distance to the original's embeddings; the smallest under attack is "
        f"best{lines}."
    )
    colour = 0 if len(runs) == 1 else None
    legend = [LegendEntry("under attack", colour), LegendEntry("clean", colour, is_dashed=True)]
    drawing = draw_curves(curves, identity="distance", title=title, marks=marks)
    return Figure(title, [drawing], caption, legend)


def _loss_figure(runs: Sequence[ReportedRun]) -> Figure | None:
    gaps = [_gap(run, "train_loss", "validation_loss", i) for i, run in enumerate(runs)]
    gaps = [replace(gap, upper=gap.lower, lower=gap.upper) for gap in gaps]
    curves = [curve for gap in gaps for curve in (gap.upper, gap.lower)]
    if not any(curve.points() for curve in curves):
        return None
    has_validation = any(gap.upper.points() for gap in gaps)
    title = "Loss, training and validation" if has_validation else "Training loss"
    caption = "Mean loss under attack; a jump up is a rising epsilon, a new stage or instability."
    if has_validation:
        caption = "Mean loss under attack; where validation turns up, the model overfits."
    else:
        curves = [replace(curve, is_dashed=False) for curve in curves]
    shaded = [gap for gap, run in zip(gaps, runs, strict=True) if _is_cross_entropy(run)]
    drawing = draw_curves(curves, identity="loss", title=title, gaps=shaded)
    return Figure(title, [drawing], caption, _both_splits(runs) if has_validation else [])


def _is_cross_entropy(run: ReportedRun) -> bool:
    """True where the loss in training is of the kind that validation measures."""
    is_smoothed = run.setting("objective.label_smoothing") not in (None, 0, 0.0)
    return run.setting("objective.name") in (None, "pgd-at") and not is_smoothed


def _gap(run: ReportedRun, training: str, validation: str, index: int) -> Gap:
    """Curves of both splits, training above; the gap between them is shaded at full epsilon."""
    epochs = run.series("epoch")
    return Gap(
        upper=Curve(epochs, run.series(training), index, is_dashed=True),
        lower=Curve(epochs, run.series(validation), index),
        since=run.first_epoch_at_full_epsilon(),
    )


def _both_splits(runs: Sequence[ReportedRun]) -> list[LegendEntry]:
    colour = 0 if len(runs) == 1 else None
    return [LegendEntry("validation", colour), LegendEntry("training", colour, is_dashed=True)]


def _selection_marks(runs: Sequence[ReportedRun]) -> list[int]:
    return [event["epoch"] for event in runs[0].selections] if len(runs) == 1 else []


def _epsilon_figure(runs: Sequence[ReportedRun]) -> Figure | None:
    """Radius of the training attack; in 255ths of the pixel range where it is small."""
    largest = max((value for run in runs for value in run.series("epsilon") if value), default=0.0)
    is_in_255ths = 0 < largest < 0.2
    return curve_figure(
        runs,
        "epsilon",
        "Epsilon in training" + (" (in 255ths)" if is_in_255ths else ""),
        "Radius of the training attack; epochs compare once it is level.",
        scale=255 if is_in_255ths else 1,
    )
