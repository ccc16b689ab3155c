"""Run folder: created, cleared, saved into, and loaded as a model again."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from safer_fast import __version__
from safer_fast.config.command_line import parse_config
from safer_fast.config.messages import printable
from safer_fast.config.schema import Config, ModelConfig
from safer_fast.runs.facts import KEY, checked_facts, known_data
from safer_fast.runs.layout import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    METRICS,
    TEACHER,
    TEXT_EMBEDDINGS,
    WANDB,
    WANDB_ID,
    RunFolder,
)
from safer_fast.runs.lock import RunLock
from safer_fast.runs.loggers.mending import has_ended
from safer_fast.runtime.files import write_whole

if TYPE_CHECKING:
    from safer_fast.data import Data
    from safer_fast.data.splits import KnownData
    from safer_fast.models.arenas import ParameterArenas
    from safer_fast.models.robust_model import RobustModel
    from safer_fast.runtime.device import Runtime


@dataclass(frozen=True)
class LoadedRun:
    """A loaded run: its configuration, its model on the device in eval mode, its classes.

    short_side: pixels that the short side of an image is resized to before the centre is kept.
    known_data: facts of the data that it was trained on. weights: the file that the weights were
    loaded from. arenas: of its parameters, if it was loaded frozen. is_tower: its network gives
    embeddings; the model has a zero-shot head if the run has text embeddings.
    """

    config: Config
    model: RobustModel
    class_names: list[str]
    num_channels: int
    image_size: int
    short_side: int
    known_data: KnownData
    runtime: Runtime
    weights: Path
    arenas: ParameterArenas | None = None
    is_tower: bool = False

    @property
    def needs_labels(self) -> bool:
        """False for a tower whose embeddings nothing classifies."""
        return not self.is_tower or self.model.text is not None


def create_run_folder(config: Config, data_name: str, lock: RunLock | None = None) -> Path:
    """Create the run's folder, or take an empty one; raise ValueError for one that is in use.

    lock: keeps the folder to this process.
    """
    today = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(config.output or printable(f"runs/{today}-{config.model.name}-{data_name}"))
    base, number = folder.name, 1
    while config.output is None and folder.exists():  # begun in the same second
        number += 1
        folder = folder.with_name(f"{base}-{number}")
    is_begun = lock is not None and RunFolder(folder).lock.exists()  # its lock names the owner
    if not is_begun:
        check_output(folder)
    try:
        # a link to a folder that another run makes at the same moment is not in the way
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output: expected a folder that can be made, got {folder}: {error}"
        ) from None
    if lock is not None:
        lock.take(folder)
        check_output(folder)  # another run may have begun in it, and ended, since the first look
    return folder


def check_output(folder: Path) -> None:
    """Raise ValueError unless `folder` is missing or holds nothing but a lock, and is printable."""
    if printable(str(folder)) != str(folder):
        raise ValueError(
            "--output: expected a path without line breaks and control characters, got "
            f"{str(folder)!r:.80}"
        )
    if folder.exists() and not (folder.is_dir() and _names(folder) <= {LOCK}):
        got = "which is not empty" if folder.is_dir() else "a file"
        raise ValueError(f"--output: expected a new or empty folder, got {folder}, {got}")


def clear_run_folder(folder: Path) -> None:
    """Remove the files that a run wrote before its first checkpoint, so that it can begin again.

    A folder with any other file is left as it is. The lock of the folder must be held, and stays.
    """
    is_begun = folder.is_dir() and _names(folder) <= {LOCK, f"{CONFIG}.tmp"}
    if not is_begun and not RunFolder(folder).config.is_file():
        return
    files = RunFolder(folder)
    best = files.weights("best").name
    own = {CONFIG, f"{CONFIG}.tmp", METRICS, best, f"{best}.tmp", CHECKPOINTS}
    own |= {files.gallery.name, files.later_metrics.name, WANDB, WANDB_ID}
    for companion in (TEACHER, TEXT_EMBEDDINGS):
        own |= {companion, f"{companion}.tmp"}
    # the configuration marks the folder as one of ours: it is removed last
    others = (path for path in folder.iterdir() if path.name != LOCK)
    found = sorted(others, key=lambda path: path.name == CONFIG)
    if all(path.name in own or path.name.startswith("events.out.tfevents.") for path in found):
        for path in found:
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else path.unlink()


def read_settings(folder: Path) -> Config:
    """The settings of a run; raise ValueError naming the file, as no flag is at fault."""
    file = RunFolder(folder).config
    try:
        return parse_config(["--config", str(file)])
    except ValueError as error:
        why = str(error).removeprefix("--config: ")
        raise ValueError(f"{file}: expected the settings of a run: {why}") from None


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def save_config(config: Config, folder: Path) -> None:
    """Write the resolved configuration to `run.yaml`; `--config` on it repeats the run."""
    save_settings(config.to_dict(), folder)


def save_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Write settings, as `Config.to_dict` returns them or JSON holds them, to `run.yaml`."""
    content = _plain(dict(settings)) | {"output": None, "resume": "never"}
    file = RunFolder(folder).config
    command = shlex.quote(printable(str(file)))
    title = f"# safer_fast {__version__}: python -m safer_fast.train --config {command}\n"
    write_whole(file, (title + yaml.safe_dump(content, sort_keys=False)).encode())


