"""Search of a run folder for `--resume`: a finished run, or the checkpoint to resume from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safer_fast.config.command_line import parse_config
from safer_fast.config.conversion import converted_to
from safer_fast.config.schema import Config
from safer_fast.runs.checkpoints.file import Checkpoint, read_checkpoint
from safer_fast.runs.checkpoints.folder import CheckpointFolder
from safer_fast.runs.folder import check_output, clear_run_folder, save_settings
from safer_fast.runs.layout import CHECKPOINTS, CONFIG, METRICS, RunFolder
from safer_fast.runs.lock import RunLock
from safer_fast.runs.loggers.mending import has_ended, keep_evaluations, mend_metrics
from safer_fast.runs.progress import RunProgress, check_state
from safer_fast.runtime.files import check_no_link
from safer_fast.runtime.ranks import Ranks

# Settings that do not change the computed bits. Data is compared by its contents instead of its
# path, its backend by the one that `auto` has chosen.
_FREE = {
    "output",
    "resume",
    "dry_run",
    "data.path",
    "data.validation_path",
    "data.test_path",
    "data.extra_path",
    "data.backend",
    "data.num_workers",
    "data.prefetch",
    "runtime.log_every_steps",
    "runtime.max_skipped_steps",
}
_FREE_GROUPS, _ROUNDING = ("checkpoint.", "log."), ("runtime.", "evaluation.batch_size")
# Settings of runs that are older than these, where the default is another by now.
_OLDER = {"attack.precision": "amp"}


@dataclass(frozen=True)
class Found:
    """Result of `find_run`: a finished run's folder, a checkpoint to resume from, or neither.

    lock: keeps other processes out of the run folder. notes: lines for the run's introduction.
    """

    finished: Path | None = None
    checkpoint: Checkpoint | None = None
    lock: RunLock | None = None
    notes: Sequence[str] = ()


def find_run(
    config: Config,
    ranks: Ranks,
    lock: RunLock | None = None,
    report: Callable[[str], None] = print,
) -> Found:
    """Search the folder `--output`; raises ValueError if `--resume` does not allow its contents.

    Rank 0 searches, once it has the lock: a run that another process writes is not touched. With
    `auto` a run without a checkpoint is removed. A finished run must have the same settings; one
    that has lost its weights or config.json is one to resume, from its last checkpoint.
    """
    if config.output is None:
        return Found(lock=lock)
    folder, found = Path(config.output), None
    answer: dict[str, Any] = {"is_finished": False, "file": None}
    if ranks.is_first:
        if lock is not None and config.resume != "never" and folder.is_dir():
            lock.take(folder)
        if config.resume != "never" and (folder / CHECKPOINTS).is_dir():
            _restore_config(folder, report)
        answer["is_finished"] = config.resume != "never" and _is_finished(folder)
        if answer["is_finished"]:
            check_settings(parse_config(["--config", str(folder / CONFIG)]).to_dict(), config)
        if answer["is_finished"] and _lost_results(folder, report):
            keep_evaluations(RunFolder(folder))
            answer["is_finished"] = False
        if answer["is_finished"]:
            mend_metrics(folder / METRICS, (folder / METRICS).stat().st_size, report)
        elif found := _newest(folder, config, report):
            size = mend_metrics(folder / METRICS, _metrics_size(found), report)
            answer |= {"file": found.path.name, "needs": found.needs, "size": size}
    answer = ranks.share(answer)
    if answer["file"]:
        found = found or read_checkpoint(folder / CHECKPOINTS / answer["file"])
        found = _as_found(found, answer["needs"], answer["size"])
    return Found(folder if answer["is_finished"] else None, found, lock)


def settings_it_began_with(folder: Path) -> Config:
    """Settings of a run: of run.yaml or, where that is damaged, of the newest readable checkpoint.

    Raises ValueError, one line, where neither can be read.
    """
    try:
        return parse_config(["--config", str(folder / CONFIG)])
    except ValueError:
        newest = _newest_readable(folder)
        if newest is None:
            raise
    return converted_to(Config, newest.state["config"])


def settings_digest(config: Config) -> str:
    """A short hash of all settings that change the results, so that ranks can compare theirs."""
    names = {name: value for name, value in _flat(config.to_dict()).items() if _is_checked(name)}
    return hashlib.blake2b(json.dumps(names).encode(), digest_size=8).hexdigest()


def check_settings(stored: Mapping[str, Any], config: Config) -> list[str]:
    """Return a line for each changed setting that affects rounding alone.

    Raises ValueError for changed settings that affect more. stored: `Config.to_dict` of the run, as
    JSON has it; settings that are newer than the run count as those that change nothing.
    Under `attack.precision auto` a run whose attack is that of amp keeps to it.
    """
    before, now = _flat(Config().to_dict()) | _OLDER | _flat(stored), _flat(config.to_dict())
    changes = {
        name: f"{name} {_shown(before.get(name))}, not {_shown(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
        and name not in _FREE
        and not name.startswith(_FREE_GROUPS)
        and (name, before.get(name), now.get(name)) != ("attack.precision", "amp", "auto")
    }
    refused = [text for name, text in changes.items() if _is_checked(name)]
    if refused:
        raise ValueError(f"--resume: expected the settings of the run: {'; '.join(refused)}")
    return [f"resumed with other rounding: {text}" for text in changes.values()]


def check_numerics(stored: Mapping[str, Any], numerics: Mapping[str, Any]) -> list[str]:
    """Return a line for each difference of the machine that may change rounding.

    Raises ValueError for other data. stored, numerics: `numerics_of` the run, and of this process.
    """
    check_data(stored, numerics)
    return [
        f"resumed with other rounding: {name} {stored.get(name)}, now {numerics[name]}"
        for name in numerics
        if stored.get(name) != numerics[name] and name not in ("normalisation", "new_layers")
    ]


def check_data(stored: Mapping[str, Any], numerics: Mapping[str, Any]) -> None:
    """Raise ValueError for other data than those of a run, or another backend; see above."""
    for name in ("data", "backend"):
        if stored[name] != numerics[name]:
            flag = "--data.path" if name == "data" else "--data.backend"
            raise ValueError(
                f"{flag}: expected the data of the run that is resumed ({stored[name]}), "
                f"got other data ({numerics[name]})"
            )


def facts_of_other_data(folder: Path, config: Config, is_given: bool) -> dict[str, Any] | None:
    """Facts of a finished run in its newest checkpoint, to compare other data with.

    None where it has no checkpoint any more, and where the paths of the data are those of the run:
    nothing is read for these. is_given: data are given in Python.
    """
    paths = [name for name in _FREE if name.startswith("data.") and name.endswith("path")]
    own = _flat(parse_config(["--config", str(folder / CONFIG)]).to_dict())
    now = _flat(config.to_dict())
    if not is_given and all(own[name] == now[name] for name in paths):
        return None
    newest = _newest_readable(folder)
    return dict(newest.state["facts"]) if newest else None


def _newest(folder: Path, config: Config, report: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest usable checkpoint, None if there is none and `--resume` allows that."""
    if config.resume == "never":
        check_output(folder)
        return None
    check_no_link(folder / CHECKPOINTS)
    size = (folder / METRICS).stat().st_size if (folder / METRICS).is_file() else 0

    def refuse(checkpoint: Checkpoint) -> str | None:
        needed = None if (why := _fault_of(checkpoint)) else _metrics_size(checkpoint)
        if needed is not None and size < needed:
            return f"it needs {needed} bytes of {METRICS}, which has {size}"
        return why

    store = CheckpointFolder(folder / CHECKPOINTS, keep=config.checkpoint.keep, report=report)
    try:
        found = store.latest(refuse)
    except ValueError:  # the run can be resumed without the best weights and the whole log
        found = store.latest(_fault_of, spare=("best",))
    finally:
        store.close()
    if found is None and config.resume == "must":
        raise ValueError(f"--resume: expected a run with checkpoints for must, got {folder}")
    if found is None:
        clear_run_folder(folder)
        check_output(folder)
    return found


