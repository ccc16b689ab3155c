"""Times in lines of steps are those of the steps that this process has taken."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from safer_fast.training.step_log import TrainingLog, stage_times


@pytest.mark.parametrize(("own", "timed"), [(16, 128.0), (2, 16.0), (17, 128.0)])
def test_images_before_a_resume_count_for_no_speed(own: int, timed: float) -> None:
    log: Any = TrainingLog.__new__(TrainingLog)
    log._num_batches, log._logged = own, time.monotonic() - 1
    log._waits = SimpleNamespace(take=lambda: 0.0)
    log.engine = SimpleNamespace(
        ranks=SimpleNamespace(sum_=None), audit=SimpleNamespace(take_seconds=lambda: 0.0)
    )
    counted = {"skipped": 1, "taken": 15, "images": 128.0}
    step: Any = SimpleNamespace(
        health=SimpleNamespace(sums=SimpleNamespace(take=lambda _: dict(counted))),
        timer=SimpleNamespace(take=lambda: {"attack": 0.5}),
    )
    sums = log._take(step)
    assert (sums["images"], sums["timed_images"]) == (128.0, timed)
    assert stage_times(sums)["attack"] == pytest.approx(500 / min(own, 16))
    assert log._num_batches == 0
