"""Accuracy of a run, clean and under attack: `python -m safer_fast.evaluate RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from safer_fast.config.checks import check_evaluation
from safer_fast.config.command_line import with_underscores
from safer_fast.config.commands import DATA_FIELDS, EvaluateConfig
from safer_fast.config.doors import speaking_flags
from safer_fast.config.evaluation_tables import check_tables
from safer_fast.config.parser import new_parser, parse
from safer_fast.runtime.command import import_all, run


@speaking_flags(DATA_FIELDS)
def main(arguments: Sequence[str]) -> None:
    """Run `python -m safer_fast.evaluate RUN [flags]`: print tables, append to metrics.jsonl."""
    parser = new_parser("evaluate", "Measure clean and robust accuracy of a run.")
    parser.add_class_arguments(EvaluateConfig, None, skip={"run"})
    parser.add_argument("run", type=str, metavar="RUN", help="run folder")
    words = with_underscores(arguments)
    for name, own in DATA_FIELDS.items():
        words = [word.replace(f"--{name}", f"--{own}", 1) for word in words]
    words = [f"{word}=true" if word == "--fresh" else word for word in words]
    config = parse(parser, words, EvaluateConfig)
    check_evaluation(config)
    check_tables(config)
    import_all("safer_fast.evaluation.entry")  # --help does not wait for torch
    from safer_fast.evaluation.entry import evaluate_run

    evaluate_run(config)


if __name__ == "__main__":
    run(main, outlives_reader=True)
