"""Cost of a run: its stages as they were timed, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from safer_fast.models.families import STEM

NUM_SHOWN = 4
"""Layers that are named."""


@dataclass(frozen=True)
class StageCost:
    """Cost of a stage: its layers, median step, operations per image of each phase, peak memory.

    num_taken: steps that were timed. attack: of theirs, as in PGD-10. full_step_s: step with
    `attack.max_steps` where audits choose, None with a fixed number. large_step_s, large_attack: of
    a step with images of the full size; None where they are of that size.
    """

    name: str
    layers: list[str]
    cut: int
    num_steps: int
    step_s: float
    num_taken: int
    batch_size: int
    operations: dict[str, float]
    peak_memory_mib: float
    attack: str = ""
    full_step_s: float | None = None
    large_step_s: float | None = None
    large_attack: str = ""

    @property
    def duration_s(self) -> float:
        """Seconds of all steps of the stage."""
        return self.num_steps * self.step_s

    @property
    def large_duration_s(self) -> float:
        """Seconds of all steps of the stage with images of the full size."""
        return self.num_steps * (self.large_step_s or self.step_s)

    @property
    def images_per_second(self) -> float:
        """Images that all ranks train on per second."""
        return self.batch_size / self.step_s

    def mfu(self, rate: float) -> float:
        """Model FLOP utilisation: the method's operations per second, over `rate`."""
        return sum(self.operations.values()) * self.images_per_second / rate


@dataclass(frozen=True)
class RunCost:
    """Cost of a run: its stages, seconds of all evaluations, and the rate of a matrix product.

    matmul_rate: operations per second.
    """

    stages: list[StageCost]
    evaluation_s: float
    matmul_rate: float

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def training_s(self) -> float:
        """Seconds of all steps."""
        return sum(stage.duration_s for stage in self.stages)

    @property
    def duration_s(self) -> float:
        """Seconds of all steps and evaluations."""
        return self.training_s + self.evaluation_s


def table(cost: RunCost) -> str:
    """Format the cost as lines of text."""
    lines = [line for stage in cost.stages for line in _lines_of(stage, cost.matmul_rate)]
    end = datetime.now() + timedelta(seconds=cost.duration_s)
    large_s, gain = sum(stage.large_duration_s for stage in cost.stages), []
    if any(stage.large_step_s is not None for stage in cost.stages):
        times = f"{large_s / cost.training_s:.2f} times"
        gain = [
            f"  gain        {times} the {_clock(large_s)} of images of the full size throughout"
        ]
    return "\n".join(
        [
            *lines,
            "the whole run",
            f"  training    {cost.num_steps} steps, {_clock(cost.training_s)}",
            *gain,
            f"  evaluation  {_clock(cost.evaluation_s)}",
            f"  in all      {_clock(cost.duration_s)}; begun now, it ends {end:%Y-%m-%d %H:%M}",
        ]
    )


def _lines_of(stage: StageCost, rate: float) -> list[str]:
    names = ", ".join(stage.layers[:NUM_SHOWN])
    num_more = len(stage.layers) - NUM_SHOWN
    phases = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in stage.operations.items())
    suffix = "everything" if stage.cut == STEM else f"from block {stage.cut}"
    full_s, at_most = stage.full_step_s, []
    if full_s is not None:
        full_s = max(full_s, stage.step_s)  # few steps were timed
        whole = _clock(stage.num_steps * full_s)
        at_most = [f"  at most     {full_s * 1e3:.1f} ms with attack.max_steps, {whole} in all"]
    large_s, at_full_size = stage.large_step_s, []
    if large_s is not None:
        rate_of_large = f"{stage.batch_size / large_s:.1f} images/s"
        others = f"{rate_of_large} ({large_s * 1e3:.1f} ms, {stage.large_attack})"
        gain = f"{large_s / stage.step_s:.2f} times the {others} of images of the full size"
        at_full_size = [f"  gain        {gain}"]
    return [
        stage.name,
        f"  layers      {names}" + (f" and {num_more} more" if num_more > 0 else ""),
        f"  suffix      {suffix}",
        f"  step        {stage.step_s * 1e3:.1f} ms, {stage.images_per_second:.1f} images/s, "
        f"after {stage.num_taken} steps, {stage.attack}",
        *at_most,
        *at_full_size,
        f"  operations  {phases} GFLOP per image",
        f"  MFU         {stage.mfu(rate):.1%} of the {rate / 1e12:.3g} TFLOP/s of a matrix product",
        f"  memory      {stage.peak_memory_mib:.0f} MiB at its peak",
        f"  training    {stage.num_steps} steps, {_clock(stage.duration_s)}",
    ]


def _clock(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