def export_model(
    model: RobustModel,
    weights: dict[str, Any],
    folder: Path,
    *,
    config: Config,
    data: Data,
    accuracies: Sequence[dict[str, Any]] = (),
    is_tower: bool = False,
) -> None:
    """Write a folder that timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    is_tower: the network gives embeddings, not logits of the data's classes.
    """
    from safer_fast.models.build import timm_config
    from safer_fast.models.weights_file import save_weights
    from safer_fast.runtime.files import save_json

    if not RunFolder(folder).config.is_file():  # somebody removed it during the run
        save_config(config, folder)
    save_weights(weights, RunFolder(folder).weights())
    content = timm_config(model, data.image_size, data.short_side, data.class_names)
    content[KEY] = {
        "version": __version__,
        "threat_model": {"norm": config.attack.norm, "epsilon": float(config.attack.epsilon)},
        "class_names": data.class_names,
        "num_channels": data.num_channels,
        "image_size": data.image_size,
        "short_side": data.short_side,
        "validation_rows": data.validation_rows,
        "num_extra": data.num_extra,
        **({"tower": True} if is_tower else {}),
        "accuracies": list(accuracies),
    }
    save_json(content, RunFolder(folder).model_config)


def load_run(
    folder: Path,
    weights: str = "last",
    device: str = "auto",
    local_rank: int = 0,
    *,
    amp: Literal["run", "off", "bf16"] = "run",
    is_frozen: bool = False,
    savings: Collection[str] | None = None,
) -> LoadedRun:
    """Load a finished or stopped run with its last or best weights, on GPU `local_rank` if on one.

    amp: its precision; run: as in training. is_frozen: no parameter requires gradients, all lie
    in arenas, and exact savings are enabled. savings: exact savings, default: those of the run if
    `is_frozen`. Raise ValueError, one line, for a folder that is no run, damaged files and unknown
    weights.
    """
    from safer_fast.models.attention import pin_for
    from safer_fast.models.build import freeze, prepare
    from safer_fast.models.text_head import read_text_head
    from safer_fast.models.weights_source import find_source
    from safer_fast.runtime.device import prepare_runtime
    from safer_fast.runtime.files import read_json

    files = RunFolder(folder)
    weights_file = files.weights(weights)
    for file in (files.config, files.model_config, weights_file):
        if not file.is_file():
            raise ValueError(_without_model(files, file))
    config = read_settings(folder)
    config.runtime.device = device  # type: ignore[assignment]
    config.data.backend = "auto"  # what this machine has
    if amp != "run":
        config.amp = amp
    runtime = prepare_runtime(config.runtime, config.amp, local_rank)
    described = read_json(files.model_config)
    facts = checked_facts(described.get(KEY), files.model_config)
    is_tower = facts.get("tower") is True
    num_classes: Any = described.get("num_classes") if is_tower else len(facts["class_names"])
    if type(num_classes) is not int or num_classes < 0:
        raise ValueError(f"{files.model_config}: expected num_classes, got {num_classes!r:.40}")
    with _naming_the_run(files):
        source = find_source(str(weights_file))
    if source.normalisation is None:
        raise ValueError(f"{files.model_config}: expected mean and std of the pixels, got none")
    settings = ModelConfig(**vars(config.model) | {"pretrained": False, "checkpoint": None})
    if savings is None:
        savings = config.runtime.exact_savings if is_frozen else ()
    with _naming_the_run(files):
        model, _ = prepare(
            settings,
            runtime.device,
            savings=savings,
            weights=source,
            num_classes=num_classes,
            image_size=facts["image_size"],
            num_channels=facts["num_channels"],
            compute_dtype=runtime.compute_dtype,
            normalisation=source.normalisation,
        )
    for note in model.notes if local_rank == 0 else []:
        print(printable(note))
    if is_tower and files.text_embeddings.is_file():
        name, temperature = str(files.text_embeddings), config.objective.temperature
        head = read_text_head(files.text_embeddings, temperature, name).for_classes(
            facts["class_names"], name
        )
        head.check_width(model.width, name)
        model.text = head.to(runtime.device)
    arenas = freeze(model, savings) if is_frozen else None
    pin_for(model, facts["image_size"], config.batch_size, config.runtime.attention)
    return LoadedRun(
        config,
        model,
        facts["class_names"],
        facts["num_channels"],
        facts["image_size"],
        facts["short_side"],
        known_data(facts),
        runtime,
        weights_file,
        arenas,
        is_tower,
    )


@contextmanager
def _naming_the_run(files: RunFolder) -> Iterator[None]:
    """Name the run's own files in errors on its model: no setting is at fault."""
    try:
        yield
    except ValueError as error:
        found = re.match(r"(?:--)?(model\.\w+): (.*)", str(error), re.DOTALL)
        if found is None:
            raise
        where = "RUN" if found[1] == "model.checkpoint" else f"{files.config}: {found[1]}"
        raise ValueError(f"{where}: {found[2]}") from error.__cause__


def _without_model(files: RunFolder, missing: Path) -> str:
    """The message for a folder without a file of a run that has ended, and a way to get there."""
    folder = printable(str(files.path))
    if not files.path.exists():
        return f"RUN: expected a run folder, got {folder}, which does not exist"
    without = f"RUN: expected a run folder with {missing.name}, got {folder}"
    if not files.config.is_file():
        return without
    found = sorted(files.checkpoints.glob("step-*.safetensors"))
    state = f"whose newest checkpoint is {found[-1].name}" if found else "without a checkpoint yet"
    command = f"--config {shlex.quote(f'{folder}/{CONFIG}')} --output {shlex.quote(folder)}"
    command = f"python -m safer_fast.train {command} --resume auto"
    resuming = f"{'resume' if found else 'begin'} it with {command}"
    if has_ended(files.metrics):
        return f"{without}: to write it again, {resuming}" if found else without
    if files.model_config.is_file():
        return without
    return (
        f"RUN: expected a run that has ended, got {folder}, {state}: unless it still trains, "
        f"{resuming}"
    )


def _plain(value: Any) -> Any:
    """The value in types of YAML: numbers and lists in place of Radius, Names and tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, float) else value
