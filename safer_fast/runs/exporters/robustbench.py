"""RobustBench: plain weights, a module of their own that builds the timm model, and a claim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pprint import pformat
from textwrap import indent
from typing import TYPE_CHECKING, Any

import torch

from safer_fast.config.commands import ExportConfig
from safer_fast.models.robust_model import RobustModel
from safer_fast.runs.exporters.claimed_data import DATASETS, dataset_of
from safer_fast.runs.exporters.model_card import card_of, model_card
from safer_fast.runs.exporters.submission import NORMS, radius, write_submission
from safer_fast.runs.exporters.timm import described_model

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun

ROBUSTBENCH_WEIGHTS, CODE = "model.pt", "robust_model.py"


def save_robustbench(
    model: RobustModel,
    architecture: str,
    arguments: Mapping[str, Any],
    folder: Path,
    image_size: int,
    short_side: int,
    example: str,
) -> None:
    """Write the state dict with timm's names, and a module whose `load()` returns the model.

    arguments: of timm.create_model; plain values, which the code holds as literals. image_size,
    short_side: pixels that images were evaluated at, and were resized to before that. example:
    lines of Python that use the model.
    """
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    torch.save(weights, folder / ROBUSTBENCH_WEIGHTS)
    code = _MODULE.format(
        architecture=architecture,
        arguments=pformat(dict(arguments), width=90),
        mean=model.mean.flatten().tolist(),
        std=model.std.flatten().tolist(),
        weights=ROBUSTBENCH_WEIGHTS,
        image_size=image_size,
        short_side=short_side,
        example=indent(example, "    "),
    )
    (folder / CODE).write_text(code, encoding="utf-8")


_MODULE = '''"""A robust classifier of pixels in [0, 1], for RobustBench and AutoAttack.

{example}

Images of another size are resized (bilinear) until their short side has {short_side} pixels, and
the centre of {image_size}x{image_size} is kept.

The model zoo of RobustBench takes RobustModel as `model` of an entry and, as its file, {weights}.
"""

from pathlib import Path

import timm
import torch

ARCHITECTURE = {architecture!r}
ARGUMENTS = {arguments}
MEAN = {mean}
STD = {std}


class RobustModel(torch.nn.Module):
    """Images [B, C, H, W] in [0, 1] -> logits [B, K]; normalisation is part of it."""

    def __init__(self):
        super().__init__()
        self.model = timm.create_model(ARCHITECTURE, pretrained=False, **ARGUMENTS)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, images):
        return self.model((images - self.mean) / self.std)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Takes timm's names, with or without `model.` in front."""
        weights = {{name.removeprefix("model."): value for name, value in state_dict.items()}}
        return self.model.load_state_dict(weights, strict=strict, assign=assign)


def load(file=Path(__file__).parent / {weights!r}):
    """The model with its weights, in eval mode, on the CPU."""
    model = RobustModel()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()
'''


def write_robustbench(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    """Write weights, code, card and, of weights under AutoAttack, the claim; an `Exporter`."""
    described = described_model(config, loaded)
    sizes = loaded.image_size, loaded.short_side
    save_robustbench(
        loaded.model,
        described["architecture"],
        described["model_args"],
        folder,
        *sizes,
        _example(loaded),
    )
    card = model_card(card_of(config, loaded), _usage(loaded))
    (folder / "README.md").write_text(card, encoding="utf-8")
    advice = (
        f"load it: from {Path(CODE).stem} import load, with FOLDER on Python's path; images in "
        "[0, 1], see its docstring"
    )
    return f"{advice}\n{write_submission(config, loaded, folder)}"


def _example(loaded: LoadedRun) -> str:
    """Lines of Python: `benchmark` on data of its own, for models of other data their logits."""
    attack, size, data = loaded.config.attack, loaded.image_size, dataset_of(loaded)
    load = f"from {Path(CODE).stem} import load"
    if data not in DATASETS or attack.norm not in NORMS:
        shape = f"8, {loaded.num_channels}, {size}, {size}"
        lines = ["import torch", load, ""]
        lines += [f"images = torch.rand({shape})  # pixels in [0, 1]", "logits = load()(images)"]
        return "\n".join(lines)
    ball = f'threat_model="{NORMS[attack.norm]}", eps={radius(float(attack.epsilon))}'
    call = f'benchmark(load(), dataset="{data}", {ball})'
    return "\n".join(["from robustbench import benchmark", load, "", call])


def _usage(loaded: LoadedRun) -> str:
    """The section of the card on loading the model, and on measuring it as RobustBench does."""
    size = loaded.image_size
    by = ": `preprocessing` of `benchmark`" if dataset_of(loaded) in DATASETS else ""
    lines = [
        "```python",
        _example(loaded),
        "```",
        "",
        f"`load()` reads `{ROBUSTBENCH_WEIGHTS}` beside it, with torch and timm alone. It takes",
        "pixels in [0, 1]; normalisation is a part. Images of another size are resized (bilinear)",
        f"until their short side has {loaded.short_side} pixels, and the centre of",
        f"{size}x{size} is kept{by}.",
    ]
    return "\n".join(lines)
