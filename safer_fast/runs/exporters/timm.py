"""Export to timm: model.safetensors with timm's names, and config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.config.commands import ExportConfig
from safer_fast.runs.exporters.facts import measured_accuracies, threat_model
from safer_fast.runs.layout import RunFolder

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun


def write_timm(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    """Write the folder that timm loads as it is; an `Exporter`."""
    from safer_fast.models.weights_file import save_weights
    from safer_fast.runtime.files import save_json

    files = RunFolder(folder)
    save_weights(loaded.model.network.state_dict(), files.weights())
    save_json(described_model(config, loaded), files.model_config)
    return (
        'load it: timm.create_model("local-dir:FOLDER", pretrained=True); it takes normalised '
        f"images, mean and std in {files.model_config.name}"
    )


def described_model(config: ExportConfig, loaded: LoadedRun) -> dict[str, Any]:
    """Content of config.json in timm's schema, with the license that `--license` names."""
    from safer_fast import __version__
    from safer_fast.models.build import timm_config
    from safer_fast.runs.facts import KEY

    sizes = loaded.image_size, loaded.short_side
    content = timm_config(loaded.model, *sizes, loaded.class_names)
    content["pretrained_cfg"]["license"] = config.license
    content[KEY] = {
        "version": __version__,
        "threat_model": threat_model(loaded),
        "weights": config.weights,
        "accuracies": measured_accuracies(config, loaded.config.attack.norm),
    }
    return content
