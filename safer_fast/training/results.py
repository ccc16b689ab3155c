"""The end of a run: the exported model, the gallery, the report, and the final figures as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safer_fast.runs.accuracies import accuracy_table, notes
from safer_fast.runs.folder import export_model
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runs.progress import RunProgress
from safer_fast.runs.report.page import write_report
from safer_fast.training.learner import Learner
from safer_fast.training.validation import Validator


def write_results(
    folder: Path,
    learner: Learner,
    validator: Validator,
    log: RunLog,
    progress: RunProgress,
    accuracies: Sequence[dict[str, Any]],
) -> None:
    """Write the last weights as a timm model, a gallery, and the report; print the final figures.

    A report that cannot be written is no reason to fail: all that was trained and measured is kept.
    accuracies: rows of final figures.
    """
    export_model(
        learner.engine.model,
        learner.network_state(),
        folder,
        config=learner.config,
        data=validator.data,
        accuracies=accuracies,
        is_tower=learner.engine.objective.is_of_tower,
    )
    validator.show_images(learner.evaluated_weights(), folder, progress.num_steps)
    log.write("end", epoch=progress.epoch - 1, step=progress.num_steps)
    try:
        report = str(write_report([folder]))
    except (ValueError, OSError) as error:
        report = f"none ({error})"
    log.say("\n".join([accuracy_table(accuracies), *notes(accuracies)]))
    log.say(f"run folder: {folder}\nreport: {report}")