def _is_finished(folder: Path) -> bool:
    """Return true if the run has written its last line."""
    return (folder / CONFIG).is_file() and has_ended(folder / METRICS)


def _lost_results(folder: Path, report: Callable[[str], None]) -> bool:
    """Return true for a finished run that lacks a file, and can write it again."""
    files = RunFolder(folder)
    wanted = files.model_config, files.weights("last"), files.weights("best")
    lost = next((file.name for file in wanted if not file.is_file()), None)
    if lost is None:
        return False
    is_there = any(files.checkpoints.glob("step-*.safetensors"))
    then = "it is written again from the last" if is_there else "and there is no"
    report(f"{folder}: {lost} is lost, {then} checkpoint")
    return is_there


def _fault_of(checkpoint: Checkpoint) -> str | None:
    """Return the reason why this version cannot read the checkpoint, None if it can."""
    try:
        check_state(checkpoint.state)
    except ValueError as error:
        return str(error)
    return None


def _metrics_size(checkpoint: Checkpoint) -> int:
    return int(checkpoint.state["progress"]["metrics_size"])


def _as_found(checkpoint: Checkpoint, needs: dict[str, str], metrics_size: int) -> Checkpoint:
    """Return the checkpoint with the log's real size, and without best weights that are lost."""
    progress = checkpoint.state["progress"] | {"metrics_size": metrics_size}
    if progress["best_file"] not in (None, *needs):
        progress |= {"best_file": None, "best": list(RunProgress().best)}
    return replace(checkpoint, needs=needs, state=checkpoint.state | {"progress": progress})


def _restore_config(folder: Path, report: Callable[[str], None]) -> None:
    """Write a damaged run.yaml again, with the settings of the newest readable checkpoint."""
    try:
        parse_config(["--config", str(folder / CONFIG)])
        return
    except ValueError as error:
        why = error
    if newest := _newest_readable(folder):
        save_settings(newest.state["config"], folder)
        report(f"{CONFIG} was damaged ({why}): restored from {newest.path}")


def _newest_readable(folder: Path) -> Checkpoint | None:
    for path in sorted((folder / CHECKPOINTS).glob("step-*.safetensors"), reverse=True):
        with suppress(ValueError):
            checkpoint = read_checkpoint(path)
            check_state(checkpoint.state)
            return checkpoint
    return None


def _is_checked(name: str) -> bool:
    """Return true for a setting that changes the results by more than rounding."""
    return name not in _FREE and not name.startswith((*_FREE_GROUPS, *_ROUNDING))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten settings to `group.name`, as JSON has them; a setting may be a dictionary itself."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and not prefix:
            flat |= _flat(value, f"{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, list | tuple) else value
    return flat


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
