"""Exporters: a trained model written for timm, the Hub, RobustBench or ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safer_fast.config.commands import ExportConfig
from safer_fast.config.conversion import converted
from safer_fast.config.messages import printable
from safer_fast.runs.exporters.model_card import write_hub
from safer_fast.runs.exporters.onnx import write_onnx
from safer_fast.runs.exporters.robustbench import write_robustbench
from safer_fast.runs.exporters.timm import write_timm
from safer_fast.runtime.kept_folder import unfinished

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun


def export(config: ExportConfig) -> Path:
    """The folder that holds the model in its format; it is written whole or not at all.

    Weights are the float32 masters, whatever the run computed in. Raises ValueError for a folder
    that is no run, an output folder in use, and packages that are missing.
    """
    from safer_fast.runs.exporters.onnx import check_packages
    from safer_fast.runs.folder import check_output, load_run

    config = converted(config)
    folder = Path(config.output or Path(config.run) / f"export-{config.format}")
    check_output(folder)
    if config.format == "onnx":
        check_packages()
    loaded = load_run(Path(config.run), config.weights, "cpu")
    loaded.model.compute_dtype = loaded.model.mean.dtype
    loaded.model.requires_grad_(False)
    writers: dict[str, Callable[[ExportConfig, LoadedRun, Path], str]] = {
        "timm": write_timm,
        "hub": write_hub,
        "robustbench": write_robustbench,
        "onnx": write_onnx,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder) as temporary:
        advice = writers[config.format](config, loaded, temporary)
        temporary.chmod(0o755)
        temporary.replace(folder)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(
        f"{config.weights} weights of {printable(config.run)} in {printable(str(folder))}: {files}"
    )
    print(advice.replace("FOLDER", printable(str(folder))))
    return folder
