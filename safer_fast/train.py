"""START HERE. The main command: configuration -> build -> loop -> evaluate -> save."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from safer_fast.config.checks import check_new
from safer_fast.config.command_line import find_open_flags, parse_config, scaled_by_epochs
from safer_fast.config.conversion import checked
from safer_fast.config.schema import Config
from safer_fast.runs.lock import RunLock
from safer_fast.runtime.command import import_all, run
from safer_fast.runtime.ranks import connected
from safer_fast.runtime.signals import Stopped


def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.train [--config RECIPE] [--dry-run] [flags]`; see `--help`."""
    config = parse_config(arguments)
    import_all("safer_fast.training.trainer", "safer_fast.runs.report.page")
    from safer_fast.training.defaults import choose_defaults

    if config.model.checkpoint is not None:
        from safer_fast.models.weights_source import settings_of_checkpoint

        config = parse_config(arguments, settings_of_checkpoint(config))
    config, notes = choose_defaults(config, find_open_flags(arguments))
    notes = [*scaled_by_epochs(arguments), *notes]
    if config.dry_run:
        from safer_fast.training.dry_run import dry_run

        with connected(config.runtime.device != "cpu") as ranks:
            dry_run(config, ranks, notes)
    else:
        train_model(config, notes)


def train_model(config: Config, notes: Iterable[str] = ()) -> Path:
    """Train the model that `config` describes; return the run folder, complete with its report.

    Two stages: `selection.warmup_epochs` of adversarial training of everything, then SAFER on the
    selected layers. Under torchrun all processes train together. notes: lines for the run's
    introduction. SIGINT and SIGTERM end the run with a checkpoint and SystemExit. Settings may be
    given as on the command line (`epsilon="8/255"`). Raises ValueError for mistakes of a user,
    before anything is written, and FloatingPointError if too many steps in a row are not finite.
    """
    config = checked(config)
    check_new(config)
    if config.dry_run:
        raise ValueError("--dry-run: expected false where a run is trained, got true")
    with connected(config.runtime.device != "cpu") as ranks, RunLock() as lock:
        from safer_fast.runs.report.page import write_report
        from safer_fast.runs.resume import find_run
        from safer_fast.training.trainer import Trainer

        found = replace(find_run(config, ranks, lock), notes=tuple(notes))
        if found.finished is not None:
            if ranks.is_first:
                print(f"finished already; report: {write_report([found.finished])}")
            return found.finished
        trainer = Trainer(config, ranks, found)
        del found  # the trainer has copied its tensors
        with trainer:
            try:
                for epoch in trainer.epochs():
                    trainer.begin_epoch(epoch)
                    figures = trainer.train_epoch(epoch)
                    trainer.end_epoch(epoch, figures)
                return trainer.finish()
            except Stopped as stop:
                trainer.stop(stop.signal.name)
                raise


if __name__ == "__main__":
    run(main, outlives_reader=True)
