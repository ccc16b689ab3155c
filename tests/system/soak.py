"""A test that kills and resumes runs as long as wanted: `python -m tests.system.soak --cycles 300`.

A run is resumed after each kill until it ends, and is then compared with its twin that was never
stopped. Exits with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from safer_fast.runs.loggers.metrics_file import read_metrics
from tests.support.kills import (
    BACKENDS,
    EPOCHS,
    STEPS_PER_EPOCH,
    WARMUP_EPOCHS,
    Ending,
    Server,
    State,
    checkpoints_of,
    flags_for,
    write_photos,
)

SIGNALS = {signal.SIGKILL: 0.8, signal.SIGTERM: 0.1, signal.SIGINT: 0.1}
SHARE_DAMAGED = 0.15
CYCLES_PER_LINE = 10
WITH_BATCH_NORMS = (
    "--model.name=xcit_nano_12_p8_224",
    "--model.patch_size=8",
    "--data.image_size=16",
    "--model.arguments={depth: 1, cls_attn_layers: 1}",
)
WAYS: list[tuple[str, ...]] = [
    (),
    ("--amp=bf16", "--optim.ema_decay=null"),
    ("--objective.name=trades", "--optim.name=sgd", "--selection.every_epochs=2"),
    ("--selection.criterion=all", "--sam.layerwise=true"),
    ("--selection.criterion=random", "--sam.adaptive=true", "--selection.norms=true"),
    ("--evaluation.patience=1", "--evaluation.every_epochs=2", "--attack.norm=l2"),
    WITH_BATCH_NORMS,
]
if find_spec("peft") is not None:
    WAYS.append(("--selection.lora_rank=2", "--optim.ema_decay=null", "--amp=bf16"))


@dataclass
class Figures:
    """Counts of cycles, signals and findings."""

    num_cycles: int = 0
    by_signal: Counter[str] = field(default_factory=Counter)
    by_moment: Counter[str] = field(default_factory=Counter)
    by_backend: Counter[str] = field(default_factory=Counter)
    num_while_writing: int = 0
    num_damaged: int = 0
    num_survived: int = 0
    num_finished: int = 0
    failures: list[str] = field(default_factory=list)

    def lines(self, seconds: float) -> list[str]:
        """The figures as text."""

        def counts(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in counter.most_common())

        return [
            f"cycles:     {self.num_cycles} in {seconds:.0f} s ({counts(self.by_backend)})",
            f"signals:    {counts(self.by_signal)}",
            f"moments:    {counts(self.by_moment)}; "
            f"{self.num_while_writing} of them while a checkpoint was written",
            f"damaged:    {self.num_damaged} newest checkpoints, {self.num_survived} survived",
            f"finished:   {self.num_finished} runs, "
            f"{self.num_finished - len(self.failures)} identical to one never stopped",
            *(f"FAILED:     {failure}" for failure in self.failures),
        ]


class Soak:
    """Starts, stops and compares runs below a folder; all is drawn from the seed but the clock."""

    def __init__(self, server: Server, place: Path, seed: int) -> None:
        self.server, self.place = server, place
        self.draw = random.Random(seed)
        self.figures = Figures()
        self._photos = write_photos(place / "photos")
        self._twins: dict[tuple[str, ...], tuple[State, float]] = {}
        self._is_damaged = False
        self._start_run()

    def cycle(self) -> None:
        """One start of the run, and a signal at some time unless it ends before."""
        figures, draw = self.figures, self.draw
        free = [f"--checkpoint.every_steps={draw.choice([1, 1, 3])}"]
        free += [f"--checkpoint.keep={draw.choice([1, 2, 3])}"]
        free += [f"--data.num_workers={draw.choice([0, 1, 2])}"]
        number = draw.choices(list(SIGNALS), list(SIGNALS.values()))[0]
        seconds = self._twins[self.way][1] * draw.uniform(0.05, 0.5)
        training = self.server.start(self.run, flags_for(self._photos, *self.way, *free))
        time.sleep(seconds)
        training.send(number)
        ending = training.ending()
        figures.num_cycles += 1
        figures.by_backend[self.way[0]] += 1
        if self._is_damaged and "damaged checkpoint" in ending.output:
            figures.num_survived += 1
            self._is_damaged = False
        if ending.status == 0:
            figures.by_signal["none, it ended before"] += 1
            self._finish()
            return
        figures.by_signal[number.name] += 1
        moment = moment_of(self.run, ending)
        figures.by_moment[moment] += 1
        figures.num_while_writing += any(self.run.glob("checkpoints/*.tmp"))
        if not is_as_expected(ending, number):
            self._fail(f"{number.name} after {seconds:.2f} s: {ending.status} {ending.errors}")
            self._start_run()
        elif moment != "end" and draw.random() < SHARE_DAMAGED:
            self._damage_newest()

    def end(self) -> None:
        """Resume the run in progress to its end, and compare it too."""
        ending = self.server.train(self.run, flags_for(self._photos, *self.way))
        if (ending.status, ending.errors) != (0, ""):
            self._fail(f"left alone: {ending.status} {ending.errors}")
            return
        self._finish()

    def _start_run(self) -> None:
        """Begin another run, of which there is a twin."""
        number = len(list(self.place.glob("run-*/")))
        self.run = self.place / f"run-{number}"
        self.way = (self.draw.choice(BACKENDS), *self.draw.choice(WAYS))
        self._is_damaged = False
        if self.way not in self._twins:
            twin, start = self.place / f"twin-{len(self._twins)}", time.monotonic()
            ending = self.server.train(twin, flags_for(self._photos, *self.way))
            assert (ending.status, ending.errors) == (0, ""), ending
            self._twins[self.way] = State.of(twin), time.monotonic() - start

    def _finish(self) -> None:
        """Compare the run with its twin, and begin another one."""
        self.figures.num_finished += 1
        if differences := State.of(self.run).differences(self._twins[self.way][0]):
            self._fail("; ".join(differences))
        self._start_run()

    def _fail(self, reason: str) -> None:
        self.figures.failures.append(f"{self.run} {' '.join(self.way)}: {reason}")

    def _damage_newest(self) -> None:
        """Damage the newest checkpoint, unless that would leave no whole one."""
        paths = checkpoints_of(self.run)
        if self._is_damaged or len(paths) < 2:
            return
        damage: Callable[[Path], None] = self.draw.choice([cut_in_half, flip_a_bit])
        damage(paths[-1])
        self.figures.num_damaged += 1
        self._is_damaged = True


def cut_in_half(path: Path) -> None:
    """Cut the file off in the middle."""
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    """Flip a bit of the file, somewhere among its tensors."""
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def is_as_expected(ending: Ending, number: signal.Signals) -> bool:
    """A signal that comes before the run listens ends the process by itself."""
    asked = (128 + number, -number) if number != signal.SIGKILL else (-number,)
    return ending.status in asked and ending.errors == ""


def moment_of(run: Path, ending: Ending) -> str:
    """The last event in the log of the run, in words."""
    log = run / "metrics.jsonl"
    last = read_metrics(log)[-1] if log.exists() else {"event": "run"}
    if last["event"] != "end" and "CUDA graphs: off" not in ending.output:
        return "start"  # that is how its introduction ends
    event, epoch, step = last["event"], last["epoch"], last["step"]
    if event == "evaluation":
        return "selection" if last["weights"] == "start" else "final evaluation"
    if event == "epoch" and epoch >= WARMUP_EPOCHS:
        return "selection" if epoch < EPOCHS else "final evaluation"
    if event == "step" and step % STEPS_PER_EPOCH == 0:
        return "evaluation"
    return "end" if event == "end" else "warm-up" if epoch <= WARMUP_EPOCHS else "SAFER"


def soak(num_cycles: int, seed: int, place: Path) -> Figures:
    """The figures of so many cycles in this folder."""
    start = time.monotonic()
    with Server() as server:
        run = Soak(server, place, seed)
        for number in tqdm(range(1, num_cycles + 1), unit="cycle", disable=None):
            run.cycle()
            if not sys.stderr.isatty() and number % CYCLES_PER_LINE == 0:
                figures = run.figures
                print(
                    f"{number}/{num_cycles} cycles, {time.monotonic() - start:.0f} s, finished "
                    f"{figures.num_finished}, failed {len(figures.failures)}",
                    flush=True,
                )
        run.end()
    return run.figures


def main() -> None:
    """Print the figures; keep the folder of what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    figures = soak(arguments.cycles, arguments.seed, place)
    print("\n".join(figures.lines(time.monotonic() - start)))
    if figures.failures:
        sys.exit(1)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
