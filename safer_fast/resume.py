"""What `--resume` finds in a run folder, and whether the run that is asked for is that run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safer_fast.checkpoint_file import Checkpoint, read_checkpoint
from safer_fast.checkpoint_folder import CheckpointFolder
from safer_fast.command_line import parse_config
from safer_fast.config import Config
from safer_fast.distributed import Ranks
from safer_fast.metrics import FILE_NAME, read_metrics
from safer_fast.run_folder import CHECKPOINTS, CONFIG, check_output, clear_run_folder
from safer_fast.run_lock import RunLock
from safer_fast.whole_file import check_no_link

# Settings that change nothing that is computed; data is compared by what it holds, not by where it
# lies, its backend by what `auto` has come to.
_FREE = {
    "output",
    "resume",
    "dry_run",
    "data.path",
    "data.validation_path",
    "data.test_path",
    "data.backend",
    "data.num_workers",
    "data.prefetch",
    "runtime.max_skipped_steps",
}
_FREE_GROUPS, _ROUNDING_GROUP = ("checkpoint.", "log."), "runtime."


@dataclass(frozen=True)
class Found:
    """The folder of a run that is over, or a checkpoint to go on from; neither: a run to begin.

    lock: keeps the folder of the run to this process. notes: lines for the run's introduction.
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
    """What `--output` holds; raises ValueError where it is not what `--resume` allows.

    The first rank looks, once it has the lock: nothing of a run that another process writes is
    touched. A run of ours that has no checkpoint yet is cleared away by `auto`. A run that is over
    is one only of its own settings.
    """
    if config.output is None:
        return Found(lock=lock)
    folder, found = Path(config.output), None
    answer: dict[str, Any] = {"is_finished": False, "file": None}
    if ranks.is_first:
        if lock is not None and config.resume != "never" and folder.is_dir():
            lock.take(folder)
        answer["is_finished"] = config.resume != "never" and _is_finished(folder)
        if answer["is_finished"]:
            check_settings(parse_config(["--config", str(folder / CONFIG)]).to_dict(), config)
        else:
            found = _newest(folder, config, report)
            answer["file"] = None if found is None else found.path.name
    answer = ranks.share(answer)
    if answer["file"] and found is None:
        found = read_checkpoint(folder / CHECKPOINTS / answer["file"])
    return Found(folder if answer["is_finished"] else None, found, lock)


def settings_digest(config: Config) -> str:
    """Hexadecimal digits that tell apart the settings of different results."""
    names = {name: value for name, value in _flat(config.to_dict()).items() if _is_checked(name)}
    return hashlib.blake2b(json.dumps(names).encode(), digest_size=8).hexdigest()


def check_settings(stored: Mapping[str, Any], config: Config) -> list[str]:
    """Lines on settings that differ in rounding only; raises ValueError for any that change more.

    stored: `Config.to_dict` of the run, as JSON has it.
    """
    before, now = _flat(stored), _flat(config.to_dict())
    changes = {
        name: f"{name} {_shown(before.get(name))}, not {_shown(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
        and name not in _FREE
        and not name.startswith(_FREE_GROUPS)
    }
    refused = [text for name, text in changes.items() if _is_checked(name)]
    if refused:
        raise ValueError(f"--resume: expected the settings of the run: {'; '.join(refused)}")
    return [f"goes on with other rounding: {text}" for text in changes.values()]


def check_facts(stored: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Lines on a machine that may round differently; raises ValueError for other data.

    Both: by name; `data` and `backend` decide what is computed.
    """
    for name in ("data", "backend"):
        if stored[name] != facts[name]:
            flag = "--data.path" if name == "data" else "--data.backend"
            raise ValueError(
                f"{flag}: expected the data of the run that is resumed ({stored[name]}), "
                f"got other data ({facts[name]})"
            )
    return [
        f"goes on with other rounding: {name} {stored.get(name)}, now {facts[name]}"
        for name in facts
        if stored.get(name) != facts[name] and name != "normalisation"
    ]


def _newest(folder: Path, config: Config, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest usable checkpoint; None where there is none and that is allowed."""
    if config.resume == "never":
        check_output(folder)
        return None
    check_no_link(folder / CHECKPOINTS)
    size = (folder / FILE_NAME).stat().st_size if (folder / FILE_NAME).is_file() else 0

    def refuse(checkpoint: Checkpoint) -> str | None:
        needed = checkpoint.state["progress"]["metrics_size"]
        if size < needed:
            return f"it needs {needed} bytes of {FILE_NAME}, which has {size}"
        return None

    store = CheckpointFolder(folder / CHECKPOINTS, keep=config.checkpoint.keep, report=report)
    found = store.latest(refuse)
    store.close()
    if found is None and config.resume == "must":
        raise ValueError(f"--resume must: expected a run with checkpoints, got {folder}")
    if found is None:
        clear_run_folder(folder)
        check_output(folder)
    return found


def _is_finished(folder: Path) -> bool:
    """Whether the run has written its last line."""
    if not (folder / FILE_NAME).is_file() or not (folder / CONFIG).is_file():
        return False
    return any(event["event"] == "end" for event in read_metrics(folder / FILE_NAME))


def _is_checked(name: str) -> bool:
    """Whether a setting decides what is computed, beyond rounding."""
    return name not in _FREE and not name.startswith((*_FREE_GROUPS, _ROUNDING_GROUP))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by `group.name`, as JSON has them; a dictionary of free names is one setting."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and not prefix:
            flat |= _flat(value, f"{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, list | tuple) else value
    return flat


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
