"""A run's model for timm, the hub, RobustBench, ONNX: `python -m safer_fast.export RUN`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.command_configs import ExportConfig
from safer_fast.command_line import new_parser, parse, printable, run, with_underscores
from safer_fast.conversion import converted
from safer_fast.kept_folder import unfinished
from safer_fast.masking import with_verdicts

if TYPE_CHECKING:
    import torch

    from safer_fast.run_folder import LoadedRun

ONNX = "model.onnx"
_NUM_COMPARED = 8
_FIGURES = ("split", "attack", "epsilon", "accuracy", "num_images")
_PLACE = ("split", "attack", "norm", "epsilon", "restarts", "num_images")  # what a figure hangs on


def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.export RUN [flags]`: writes a folder, says how to load it."""
    parser = new_parser("export", "Write a run's model in a format that others load.")
    parser.add_class_arguments(ExportConfig, None, skip={"run"})
    parser.add_argument("run", type=str, metavar="RUN", help="run folder")
    export(parse(parser, with_underscores(arguments), ExportConfig))


def export(config: ExportConfig) -> Path:
    """The folder that holds the model in its format; it is written whole or not at all.

    Weights are the float32 masters, whatever the run computed in. Raises ValueError for a folder
    that is no run, an output folder in use, and packages that are missing.
    """
    from safer_fast.export_onnx import check_packages
    from safer_fast.run_folder import check_output, load_run

    config = converted(config)
    folder = Path(config.output or Path(config.run) / f"export-{config.format}")
    check_output(folder)
    if config.format == "onnx":
        check_packages()
    loaded = load_run(Path(config.run), config.weights, "cpu")
    loaded.model.compute_dtype = loaded.model.mean.dtype
    loaded.model.requires_grad_(False)
    writers: dict[str, Callable[[ExportConfig, LoadedRun, Path], str]] = {
        "timm": _write_timm,
        "hub": _write_hub,
        "robustbench": _write_robustbench,
        "onnx": _write_onnx,
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


def _write_timm(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    from safer_fast.checkpoint import MODEL_CONFIG, WEIGHTS, save_json, save_weights

    save_weights(loaded.model.network.state_dict(), folder / WEIGHTS)
    save_json(_timm_config(config, loaded), folder / MODEL_CONFIG)
    return (
        'load it: timm.create_model("local-dir:FOLDER", pretrained=True); it takes normalised '
        f"images, mean and std in {MODEL_CONFIG}"
    )


def _write_hub(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    from safer_fast.export_card import model_card

    advice = _write_timm(config, loaded, folder)
    (folder / "README.md").write_text(model_card(_card(config, loaded)), encoding="utf-8")
    if config.license == "other":
        advice += "\nno license of the weights is named: --license NAME"
    return advice + "\nupload it: hf upload USER/NAME FOLDER"


def _write_robustbench(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    from safer_fast.export_robustbench import CODE, save_robustbench

    described = _timm_config(config, loaded)
    sizes = loaded.image_size, loaded.short_side
    save_robustbench(
        loaded.model, described["architecture"], described["model_args"], folder, *sizes
    )
    return (
        f"load it: from {Path(CODE).stem} import load, with FOLDER on Python's path; images in "
        "[0, 1], see its docstring"
    )


def _write_onnx(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    from safer_fast.export_onnx import save_onnx

    described = _timm_config(config, loaded)["pretrained_cfg"]
    names = ("input_size", "interpolation", "crop_pct", "crop_mode")
    facts = {
        "class_names": loaded.class_names,
        "threat_model": _threat_model(loaded),
        "preprocessing": {name: described[name] for name in names},
    }
    difference = save_onnx(loaded.model, _images(loaded), folder / ONNX, facts)
    return (
        f'load it: onnxruntime.InferenceSession("FOLDER/{ONNX}"); images float32 [B, C, H, W] in '
        f"[0, 1] -> logits [B, K]; logits differ by {difference:.1e} at most from torch's"
    )


def _timm_config(config: ExportConfig, loaded: LoadedRun) -> dict[str, Any]:
    """config.json in timm's schema, with the license that was given."""
    from safer_fast import __version__
    from safer_fast.model import timm_config
    from safer_fast.run_folder import KEY

    sizes = loaded.image_size, loaded.short_side
    content = timm_config(loaded.model, *sizes, loaded.class_names)
    content["pretrained_cfg"]["license"] = config.license
    content[KEY] = {
        "version": __version__,
        "threat_model": _threat_model(loaded),
        "weights": config.weights,
        "accuracies": _accuracies(config, loaded.config.attack.norm),
    }
    return content


def _card(config: ExportConfig, loaded: LoadedRun) -> Any:
    from safer_fast.export_card import Card
    from safer_fast.run_folder import CONFIG

    settings, model = loaded.config, loaded.model
    data = Path(settings.data.path).stem if settings.data.path else "digits"
    lines = (Path(config.run) / CONFIG).read_text(encoding="utf-8").splitlines()
    return Card(
        name=config.name or Path(config.run).resolve().name,
        architecture=settings.model.name,
        license=config.license,
        data=data,
        norm=settings.attack.norm,
        epsilon=float(settings.attack.epsilon),
        weights=config.weights,
        num_classes=len(loaded.class_names),
        shape=(loaded.num_channels, loaded.image_size, loaded.image_size),
        short_side=loaded.short_side,
        mean=model.mean.flatten().tolist(),
        std=model.std.flatten().tolist(),
        accuracies=_accuracies(config, loaded.config.attack.norm),
        recipe="\n".join(_without_folders(line) for line in lines if not line.startswith("#")),
    )


def _without_folders(line: str) -> str:
    """A line of run.yaml whose paths are the names of what they lead to: folders are private."""
    name, colon, value = line.partition(": ")
    is_path = name.strip() in ("path", "validation_path", "test_path", "checkpoint", "output")
    return f"{name}{colon}{Path(value).name}" if is_path else line


def _threat_model(loaded: LoadedRun) -> dict[str, Any]:
    attack = loaded.config.attack
    return {"norm": attack.norm, "epsilon": float(attack.epsilon)}


def _accuracies(config: ExportConfig, norm: str) -> list[dict[str, Any]]:
    """What was measured of these weights, the newest of all that a figure depends on.

    norm: that of the run, which events of its training do not name. Attacks on other models'
    images say nothing of how robust this one is: transfers are left out.
    """
    from safer_fast.metrics import read_metrics

    file = Path(config.run) / "metrics.jsonl"
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in read_metrics(file) if file.is_file() else []:
        is_ours = event.get("event") == "evaluation" and event.get("weights") == config.weights
        is_whole = all(name in event for name in _FIGURES)
        if is_ours and is_whole and event["num_images"] > 0 and not event.get("source"):
            row = {name: event[name] for name in _FIGURES} | {
                "of_images": event.get("of_images"),
                "norm": None if event["attack"] == "clean" else event.get("norm") or norm,
                "restarts": event.get("restarts") or 1,
                "num_not_finite": event.get("num_not_finite") or 0,
                "num_zero_gradients": event.get("num_zero_gradients"),
                "start_accuracy": event.get("start_accuracy"),
            }
            rows[tuple(row[name] for name in _PLACE)] = row
    return with_verdicts(list(rows.values()))


def _images(loaded: LoadedRun) -> torch.Tensor:
    """Images of the run's data where it can be had, else noise: what ONNX is compared on."""
    import torch

    from safer_fast.data import as_pixels, load_data

    shape = (_NUM_COMPARED, loaded.num_channels, loaded.image_size, loaded.image_size)
    try:
        data = load_data(
            loaded.config.data, batch_size=loaded.config.batch_size, seed=loaded.config.seed
        )
        return as_pixels(next(iter(data.train.probe(_NUM_COMPARED, 0))).images)
    except (ValueError, OSError):
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    run(main)
