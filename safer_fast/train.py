"""START HERE. The main command: flags -> configuration -> a run (training/run.py) or a dry run."""

from __future__ import annotations

from collections.abc import Sequence

from safer_fast.config.command_line import find_open_flags, parse_config, scaled_by_epochs
from safer_fast.config.doors import speaking_flags
from safer_fast.runtime.command import import_all, run


@speaking_flags()
def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.train [--config RECIPE] [--dry-run] [flags]`; see `--help`."""
    config = parse_config(arguments)
    import_all("safer_fast.training.run")
    from safer_fast.training.defaults import choose_defaults

    if config.model.checkpoint is not None:
        from safer_fast.models.weights_source import settings_of_checkpoint

        config = parse_config(arguments, settings_of_checkpoint(config))
    config, notes = choose_defaults(config, find_open_flags(arguments))
    notes = [*scaled_by_epochs(arguments), *notes]
    if config.dry_run:
        from safer_fast.runtime.ranks import connected
        from safer_fast.training.dry_run import dry_run

        with connected(config.runtime.device != "cpu") as ranks:
            dry_run(config, ranks, notes)
    else:
        from safer_fast.training.run import train_model

        train_model(config, notes)


if __name__ == "__main__":
    run(main, outlives_reader=True)
