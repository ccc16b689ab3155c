"""The layers by every criterion: `python -m safer_fast.select RUN`; writes selection.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safer_fast import ranges
from safer_fast.command_configs import SelectConfig
from safer_fast.command_line import new_parser, parse, run, with_underscores
from safer_fast.conversion import converted
from safer_fast.messages import cut
from safer_fast.select_plot import FORMATS, save_maps
from safer_fast.select_scores import CRITERIA, Measured, measure_run, rank_correlations
from safer_fast.select_table import correlation_table, score_table
from safer_fast.validation import check_file, check_ranges

_LEFT_OUT = "random measures nothing and least-sharp is sharpness turned round: neither is compared"


def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.select RUN [flags]`: prints the ranked layers, writes them as JSON."""
    parser = new_parser("select", "Score the layers of a trained model by every criterion.")
    parser.add_class_arguments(SelectConfig, None, skip={"run"})
    parser.add_argument("run", type=str, metavar="RUN", help="run folder")
    select(parse(parser, _with_plot_file(with_underscores(arguments)), SelectConfig))


def select(config: SelectConfig) -> list[str]:
    """Scores the layers of a run's model; prints the tables, writes them, gives the selected names.

    The names are those that `criterion` selects; the other criteria stand beside it. Raises
    ValueError for settings that mean nothing, and for a folder that is no run.
    """
    from safer_fast.checkpoint import save_json
    from safer_fast.selection import select_layers

    config = converted(config)
    _check(config)
    chosen = f"sharpness-{config.radius}" if config.criterion == "sharpness" else config.criterion
    measured = measure_run(config, chosen, config.criteria)
    selected = {
        name: select_layers(by_layer, fraction=config.fraction)
        for name, by_layer in measured.scores.items()
    }
    correlations = rank_correlations(measured.scores)
    print(score_table(measured.scores, selected))
    print("\n" + correlation_table(correlations))
    output = Path(config.output) if config.output else Path(config.run) / "selection.json"
    save_json(_content(config, chosen, measured, selected, correlations), output)
    print("\n" + _conclusion(config, chosen, measured, selected))
    print(f"written to {output}")
    if config.plot is not None:
        picture = Path(config.plot) if config.plot else Path(config.run) / "selection.svg"
        save_maps(picture, measured.scores, selected)
        print(f"drawn in {picture}")
    return selected[chosen]


def _with_plot_file(words: Sequence[str]) -> list[str]:
    """The words with `--plot` alone as `--plot=`: a file that it may name has a known ending."""
    joined = []
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        has_file = following.endswith(FORMATS)
        joined.append("--plot=" if word == "--plot" and not has_file else word)
    return joined


def _check(config: SelectConfig) -> None:
    from safer_fast.criteria import REGISTERED, check_criterion, known_criteria

    check_ranges(config, ranges.SELECT)
    if config.plot and not config.plot.endswith(FORMATS):
        raise ValueError(f"--plot: expected a .svg or .png file, got {cut(config.plot)}")
    check_file(config.output, "--output")
    check_file(config.plot, "--plot")
    scoring = [name for name in known_criteria() if name != "all"]
    check_criterion(config.criterion, "--criterion", scoring)
    for name in config.criteria:
        check_criterion(name, "--criteria", [*CRITERIA, *REGISTERED])
    if Path(config.run).is_file():
        raise ValueError(
            f"RUN: expected a run folder, got {config.run}: weights alone do not say which data "
            "the layers are scored on"
        )


def _content(
    config: SelectConfig,
    chosen: str,
    measured: Measured,
    selected: dict[str, list[str]],
    correlations: dict[str, dict[str, float | None]],
) -> dict[str, Any]:
    scores = measured.scores[chosen]
    return {
        "criterion": config.criterion,
        "rho": config.rho,
        "radius": config.radius,
        "fraction": config.fraction,
        "selected": selected[chosen],
        "scores": {name: scores[name] for name in sorted(scores, key=lambda n: (-scores[n], n))},
        "criteria": {
            name: {"scores": by_layer, "selected": selected[name]}
            for name, by_layer in measured.scores.items()
        },
        "rank_correlations": correlations,
        **measured.facts,
    }


def _conclusion(
    config: SelectConfig, chosen: str, measured: Measured, selected: dict[str, list[str]]
) -> str:
    facts, names = measured.facts, selected[chosen]
    lines = [f"{name} would select {', '.join(layers)}" for name, layers in selected.items()]
    lines[0] = (
        f"{chosen} selects {len(names)} of {len(measured.scores[chosen])} layers (*): "
        f"{', '.join(names)}"
    )
    circumstances = (
        f"{facts['images']} images, {facts['attack']} in {facts['norm']} epsilon "
        f"{facts['epsilon']:.4g}, rho {config.rho:g}, amp {facts['amp']}, {facts['seconds']} s"
    )
    return "\n".join([*lines, circumstances, _LEFT_OUT])


if __name__ == "__main__":
    run(main)
