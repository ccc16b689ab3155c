"""Runs as one HTML page that needs nothing else: `python -m safer_fast.report RUN [RUN ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safer_fast import command_line, report_figures, report_tables
from safer_fast.report_figures import RUN_COLOURS, Curve, Gap
from safer_fast.report_run import Run, read_runs

_TEMPLATES = Path(__file__).parent / "templates"
_MAX_MAPS = 12  # maps of one run; more selections are thinned out evenly


@dataclass(frozen=True)
class Figure:
    """Drawings that belong together, with what they show and what to see in them."""

    title: str
    drawings: list[str]
    caption: str
    lines: list[tuple[str, bool]] = field(default_factory=list)
    is_wide: bool = False


@dataclass
class _Arguments:
    runs: list[str]
    output: str | None = None


def main(arguments: Sequence[str]) -> None:
    """Writes the report that the words of the command line ask for and says where it is."""
    parser = command_line.new_parser(
        "report", "Write one HTML page about one run or comparing several."
    )
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--output", type=str | None, help="the page to write; default: report.html in the first RUN"
    )
    asked = command_line.parse(parser, command_line.with_underscores(arguments), _Arguments)
    output = None if asked.output is None else Path(asked.output)
    print(f"wrote {write_report([Path(folder) for folder in asked.runs], output)}")


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """The page about these run folders is written to `output`, which is returned.

    Default: report.html in the first folder. A run that is not finished is reported as far as it
    came. Raises ValueError naming a folder without metrics.jsonl or a damaged file.
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
        accuracies=report_tables.accuracies(read),
        overview=report_tables.overview(read),
        curves=_curve_figures(read),
        maps=_map_figures(read),
        selections=report_tables.selections(read),
        settings=report_tables.settings(read),
        environment=report_tables.environment(read),
        num_colours=len(RUN_COLOURS),
        drawing=Markup,
    )
    if output is None:
        output = runs[0] / "report.html"
        # a link that came with the folder would lead elsewhere
        output.unlink(missing_ok=True)
    output.write_text(page.lstrip(), encoding="utf-8")
    return output


def _curve_figures(runs: Sequence[Run]) -> list[Figure]:
    """The curves over epochs that at least one run has values for."""
    gaps = [_gap(run, index) for index, run in enumerate(runs)]
    marks = [event["epoch"] for event in runs[0].selections] if len(runs) == 1 else []
    drawn = [
        _robust_figure(gaps, marks),
        _figure(
            runs,
            "clean_accuracy",
            "Clean accuracy, validation",
            "Accuracy without an attack. Robustness is usually paid for here: a fall while robust "
            "accuracy rises is that trade.",
        ),
        _figure(
            runs,
            "train_loss",
            "Training loss",
            "Mean loss on adversarial training images. It should fall; a jump up is a rising "
            "epsilon, a new stage or instability.",
        ),
        _figure(
            runs,
            "learning_rate",
            "Learning rate",
            "The schedule; each stage (warm-up, SAFER) runs the whole of it.",
        ),
        _epsilon_figure(runs),
        _figure(
            runs,
            "images_per_second",
            "Speed",
            "Training images per second. It steps up where fewer layers are trained, and should "
            "be level between two selections.",
        ),
    ]
    return [figure for figure in drawn if figure is not None]


def _robust_figure(gaps: Sequence[Gap], marks: Sequence[int]) -> Figure | None:
    curves = [curve for gap in gaps for curve in (gap.lower, gap.upper)]
    if not any(curve.points() for curve in curves):
        return None
    title = "Robust accuracy, training and validation"
    drawing = report_figures.draw_curves(
        curves, identity="robust", title=title, gaps=gaps, marks=marks, is_share=True
    )
    caption = (
        "Accuracy under attack. The shaded gap is robust overfitting: it grows where training goes "
        "on rising and validation does not. It is shaded once the training attack is at full "
        "epsilon."
    )
    if marks:
        caption += " Dotted verticals are selections of layers."
    lines = [("validation", False), ("training", True)]
    return Figure(title, [drawing], caption, lines)


def _gap(run: Run, index: int) -> Gap:
    """The two curves of robust accuracy; the area between them only at full epsilon."""
    epochs = run.series("epoch")
    return Gap(
        upper=Curve(epochs, run.series("train_robust_accuracy"), index, is_dashed=True),
        lower=Curve(epochs, run.series("robust_accuracy"), index),
        since=run.first_epoch_at_full_epsilon(),
    )


def _epsilon_figure(runs: Sequence[Run]) -> Figure | None:
    """Small radii are drawn in 255ths of the pixel range, the unit they are written in."""
    largest = max((value for run in runs for value in run.series("epsilon") if value), default=0.0)
    is_in_255ths = 0 < largest < 0.2
    return _figure(
        runs,
        "epsilon",
        "Epsilon in training" + (" (in 255ths)" if is_in_255ths else ""),
        "Radius of the training attack. Until it is level, losses and training accuracies of two "
        "epochs do not compare.",
        scale=255 if is_in_255ths else 1,
    )


def _figure(
    runs: Sequence[Run], key: str, title: str, caption: str, *, scale: float = 1
) -> Figure | None:
    """A curve for each run, or None where no run has a value."""
    curves = []
    for index, run in enumerate(runs):
        values = [None if value is None else scale * value for value in run.series(key)]
        curves.append(Curve(run.series("epoch"), values, index))
    if not any(curve.points() for curve in curves):
        return None
    drawing = report_figures.draw_curves(
        curves, identity=key, title=title, is_share=key.endswith("accuracy")
    )
    return Figure(title, [drawing], caption)


def _map_figures(runs: Sequence[Run]) -> list[Figure]:
    """A figure for each run whose selections have scores."""
    drawn = [_map_figure(run, index, len(runs) > 1) for index, run in enumerate(runs)]
    return [figure for figure in drawn if figure is not None]


def _map_figure(run: Run, index: int, is_one_of_many: bool) -> Figure | None:
    scored = [event for event in run.selections if event.get("scores")]
    if not scored:
        return None
    shown = _thinned(scored)
    limits = report_figures.score_limits([event["scores"] for event in scored])
    drawings = [
        report_figures.draw_layer_map(
            event["scores"],
            event.get("selected", []),
            limits=limits,
            identity=f"map-{index}-{number}",
            title=f"epoch {event['epoch']}: {event.get('criterion', 'score')}",
        )
        for number, event in enumerate(shown)
    ]
    caption = (
        "Layers by depth (across) and kind (down), coloured by score, one map for each selection, "
        "all on one scale. White dots are the layers chosen: see whether they wander or settle. "
        "The deeper the first dot, the more of each step is skipped."
    )
    if len(shown) < len(scored):
        caption += f" {len(shown)} of {len(scored)} selections are shown."
    title = f"Layer map of {run.name}" if is_one_of_many else "Layer map"
    return Figure(title, drawings, caption, is_wide=True)


def _thinned(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `_MAX_MAPS` of the events, evenly spaced, first and last among them."""
    if len(events) <= _MAX_MAPS:
        return events
    step = (len(events) - 1) / (_MAX_MAPS - 1)
    return [events[round(number * step)] for number in range(_MAX_MAPS)]


if __name__ == "__main__":
    command_line.run(main)
