"""Layers ranked by every criterion: `python -m safer_fast.select RUN`, selection.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safer_fast.config.command_line import with_underscores
from safer_fast.config.commands import SELECTION_FIELDS, SelectConfig
from safer_fast.config.conversion import converted
from safer_fast.config.doors import door, speaking_flags
from safer_fast.config.parser import new_parser, parse
from safer_fast.runs.layout import RunFolder
from safer_fast.runtime.command import import_all, run
from safer_fast.selection.comparison import (
    compare_criteria,
    rank_correlations,
    with_settings_of_run,
)
from safer_fast.selection.comparison_output import (
    check_settings,
    comparison_conclusion,
    comparison_content,
    correlation_table,
    save_maps,
    score_table,
    with_plot_file,
)


@speaking_flags(SELECTION_FIELDS)
def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.select RUN [flags]`: print the ranked layers, write them as JSON."""
    parser = new_parser("select", "Score the layers of a trained model by every criterion.")
    parser.add_class_arguments(SelectConfig, None, skip={"run"})
    parser.add_argument("run", type=str, metavar="RUN", help="run folder")
    config = parse(parser, with_plot_file(with_underscores(arguments)), SelectConfig)
    import_all("safer_fast.runs.folder", "safer_fast.selection.scoring")
    select(config)


@door(SELECTION_FIELDS)
def select(config: SelectConfig) -> list[str]:
    """Score the layers of a run's model; print and write the tables; return the selected names.

    The names are those that `criterion` selects; the other criteria stand beside it. Raise
    ValueError for settings that mean nothing, and for a folder that is no run.
    """
    from safer_fast.runtime.files import save_json
    from safer_fast.selection.scoring import select_layers

    config = with_settings_of_run(converted(config))
    check_settings(config)
    assert config.fraction is not None
    chosen = f"sharpness-{config.radius}" if config.criterion == "sharpness" else config.criterion
    measured = compare_criteria(config, chosen, config.criteria)
    selected = {
        name: select_layers(by_layer, fraction=config.fraction)
        for name, by_layer in measured.scores.items()
    }
    correlations = rank_correlations(measured.scores)
    print(f"{score_table(measured.scores, selected)}\n\n{correlation_table(correlations)}")
    folder = RunFolder(Path(config.run))
    output = Path(config.output) if config.output else folder.selection
    save_json(comparison_content(config, chosen, measured, selected, correlations), output)
    print("\n" + comparison_conclusion(config, chosen, measured, selected))
    print(f"written to {output}")
    if config.plot is not None:
        picture = Path(config.plot) if config.plot else folder.selection_map
        save_maps(picture, measured.scores, selected)
        print(f"drawn in {picture}")
    return selected[chosen]


if __name__ == "__main__":
    run(main)
