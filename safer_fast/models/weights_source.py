"""Location of the weights that a run starts from, and the config.json beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safer_fast.config.schema import Config
from safer_fast.config.untrusted import MOST_YAML, load_yaml, read_text
from safer_fast.models.weights_file import MODEL_CONFIG, WEIGHTS
from safer_fast.runtime.files import read_json

FOLDER_FILES = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Names of weight files that are searched for in a folder, in this order, as timm does."""
_HUB = ("hf-hub:", "hf_hub:")
# Arguments of timm that have settings of their own, or depend on the data.
_NO_ARCHITECTURE = {"img_size", "patch_size", "drop_path_rate", "in_chans", "num_classes"}
_RUN_CONFIG = "run.yaml"


@dataclass(frozen=True)
class Source:
    """A file of weights, and the network that the config.json beside it describes.

    name: None without a config.json, or if it names no network of timm. normalisation: mean and
    standard deviation of the pixels, None if they are missing.
    """

    weights: Path
    name: str | None = None
    patch_size: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    normalisation: tuple[list[float], list[float]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `model` that the weights were trained with; empty if unknown."""
        if self.name is None:
            return {}
        return {"name": self.name, "patch_size": self.patch_size, "arguments": self.arguments}


def find_source(path: str) -> Source:
    """Find the weights that `model.checkpoint` names: a folder, a file, or `hf-hub:NAME`.

    Raises ValueError, one line, if there are none, or the config.json beside them is damaged.
    """
    weights = _find_weights(path)
    described = weights.parent / MODEL_CONFIG
    if not described.is_file():
        return Source(weights)
    content = read_json(described)
    settings = content.get("pretrained_cfg", content)  # older ones of timm have one level
    name, arguments = content.get("architecture"), content.get("model_args") or {}
    if not isinstance(settings, dict) or not isinstance(arguments, dict):
        raise ValueError(f"model.checkpoint: {described}: expected settings by name, got another")
    patch_size = arguments.get("patch_size")
    return Source(
        weights,
        name if isinstance(name, str) else None,
        patch_size if isinstance(patch_size, int) else None,
        {key: value for key, value in arguments.items() if key not in _NO_ARCHITECTURE},
        _normalisation(settings, described),
    )


def settings_of_checkpoint(config: Config) -> dict[str, Any]:
    """Settings of `model` that `model.checkpoint` implies; empty if they are unknown.

    A resumed run keeps those of its run.yaml, even if its first weights were moved or removed.
    """
    assert config.model.checkpoint is not None, "there is a checkpoint"
    if config.resume != "never" and config.output is not None:
        file = Path(config.output) / _RUN_CONFIG
        content = None
        with suppress(ValueError):  # a damaged file is written again where the run is resumed
            content = load_yaml(read_text(file, MOST_YAML)) if file.is_file() else None
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, dict) and model.get("checkpoint") == config.model.checkpoint:
            return {name: model[name] for name in ("name", "patch_size", "arguments")}
    return find_source(config.model.checkpoint).settings


def say_source(source: Source, assumed: tuple[Sequence[float], Sequence[float]]) -> str:
    """Format the line on the origin of weights and normalisation; `assumed` if that is unknown."""
    mean, std = source.normalisation or assumed
    said = f"model.checkpoint: weights of {source.weights}, normalised by mean {list(mean)}, "
    said += f"std {list(std)}"
    if source.normalisation is not None:
        return f"{said} as the config.json beside them says"
    return f"{said}, which timm has for model.name: assumed, no config.json beside them says it"


def as_flags(settings: Mapping[str, Any]) -> str:
    """Format settings of `model` as flags of the command line."""
    typed = [f"--model.name {settings['name']}"]
    if settings["patch_size"] is not None:
        typed.append(f"--model.patch_size {settings['patch_size']}")
    if settings["arguments"]:
        typed.append(f"--model.arguments '{json.dumps(settings['arguments'])}'")
    return " ".join(typed)


def _find_weights(path: str) -> Path:
    if path.startswith(_HUB):
        return _fetch(path.partition(":")[2])
    found = Path(path.removeprefix("local-dir:"))
    if found.is_dir():
        files = [found / name for name in FOLDER_FILES]
        found = next((file for file in files if file.is_file()), files[0])
    if not found.is_file():
        raise ValueError(
            f"model.checkpoint: expected a run folder with {WEIGHTS}, a folder with "
            f"{FOLDER_FILES[1]}, a file of weights or hf-hub:NAME, got {path}"
        )
    return found


def _fetch(name: str) -> Path:
    """Fetch the weights of a model, and its config.json beside them, from the Hugging Face hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # offline, a user would see nothing but the hub's warnings about retries
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    model, _, revision = name.partition("@")

    def download(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(model, file, revision=revision or None))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    try:
        download(MODEL_CONFIG)
        found = next((file for file in map(download, FOLDER_FILES) if file is not None), None)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"model.checkpoint: hf-hub:{name} could not be fetched from the Hugging Face hub; go "
            f"online once, check the name or give a folder ({type(error).__name__})"
        ) from None
    if found is None:
        raise ValueError(
            f"model.checkpoint: expected a model with {WEIGHTS} or {FOLDER_FILES[1]}, got "
            f"hf-hub:{name}, which has neither"
        )
    return found


def _normalisation(
    settings: Mapping[str, Any], file: Path
) -> tuple[list[float], list[float]] | None:
    """Mean and std in timm's settings of pretrained weights; None if both are missing."""
    if "mean" not in settings and "std" not in settings:
        return None
    try:
        mean, std = ([float(value) for value in settings[name]] for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        mean = std = []
    if not (len(mean) == len(std) > 0 and min(std) > 0):
        raise ValueError(
            f"model.checkpoint: expected mean and std of the pixels in {file}, got none"
        )
    return mean, std
