"""Checks of the doctor that involve data: DALI, and a user's own data read by each backend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from safer_fast.config.schema import DataConfig
from safer_fast.runtime.fast_paths import Check

if TYPE_CHECKING:
    from safer_fast.data import Data

_Backend = Literal["auto", "dali", "torch", "device"]
_BACKENDS: tuple[_Backend, ...] = ("device", "dali", "torch")
_NUM_BATCHES = 8


def check_data(config: DataConfig, batch_size: int) -> Iterator[Check]:
    """Open the data as training would, then decode some batches with each backend in turn."""
    try:
        data = _load(config, batch_size)
    except (ValueError, OSError) as error:
        remedy = "see docs/data.md for the formats, and what their folders and columns are"
        yield Check("data", False, _line(error), remedy)
        return
    yield Check("data", True, _describe(data))
    wanted: tuple[_Backend, ...] = _BACKENDS if config.backend == "auto" else (config.backend,)
    for backend in wanted:
        yield _check_backend(replace(config, backend=backend), batch_size)


def _load(config: DataConfig, batch_size: int) -> Data:
    import torch

    from safer_fast.data import load_data

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_data(config, batch_size=batch_size, seed=0, device=device, report=lambda _: None)


def _describe(data: Data) -> str:
    num_test = data.test.num_images if data.test is not None else 0
    return (
        f"{data.num_classes} classes, {data.train.num_images} training, "
        f"{f'{data.num_extra} extra, ' if data.num_extra else ''}"
        f"{data.validation.num_images} validation, {num_test} test images of "
        f"{data.num_channels}x{data.image_size}x{data.image_size}; training would use "
        f"{data.train.backend}" + "".join(f"; {note}" for note in data.notes)
    )


def _check_backend(config: DataConfig, batch_size: int) -> Check:
    """Load the data anew and time its batches; the time to the first batch is given apart."""
    name = f"data by {config.backend}"
    started = time.monotonic()
    try:
        times, counts = _time_batches(_load(config, batch_size), batch_size)
    except Exception as error:
        # decoding libraries may raise anything; the check reports it
        remedy = f"training with --data.backend auto does without {config.backend}"
        if config.backend == "torch":
            remedy = "find the image that the line names; --data.bad_images skip leaves it out"
        return Check(name, False, _line(error), remedy)
    if not counts:
        return Check(name, False, "gave no image", "see docs/data.md")
    detail = f"first of {len(counts)} batches after {times[0] - started:.2f} s"
    if len(counts) > 1:
        speed = sum(counts[1:]) / max(times[-1] - times[0], 1e-9)
        detail += f", then {speed:,.0f} images/s"
    return Check(name, True, detail)


def _time_batches(data: Data, batch_size: int) -> tuple[list[float], list[int]]:
    """Arrival times and numbers of images of the first batches."""
    times, counts = [], []
    for batch in data.train.epoch(1, limit=_NUM_BATCHES * batch_size):
        times.append(time.monotonic())
        counts.append(batch.num_images)
    return times, counts


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_dali() -> Check:
    """Decode an image with DALI on the device that runs would use."""
    import torch

    from safer_fast.data.dali.pipeline import INSTALL, why_no_dali

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := why_no_dali(device):
        detail = f"{reason}; worker processes decode images"
        return Check("dali", False, detail, f"{INSTALL} (data.backend=torch does without)")
    return Check("dali", True, f"{version('nvidia-dali-cuda130')}, decodes on the {device.type}")
