"""The figures of training steps: taken from the device in one go, summed up, written, shown."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch

from safer_fast.data import Batch
from safer_fast.runs.loggers.run_log import RunLog
from safer_fast.runtime.ranks import Ranks
from safer_fast.runtime.timing import DataWait
from safer_fast.training.health import health_figures
from safer_fast.training.step import Step

STAGES = ("data", "attack", "ascent", "descent", "update")


class TrainingLog:
    """Step lines of metrics.jsonl, and what a terminal or a log shows of them.

    num_steps: those of the whole run, which tell how long it will still take. num_images: those of
    this rank in the epoch so far.
    """

    def __init__(self, log: RunLog, ranks: Ranks, device: torch.device, num_steps: int) -> None:
        self.log, self.ranks, self.device, self.num_steps = log, ranks, device, num_steps
        self._steps_taken, self._seconds, self.num_images = 0, 0.0, 0

    def begin_epoch(self) -> None:
        """Times count from here on."""
        self._waits, self._logged = DataWait(self.device), time.monotonic()
        self.num_images = 0

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an epoch; it is noticed how long each is waited for."""
        for batch in self._waits.watch(batches):
            self.num_images += batch.num_images
            yield batch

    def write(
        self, step: Step, epoch: int, num_steps: int, learning_rate: float, is_last: bool
    ) -> dict[str, float]:
        """Writes what the steps since the last line have summed up to, and gives these sums.

        The only place of the training loop that waits for the device. is_last: whether a line about
        the epoch follows.
        """
        sums = self._take(step)
        figures = step_figures(sums, step.health.is_sharpness_aware)
        figures |= step.attack.audited | {"learning_rate": learning_rate}
        self.log.write("step", epoch=epoch, step=num_steps, **figures)
        self._steps_taken += int(sums["steps"])
        self._seconds += sums["seconds"]
        left_s = self._seconds / max(self._steps_taken, 1) * (self.num_steps - num_steps)
        shown = {
            "robust": f"{figures['robust_accuracy']:.3f}",
            "images/s": f"{figures['images_per_second']:.0f}",
            "run": f"{timedelta(seconds=round(left_s))} left",
        }
        line = f"step {num_steps}/{self.num_steps}  loss {figures['loss']:.4f}"
        self.log.show(line, shown, only_on_terminals=is_last)
        return sums

    def _take(self, step: Step) -> dict[str, float]:
        sums = step.health.sums.take(self.ranks.sum_)
        sums["steps"] = sums["skipped"] + sums["taken"]
        now = time.monotonic()
        sums |= {"waited": self._waits.take(), "seconds": now - self._logged}
        self._logged = now
        seconds = step.stages.take() | {"data": sums["waited"]}
        return sums | {f"{name}_seconds": seconds.get(name, 0.0) for name in STAGES}


def step_figures(sums: Mapping[str, float], is_sharpness_aware: bool) -> dict[str, Any]:
    """What metrics.jsonl says of the steps that have summed up to this."""
    counted = max(sums["images"], 1)  # none where all of them were left out
    return {
        "loss": sums["loss"] / counted,
        "robust_accuracy": sums["correct"] / counted,
        "skipped_steps": int(sums["skipped"]),
        "images_per_second": sums["images"] / max(sums["seconds"], 1e-9),
        **health_figures(sums, is_sharpness_aware),
        "stage_ms": stage_times(sums),
    }


def stage_times(sums: Mapping[str, float]) -> dict[str, float]:
    """Mean milliseconds of a step's stages; data: what it waited for its batch.

    ascent: the first pass, with the prefix, and the perturbation; descent: the second pass, or the
    only one.
    """
    steps = max(sums["steps"], 1)
    return {name: 1e3 * sums[f"{name}_seconds"] / steps for name in STAGES}


def epoch_figures(
    totals: Mapping[str, float],
    *,
    epsilon: float,
    num_images: int,
    peak_memory_mib: float,
    is_sharpness_aware: bool,
) -> dict[str, Any]:
    """The training figures of an epoch of `num_images` images, from the sums of its step lines.

    Every image comes once: those that no step has counted could not be read. Raises ValueError
    where that is all of them.
    """
    if not totals["images"]:
        raise ValueError(
            "data.path: expected an image that can be read in every epoch, got none of "
            f"{num_images}; the checkpoints from before are kept, for --resume auto"
        )
    counted, elapsed = max(totals["images"], 1), totals["seconds"]
    health = health_figures(totals, is_sharpness_aware)
    success = health["attack_success"]
    return {
        "train_loss": totals["loss"] / counted,
        "train_robust_accuracy": totals["correct"] / counted,
        "train_start_accuracy": None if success is None else 1 - success[0],
        "learning_rate": totals["learning_rate"],
        "epsilon": epsilon,
        "images_per_second": totals["images"] / elapsed,
        "data_wait_fraction": totals["waited"] / elapsed,
        "peak_memory_mib": peak_memory_mib,
        "skipped_steps": int(totals["skipped"]),
        "skipped_images": num_images - int(totals["images"]),
        **health,
        "stage_ms": stage_times(totals),
    }
