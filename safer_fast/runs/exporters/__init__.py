"""Exporters: the table of formats, and the export of a run's model in one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safer_fast.config.commands import ExportConfig
from safer_fast.config.conversion import converted
from safer_fast.config.doors import door
from safer_fast.config.messages import meant, printable, shortened
from safer_fast.runs.exporters.model_card import write_hub
from safer_fast.runs.exporters.onnx import check_packages, write_onnx
from safer_fast.runs.exporters.open_clip import write_open_clip
from safer_fast.runs.exporters.robustbench import write_robustbench
from safer_fast.runs.exporters.timm import write_timm
from safer_fast.runs.layout import RunFolder
from safer_fast.runtime.files import check_writable
from safer_fast.runtime.kept_folder import unfinished

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun


class Exporter(NamedTuple):
    """A row of the table.

    write: fills the folder and returns a line for the user, how to load what it holds, FOLDER
    standing for the folder. check: raises ValueError where packages are missing. takes_towers: the
    format is one for networks that give embeddings too.
    """

    write: Callable[[ExportConfig, LoadedRun, Path], str]
    check: Callable[[], None] = lambda: None
    takes_towers: bool = False


EXPORTERS = {
    "timm": Exporter(write_timm, takes_towers=True),
    "hub": Exporter(write_hub),
    "robustbench": Exporter(write_robustbench),
    "onnx": Exporter(write_onnx, check_packages),
    "open_clip": Exporter(write_open_clip, takes_towers=True),
}
"""Exporters by the name that `--format` takes."""


@door()
def export(config: ExportConfig) -> Path:
    """Write a run's model into a new folder, whole or not at all, and return the folder.

    Weights are the float32 masters, whatever the run computed in. Raise ValueError for a folder
    that is no run, an output folder in use, an unknown format, and packages that are missing.
    """
    from safer_fast.runs.folder import check_output, load_run

    config = converted(config)
    if config.format not in EXPORTERS:
        got = shortened(repr(config.format)) + meant(config.format, EXPORTERS)
        raise ValueError(f"--format: expected one of {', '.join(EXPORTERS)}, got {got}")
    if config.claim_data is not None and config.format != "robustbench":
        raise ValueError(
            f"--claim-data: expected --format robustbench, which claims, got {config.format}"
        )
    folder = Path(config.output or RunFolder(Path(config.run)).export(config.format))
    check_output(folder)
    place = next(path for path in folder.absolute().parents if path.exists())
    check_writable(place, "--output", "give a folder elsewhere")
    exporter = EXPORTERS[config.format]
    exporter.check()
    loaded = load_run(Path(config.run), config.weights, "cpu")
    if loaded.is_tower and not exporter.takes_towers:
        known = ", ".join(name for name, row in EXPORTERS.items() if row.takes_towers)
        raise ValueError(
            f"--format: expected one of {known} for a tower, which gives embeddings, got "
            f"{config.format}"
        )
    loaded.model.compute_dtype = loaded.model.mean.dtype
    loaded.model.requires_grad_(False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder) as temporary:
        advice = exporter.write(config, loaded, temporary)
        temporary.chmod(0o755)
        temporary.replace(folder)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(
        f"{config.weights} weights of {printable(config.run)} in {printable(str(folder))}: {files}"
    )
    print(advice.replace("FOLDER", printable(str(folder))))
    return folder
