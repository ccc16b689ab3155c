"""A training run from its configuration to its report: build, loop, evaluate, save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safer_fast.config.checks import check_new, checked
from safer_fast.config.doors import door
from safer_fast.config.schema import Config
from safer_fast.data.formats.given import giving
from safer_fast.runs.layout import RunFolder
from safer_fast.runs.lock import RunLock
from safer_fast.runs.loggers.mending import restore_evaluations
from safer_fast.runs.report.page import write_report
from safer_fast.runs.resume import find_run
from safer_fast.runtime.ranks import connected
from safer_fast.runtime.signals import Stopped
from safer_fast.training.setup import check_data_of_finished
from safer_fast.training.trainer import Trainer


@door()
def train_model(config: Config, notes: Iterable[str] = (), *, data: Any = None) -> Path:
    """Train the model that `config` describes; return the run folder, complete with its report.

    Two stages: `selection.warmup_epochs` of adversarial training of everything, then SAFER on the
    selected layers (Gopal et al., ICCV 2025, arXiv 2501.01529). Under torchrun all processes train
    together. SIGINT and SIGTERM end the run with a checkpoint and SystemExit. Raises ValueError for
    mistakes of a user, before anything is written, and FloatingPointError if too many steps in a
    row are not finite.

    >>> from sklearn.datasets import load_digits
    >>> images, labels = load_digits(return_X_y=True)
    >>> images = (images / 16).reshape(-1, 8, 8)  # [N, H, W], floats in [0, 1]
    >>> config = Config.from_recipe("digits", epochs=2, selection={"warmup_epochs": 1}, attack={
    ...     "clean_epochs": 0, "epsilon_warmup_epochs": 0, "steps": 2})
    >>> folder = train_model(config, data={
    ...     "train": (images[:400], labels[:400]), "test": (images[400:500], labels[400:500])})
    >>> (folder / "model.safetensors").is_file()
    True

    Args:
        config: the settings; numbers and fractions may be texts, as on the command line
            (`epsilon="8/255"`).
        notes: lines for the run's introduction.
        data: the images, in place of `config.data.path`: one data set, or a mapping from train,
            validation, test and extra (see `data.extra_path`) to one each. A data set is a pair of
            arrays or tensors, images [N, H, W], [N, H, W, C] or [N, C, H, W], uint8 or floats in
            [0, 1], and integer labels [N]; a dataset of torch with a length, whose items are an
            image (of PIL, an array or a tensor, without random transforms) and a label; or a
            dataset of Hugging Face. Floats are rounded to the 256 levels of a byte. A validation
            split is cut from the training data if there is none.
    """
    config = checked(config)
    check_new(config)
    if config.dry_run:
        raise ValueError("--dry-run: expected false where a run is trained, got true")
    for name in ("validation_path", "test_path") if data is not None else ():
        if (other := getattr(config.data, name)) is not None:
            raise ValueError(
                f"data.{name}: expected none beside the data given in Python, got {other}"
            )
    if isinstance(data, Mapping) and "extra" in data and config.data.extra_path is not None:
        raise ValueError(
            f"data.extra_path: expected none beside data['extra'], got {config.data.extra_path}"
        )
    uses_gpu = config.runtime.device != "cpu"
    with giving(data, config.data.path) as path, connected(uses_gpu) as ranks, RunLock() as lock:
        config.data.path = path
        found = replace(find_run(config, ranks, lock), notes=tuple(notes))
        if found.finished is not None:
            check_data_of_finished(found.finished, config, ranks, is_given=data is not None)
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
                folder = trainer.finish()
            except Stopped as stop:
                trainer.stop(stop.signal.name)
                raise
        if ranks.is_first and restore_evaluations(RunFolder(folder)):
            write_report([folder])
        return folder
