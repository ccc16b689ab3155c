"""Model card of an exported model: what it is, how robust, under which attack, how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from safer_fast import __version__
from safer_fast.config.commands import ExportConfig
from safer_fast.config.messages import printable
from safer_fast.runs.accuracies import interval
from safer_fast.runs.exporters.claimed_data import dataset_of, hub_id_of
from safer_fast.runs.exporters.facts import measured_accuracies
from safer_fast.runs.exporters.timm import write_timm
from safer_fast.runs.layout import RunFolder

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun

UNKNOWN_LICENSE = "other"
_NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True)
class ModelCard:
    """Content of a card; texts may come from files of others.

    hub_data: name of the data on the Hugging Face Hub, if they are there.
    """

    name: str
    architecture: str
    license: str
    data: str
    norm: str
    epsilon: float
    weights: str
    num_classes: int
    shape: tuple[int, int, int]
    short_side: int
    mean: Sequence[float]
    std: Sequence[float]
    accuracies: Sequence[Mapping[str, Any]]
    recipe: str
    hub_data: str | None = None


def model_card(card: ModelCard, usage: str | None = None) -> str:
    """README.md of a Hugging Face folder: YAML front matter, then the text.

    usage: how to load the model; default: by timm.
    """
    front: dict[str, Any] = {"license": card.license}
    if card.license == UNKNOWN_LICENSE:
        front["license_name"] = "unknown"
    front |= {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "adversarial-robustness", "safer_fast"],
    }
    if card.hub_data:
        front["datasets"] = [card.hub_data]
    sections = [
        f"# {_plain(card.name)}",
        _summary(card),
        "## Accuracy",
        _accuracy_table(card.accuracies, card.norm),
        "## How to load it",
        usage or _usage(card),
        "## How it was trained",
        f"With safer_fast {__version__}, from this configuration, of whose paths the last "
        "name is left:",
        f"```yaml\n{_fenced(card.recipe)}\n```",
        "## License",
        _license(card.license),
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def _summary(card: ModelCard) -> str:
    channels, size, _ = card.shape
    norm = _NORMS.get(card.norm, _plain(card.norm))
    return (
        f"`{_plain(card.architecture)}`, trained to be robust against changes of its images within "
        f"a ball of {norm} radius {card.epsilon:.6g}, pixels in [0, 1]. {card.num_classes} classes "
        f"of {channels}x{size}x{size} images of {_plain(card.data)}; the {card.weights} weights of "
        "its run."
    )


def _accuracy_table(accuracies: Sequence[Mapping[str, Any]], norm: str) -> str:
    rows = [_accuracy_row(row, norm) for row in accuracies]
    if not rows:
        return "Not measured."
    head = ["| split | attack | epsilon | accuracy | 95 % interval | images |", "|" + "---|" * 6]
    notes = ["The interval is that of the number of images alone, not of seeds of the training."]
    notes += [note for row in accuracies for note in _notes(row)]
    return "\n".join([*head, *rows]) + "\n\n" + "\n\n".join(notes)


def _accuracy_row(row: Mapping[str, Any], norm: str) -> str:
    """A row; it names the norm where it is not the run's, and restarts where there are several."""
    accuracy, count = float(row["accuracy"]), int(row["num_images"])
    of_images = int(row.get("of_images") or 0)
    images = f"{count} of {of_images}" if count < of_images else str(count)
    low, high = interval(accuracy, count)
    restarts = f", {row['restarts']} restarts" if (row.get("restarts") or 1) > 1 else ""
    own = row.get("norm") or norm
    ball = f"{float(row['epsilon']):.6g}" + ("" if own == norm else f" {_NORMS.get(own, own)}")
    bound = "at most " if row.get("upper_bound") else ""
    return (
        f"| {_plain(row['split'])} | {_plain(row['attack'])}{restarts} | {_plain(ball)} | "
        f"{bound}{accuracy:.4f} | {low:.4f} to {high:.4f} | {images} |"
    )


def _notes(row: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on an accuracy that is less than it seems."""
    place = f"{_plain(row['attack'])}, {_plain(row['split'])} split"
    if reasons := row.get("gradient_masking"):
        why = "; ".join(map(_plain, reasons))
        yield f"{place}: an upper bound, as gradient masking is suspected: {why}."
    if count := row.get("num_not_finite"):
        yield f"{place}: the logits of {int(count)} images are not finite; they count as wrong."


def _usage(card: ModelCard) -> str:
    mean, std = (", ".join(f"{value:.6g}" for value in part) for part in (card.mean, card.std))
    return (
        "```python\nimport timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n```\n\n'
        "FOLDER is where these files lie; from the hub it is `hf-hub:USER/NAME` in place of "
        "`local-dir:FOLDER`.\n\n"
        f"Images of another size are resized (bilinear) until their short side has "
        f"{card.short_side} pixels, and the centre of {card.shape[1]}x{card.shape[2]} is kept: "
        "`timm.data.create_transform(**timm.data.resolve_model_data_config(model))`.\n\n"
        f"The network takes normalised images: subtract mean ({mean}), divide by standard "
        f"deviation ({std}), both for pixels in [0, 1]. An attack must differentiate through that "
        "normalisation, and measure its radius in pixels."
    )


def _license(license: str) -> str:
    if license == UNKNOWN_LICENSE:
        return (
            "No license of the weights was given at export: it depends on the data and on the "
            "weights that training started from. Whoever publishes them names one."
        )
    return f"The weights are published under {_plain(license)}, as given at export."


def _plain(text: object) -> str:
    """A text of a file in one line, without characters that mean something in Markdown."""
    return "".join(c if c not in "|`<>[]*#\\" else " " for c in printable(str(text)))[:200]


def _fenced(text: str) -> str:
    lines = (printable(line) for line in text.strip().splitlines())
    return "\n".join(line.replace("```", "'''") for line in lines)


def write_hub(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    """Write the folder that timm loads and a README.md for the Hub; an `Exporter`."""
    advice = write_timm(config, loaded, folder)
    (folder / "README.md").write_text(model_card(card_of(config, loaded)), encoding="utf-8")
    if config.license == "other":
        advice += "\nno license of the weights is named: --license NAME"
    return advice + "\nupload it: hf upload USER/NAME FOLDER"


def card_of(config: ExportConfig, loaded: LoadedRun) -> ModelCard:
    """The card of a run."""
    settings, model = loaded.config, loaded.model
    lines = RunFolder(Path(config.run)).config.read_text(encoding="utf-8").splitlines()
    return ModelCard(
        name=config.name or Path(config.run).resolve().name,
        architecture=settings.model.name,
        license=config.license,
        data=dataset_of(loaded),
        norm=settings.attack.norm,
        epsilon=float(settings.attack.epsilon),
        weights=config.weights,
        num_classes=len(loaded.class_names),
        shape=(loaded.num_channels, loaded.image_size, loaded.image_size),
        short_side=loaded.short_side,
        mean=model.mean.flatten().tolist(),
        std=model.std.flatten().tolist(),
        accuracies=measured_accuracies(config, loaded.config.attack.norm),
        recipe="\n".join(_without_folders(line) for line in lines if not line.startswith("#")),
        hub_data=hub_id_of(loaded),
    )


def _without_folders(line: str) -> str:
    """A line of run.yaml in which paths are cut to their last names: folders are private."""
    name, colon, value = line.partition(": ")
    key = name.strip()
    is_path = key == "path" or key.endswith("_path") or key in ("checkpoint", "output")
    return f"{name}{colon}{Path(value).name}" if is_path else line
