"""A model as ONNX: pixels in [0, 1] in, logits out, any number of images at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from safer_fast.config.commands import ExportConfig
from safer_fast.runs.exporters.facts import comparison_images, threat_model
from safer_fast.runs.exporters.timm import described_model

if TYPE_CHECKING:
    from safer_fast.runs.folder import LoadedRun

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_DIFFERENCE = 1e-3
"""Of logits, relative to the largest one: more is another function, not another rounding."""


def check_packages() -> None:
    """Raise ValueError, with the command that installs them, where packages are missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format: expected one whose packages are installed, got onnx: pip install "
            f"{' '.join(missing)}"
        )


def save_onnx(
    model: nn.Module, images: torch.Tensor, path: Path, facts: Mapping[str, Any]
) -> float:
    """Write the model to `path`, `facts` as its metadata; return the largest difference of logits.

    images: float32 [B, C, H, W], B at least 2, which both models are compared on. Raise ValueError
    where onnxruntime computes something else from them than the model does.
    """
    import onnx

    with warnings.catch_warnings():
        # torch's exporter warns about its own deprecated calls
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None
    program.save(str(path))
    content = onnx.load(str(path))
    for name, value in facts.items():
        entry = content.metadata_props.add()
        entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
    onnx.checker.check_model(content)
    onnx.save(content, str(path))
    return _difference(model, images, path)


def _difference(model: nn.Module, images: torch.Tensor, path: Path) -> float:
    """Largest difference of logits from the model's, of all images together and of one alone.

    Raise ValueError where it is above `LARGEST_DIFFERENCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for part in (images, images[:1]):
        with torch.no_grad():
            expected = model(part)
        [logits] = session.run(None, {"images": part.numpy()})
        got = torch.from_numpy(logits)
        difference = float((got - expected).abs().max())
        if not difference <= LARGEST_DIFFERENCE * max(1.0, float(expected.abs().max())):
            raise ValueError(f"--format: onnx gives logits that differ by {difference:.3g}")
        largest = max(largest, difference)
    return largest


ONNX = "model.onnx"


def write_onnx(config: ExportConfig, loaded: LoadedRun, folder: Path) -> str:
    """Write model.onnx into the folder; an `Exporter`."""
    described = described_model(config, loaded)["pretrained_cfg"]
    names = ("input_size", "interpolation", "crop_pct", "crop_mode")
    facts = {
        "class_names": loaded.class_names,
        "threat_model": threat_model(loaded),
        "preprocessing": {name: described[name] for name in names},
    }
    difference = save_onnx(loaded.model, comparison_images(loaded), folder / ONNX, facts)
    return (
        f'load it: onnxruntime.InferenceSession("FOLDER/{ONNX}"); images float32 [B, C, H, W] in '
        f"[0, 1] -> logits [B, K]; logits differ by {difference:.1e} at most from torch's"
    )
