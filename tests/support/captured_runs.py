"""Whole runs on the GPU that is not there, as a program: a line of JSON for each case.

It takes a folder, in which runs are made, and names of cases. No value that it computes means
anything: those that a run looks at are given by the program.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD

from safer_fast import train_model
from safer_fast.attacks.adaptive import STRONG_STEPS
from safer_fast.attacks.audit import Audit
from safer_fast.config.command_line import parse_config
from safer_fast.evaluation.batch import BatchEvaluator
from safer_fast.runtime.cuda_graphs import Replays
from safer_fast.training.checkpointing import Saver
from safer_fast.training.engine import Engine
from safer_fast.training.learner import Learner
from safer_fast.training.validation import Validator
from tests.support.captured_steps import BATCH_SIZE, flags_of, without_libraries
from tests.support.fake_gpu import FakeGpu

NUM_IMAGES = {"train": 64, "validation": 24, "test": 20}
STEPS_PER_EPOCH = NUM_IMAGES["train"] // BATCH_SIZE
SMALL, LARGE = 32, 256
"""Edges of images in pixels, of the case `memory` the latter."""
EVALUATION_STEPS = 4
AUDIT_EVERY = 2
ENOUGH = (4, 4, 3, 3, 3, 3, 6, 6, 5, 5, 2)
"""Iterations that audit after audit finds enough, the last number for all others."""
MOST_STEPS = 8
RUN = [
    "--epochs=4",
    "--attack.steps=auto",
    f"--attack.max_steps={MOST_STEPS}",
    f"--attack.audit_every={AUDIT_EVERY}",
    f"--evaluation.steps={EVALUATION_STEPS}",
    "--evaluation.attacks=clean,fgsm,pgd-6",
    "--evaluation.sentinel_images=16",
]
CASES: dict[str, list[str]] = {
    "run": RUN,
    "memory": [
        "--epochs=2",
        "--attack.steps=2",
        "--evaluation.steps=2",
        "--evaluation.attacks=clean",
        "--evaluation.sentinel_images=0",
        "--data.augmentation=none",
        "--batch-size=16",
        '--model.arguments={"depth": 4, "embed_dim": 192}',
    ],
}
"""Flags by the name of a case."""
WRITES = ("save", "keep_start", "keep_best")
SPARE_MIB = 320
"""Memory beside that of training in which evaluations of the case `memory` have to run."""


class Observer:
    """Counts what steps and evaluations ask for, and notes what is recorded when."""

    def __init__(self, gpu: FakeGpu, is_short_of_memory: bool) -> None:
        self.gpu, self.is_short = gpu, is_short_of_memory
        self.violations = gpu.counts()["violations"]
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.replays: list[dict[str, int]] = []
        """Counts of each replay of the attack of evaluations."""
        self.recorded: list[str] = []
        self.lines: list[str] = []
        self.num_audits = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the runs that take place within the context."""
        patches = (
            patch.object(Learner, "take_step", self._watched(Learner.take_step, self.steps)),
            patch.object(Validator, "attack_gap", self._evaluating("attack_gap")),
            patch.object(Validator, "on_validation", self._evaluating("on_validation")),
            patch.object(Validator, "final_accuracies", self._evaluating("final_accuracies")),
            patch.object(BatchEvaluator, "measure", self._measuring()),
            patch.object(Replays, "_record", self._recording()),
            patch.object(Replays, "__call__", self._replaying()),
            patch.object(Audit, "_after", self._strength()),
            patch.object(Engine, "_report", lambda _, line: self.lines.append(line)),
            # else the thread that writes copies tensors while others are counted
            *(patch.object(Saver, name, _waiting(name)) for name in WRITES),
        )
        with ExitStack() as stack:
            for item in patches:
                stack.enter_context(item)
            yield

    def _since(self, start: dict[str, int]) -> dict[str, int]:
        return {name: value - start[name] for name, value in self.gpu.counts().items()}

    def _watched(self, method: Any, into: list[dict[str, Any]]) -> Any:
        def watched(learner: Any, *arguments: Any) -> Any:
            start, num_audits = self.gpu.counts(), self.num_audits
            result = method(learner, *arguments)
            steps = learner.step.attack.steps
            audits = self.num_audits - num_audits
            into.append({"attack_steps": steps, "audits": audits, **self._since(start)})
            return result

        return watched

    def _evaluating(self, name: str) -> Any:
        method = getattr(Validator, name)

        def evaluating(validator: Validator, *arguments: Any) -> Any:
            replays = validator.engine.replays
            before, start = list(replays.recorded), self._memory()
            if self.is_short:
                self.gpu.set_memory((start + SPARE_MIB * 2**20) / 2**30)
            num_replays = len(self.replays)
            steps = validator.engine.audit.attack_steps
            self.evaluations.append({"name": name, "attack_steps": steps, "batches": []})
            result = method(validator, *arguments)
            self.gpu.set_memory(139)
            self.evaluations[-1] |= {
                "num_replays": len(self.replays) - num_replays,
                "memory_kept": self._memory() - start,
                "recorded_before": sorted({str(key[0]) for key in before}),
                "keeps_recordings": replays.recorded == before,
            }
            return result

        return evaluating

    def _memory(self) -> int:
        """Bytes that are in use when all that is cached is given back."""
        gc.collect()
        torch.cuda.empty_cache()
        return self.gpu.counts()["bytes_used"]

    def _measuring(self) -> Any:
        method = BatchEvaluator.measure

        def measuring(evaluator: Any, name: str, *arguments: Any) -> Any:
            start, num_recorded = self.gpu.counts(), len(self.recorded)
            result = method(evaluator, name, *arguments)
            facts = {"attack": name, "recordings": len(self.recorded) - num_recorded}
            self.evaluations[-1]["batches"].append(facts | self._since(start))
            return result

        return measuring

    def _recording(self) -> Any:
        method = Replays._record

        def recording(replays: Any, recorder: Any, key: Any, phase: Any) -> None:
            self.recorded.append(str(key[0]))
            method(replays, recorder, key, phase)

        return recording

    def _replaying(self) -> Any:
        method = Replays.__call__

        def replaying(replays: Any, key: Any, phase: Any) -> None:
            is_replayed, start = key in replays.recorded, self.gpu.counts()
            method(replays, key, phase)
            if is_replayed and key[0] == "evaluation":
                self.replays.append(self._since(start))

        return replaying

    def _strength(self) -> Any:
        """Attacks of enough iterations as strong as PGD-20, others half as strong."""
        method = Audit._after

        def after(audit: Any, parts: Any, steps: int, *arguments: Any, **named: Any) -> Tensor:
            assert audit.attack.model.mean.is_cuda
            method(audit, parts, steps, *arguments, **named).tolist()  # waits, as reading it does
            enough = ENOUGH[min(self.num_audits, len(ENOUGH) - 1)]
            is_strong = steps == STRONG_STEPS
            self.num_audits += is_strong
            enough = 1 if is_strong else ENOUGH[min(self.num_audits - 1, len(ENOUGH) - 1)]
            loss = 1.0 if steps >= enough else 0.6
            return torch.tensor([loss, 0.0, 8.0], dtype=torch.float64)

        return after


