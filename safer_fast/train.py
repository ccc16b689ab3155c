"""START HERE. The main job: configuration -> build -> loop -> evaluate -> save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safer_fast.command_line import parse_config, run
from safer_fast.config import Config
from safer_fast.run_folder import check_output


def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.train [--config RECIPE] [--dry-run] [flags]`; see `--help`."""
    config = parse_config(arguments)
    if config.dry_run:
        from safer_fast.dry_run import dry_run

        dry_run(config)
    else:
        train_model(config)


def train_model(config: Config) -> Path:
    """Trains what `config` describes and gives the run folder, complete with its report.

    Two stages: `selection.warmup_epochs` of adversarial training of everything, then SAFER on the
    selected layers. Raises ValueError for what a user can mend, before anything is written, and
    FloatingPointError when too many steps in a row are not finite.
    """
    if config.dry_run:
        raise ValueError("--dry-run: expected false where a run is trained, got true")
    from safer_fast.trainer import Trainer

    if config.output is not None:
        check_output(Path(config.output))
    with Trainer(config) as trainer:
        for epoch in range(1, config.epochs + 1):
            trainer.begin_epoch(epoch)
            figures = trainer.train_epoch(epoch)
            trainer.end_epoch(epoch, figures)
        return trainer.finish()


if __name__ == "__main__":
    run(main)
