"""The model of a run, for use in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from safer_fast.config.attack_names import ThreatModel
from safer_fast.config.doors import door
from safer_fast.config.messages import meant, shortened
from safer_fast.models.robust_model import RobustModel
from safer_fast.runs.folder import load_run

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["run", "off", "bf16"]


@door()
def load_model(
    run: str | Path,
    weights: Literal["last", "best"] = "last",
    *,
    device: Device = "auto",
    amp: Precision = "run",
) -> RobustModel:
    """Load the model of a run folder: an nn.Module in eval mode, pixels in, logits out.

    It takes float images [B, C, H, W] in [0, 1], which it normalises itself, and returns float32
    logits [B, K]; values far outside, such as bytes as floats, are a ValueError (on a GPU in the
    first batches). Its `class_names` are in the order of the logits, `threat_model` is the ball
    that it was trained against, `image_size` the edge in pixels of its images; `network` is timm's
    module. The folder is one of a finished run. Raises ValueError, one line, for a folder that is
    no run, and for damaged files.

    >>> robust = load_model(RUN)
    >>> robust.threat_model
    ThreatModel(norm='linf', epsilon=0.1)
    >>> logits = robust(torch.rand(2, 1, 8, 8))
    >>> robust.class_names[logits[0].argmax()] in "0123456789"
    True

    Args:
        run: the folder.
        weights: those of the last epoch, or of the one with the best robust validation accuracy.
        device: where it computes; auto: on a GPU if there is one.
        amp: its precision; run: the one that it was trained in.
    """
    if not isinstance(run, str | Path):
        raise ValueError(f"run: expected the path of a run folder, got {shortened(repr(run))}")
    for name, value, known in (
        ("device", device, get_args(Device)),
        ("amp", amp, get_args(Precision)),
    ):
        if value not in known:
            got = shortened(repr(value)) + meant(value, known)
            expected = f"{', '.join(known[:-1])} or {known[-1]}"
            raise ValueError(f"{name}: expected {expected}, got {got}")
    loaded = load_run(Path(run), weights, device, amp=amp)
    model, attack = loaded.model, loaded.config.attack
    model.class_names, model.image_size = loaded.class_names, loaded.image_size
    model.check_pixels()
    model.threat_model = ThreatModel(attack.norm, float(attack.epsilon))
    return model
