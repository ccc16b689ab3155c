"""Accuracy of a run, clean and under attack: `python -m safer_fast.evaluate RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from safer_fast.config.attack_names import LIBRARY_ATTACKS, check_attack_name
from safer_fast.config.checks import check_ranges
from safer_fast.config.command_line import new_parser, parse, with_underscores
from safer_fast.config.commands import EvaluateConfig
from safer_fast.config.conversion import converted
from safer_fast.config.messages import shortened
from safer_fast.runtime.command import import_all, run

if TYPE_CHECKING:  # --help does not wait for torch
    from safer_fast.evaluation.accuracy import Accuracy


def main(arguments: Sequence[str]) -> None:
    """Run `python -m safer_fast.evaluate RUN [flags]`: print tables, append to metrics.jsonl."""
    parser = new_parser("evaluate", "Measure clean and robust accuracy of a run.")
    parser.add_class_arguments(EvaluateConfig, None, skip={"run"})
    parser.add_argument("run", type=str, metavar="RUN", help="run folder")
    words = with_underscores(arguments)
    for name in ("path", "image_column", "label_column"):
        words = [word.replace(f"--data.{name}", f"--{name}", 1) for word in words]
    words = [f"{word}=true" if word == "--fresh" else word for word in words]
    config = parse(parser, words, EvaluateConfig)
    import_all("safer_fast.evaluation.run")
    evaluate_run(config)


def evaluate_run(config: EvaluateConfig) -> list[Accuracy]:
    """Evaluate a run folder; print the figures and append them to its metrics.jsonl.

    An image is right under an attack if it is classified correctly without it and under it.
    Figures that were measured before are not measured again. Under torchrun the processes share the
    images. SIGINT and SIGTERM end it with SystemExit. Raises ValueError for a folder that is no run
    and for data and settings that do not fit its model.
    """
    config = converted(config)
    _check(config)
    from safer_fast.evaluation.accuracy import Accuracy
    from safer_fast.evaluation.run import evaluate_folder

    rows = evaluate_folder(config)
    names = [field.name for field in fields(Accuracy)]
    return [Accuracy(**{name: row[name] for name in names}) for row in rows]


def _check(config: EvaluateConfig) -> None:
    """Raise ValueError for settings that fit no run."""
    if not config.attacks:
        raise ValueError("--attacks: expected at least one attack, got none")
    for name in config.attacks:
        check_attack_name(name, "--attacks", LIBRARY_ATTACKS)
    check_ranges(config)
    if config.source is None and config.source_weights != "last":
        raise ValueError(
            "--source-weights: expected --source beside it, "
            f"got only {shortened(config.source_weights)}"
        )
    for name in ("image_column", "label_column"):
        if (column := getattr(config, name)) is not None and config.path is None:
            raise ValueError(f"--data.{name}: expected --data.path beside it, got only {column}")


if __name__ == "__main__":
    run(main, outlives_reader=True)