def _waiting(name: str) -> Any:
    """The method of `Saver`, which returns when all is written."""
    method = getattr(Saver, name)

    def waiting(saver: Saver, *arguments: Any) -> None:
        method(saver, *arguments)
        saver.wait()

    return waiting


def run_case(gpu: FakeGpu, name: str, folder: str) -> dict[str, Any]:
    """Train, evaluate and report; what was asked for, recorded, refused and broken."""
    images, is_large = Path(folder) / f"{name}.npz", name == "memory"
    write_images(images, LARGE if is_large else SMALL)
    data = [f"--data.path={images}", f"--output={folder}/{name}", "--selection.warmup_epochs=1"]
    flags = [*flags_of(""), *data, *CASES[name]]
    observer = Observer(gpu, is_large)
    nonzero, tolist, cpu, init = Tensor.nonzero, Tensor.tolist, Tensor.cpu, SGD.__init__

    def all_of(self: Tensor) -> Tensor:
        """Wait for the device as `nonzero` does; then everything is not zero."""
        found: Tensor = nonzero(self)
        return torch.arange(len(self), device=self.device)[:, None] if self.is_cuda else found

    def ones(self: Tensor) -> Any:
        values = tolist(self)
        return tolist(torch.ones(self.shape, dtype=self.dtype)) if self.is_cuda else values

    def on_host(self: Tensor, *arguments: Any, **named: Any) -> Tensor:
        values: Tensor = cpu(self, *arguments, **named)
        is_count = self.is_cuda and self.dtype == torch.int64
        return torch.ones_like(values) if is_count else values

    def unchecked(*arguments: Any, **named: Any) -> None:
        with patch.object(Tensor, "__lt__", lambda *_: False):  # SGD refuses a rate below zero
            init(*arguments, **named)

    with (
        patch.object(SGD, "__init__", unchecked),
        patch.object(Tensor, "nonzero", all_of),
        patch.object(Tensor, "tolist", ones),
        patch.object(Tensor, "cpu", on_host),
        observer.watching(),
    ):
        train_model(parse_config(flags))
    return {
        "case": name,
        "steps": observer.steps,
        "evaluations": observer.evaluations,
        "replays": observer.replays,
        "recorded": observer.recorded,
        "lines": observer.lines,
        "violations": gpu.counts()["violations"] - observer.violations,
        "last_violation": gpu.last_violation(),
    }


def write_images(file: Path, size: int) -> None:
    """Write splits of random images of this size, as many as `NUM_IMAGES` says."""
    arrays = dict[str, Any]()
    for split, count in NUM_IMAGES.items():
        images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        arrays |= {f"{split}_images": images, f"{split}_labels": np.arange(count) % 2}
    np.savez(file, **arrays)


def main(folder: str, *names: str) -> None:
    """Run these cases, one after the other."""
    without_libraries()
    gpu = FakeGpu()
    for name in names:
        print(json.dumps(run_case(gpu, name, folder)), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
