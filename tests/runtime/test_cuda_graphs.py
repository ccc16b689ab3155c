"""A replayed step equals the eager one, for all changes between two calls."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from safer_fast.config.schema import OptimConfig
from safer_fast.runtime.cuda_graphs import WARM_UP, Buffers, CudaRecorder, PartBuffers, Replays
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.training.objectives import Targets
from safer_fast.training.optimizers import build_optimizer, set_learning_rate
from safer_fast.training.step import RECORDED
from tests.support.networks import build, images_and_labels
from tests.support.steps import make_step
from tests.support.tape import TapeRecorder

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optim": OptimConfig(learning_rate=1e-3)},
    "muon": {"optim": OptimConfig(name="muon", learning_rate=1e-3)},
    "clipped": {"clip_norm": 0.01},
    "adaptive": {"adaptive": True},
    "one pass": {"rho": 0.0},
    "l2": {"norm": "l2"},
    "trades": {"objective": "trades"},
    "apgd": {"attack": "apgd"},
    "apgd, trades, l2": {"attack": "apgd", "objective": "trades", "norm": "l2"},
    "mart": {"objective": "mart"},
    "micro-batches": {"attack_micro_batch": 4, "micro_batch": MicroBatch(size=4)},
}


def with_targets(seed: int) -> tuple[Tensor, Targets]:
    images, labels = images_and_labels(seed=seed)
    return images, Targets.alike(labels)


def run(
    num_steps: int, replays: Replays, *, drop_path_rate: float = 0.0, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and sums after steps whose images, radii and learning rate all differ."""
    model = build(compute_dtype=torch.bfloat16, drop_path_rate=drop_path_rate)
    step, arenas = make_step(model, ["blocks.2.mlp.fc1", "head"], replays=replays, **settings)
    torch.manual_seed(7)
    for index in range(num_steps):
        images, targets = with_targets(index)
        set_learning_rate(step.optimizer, 1e-2 / (1 + index))
        epsilon, step_size = torch.tensor(0.01 + 0.002 * index), torch.tensor(0.01 - 0.001 * index)
        step(images, targets, epsilon, step_size)
    return arenas.state_dict(), step.health.sums.take()


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_replayed_steps_equal_steps_as_written_bit_for_bit(settings: dict[str, Any]) -> None:
    recorder = TapeRecorder()
    expected, expected_sums = run(7, Replays(), **settings)
    replays = Replays(recorder)
    actual, sums = run(7, replays, **settings)
    left_out = {"ascent", "second pass"} if settings.get("rho") == 0 else set()
    assert {key[0] for key in replays.recorded} == {"attack", *RECORDED} - left_out
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert sums == expected_sums


def test_the_tape_notices_what_a_phase_bakes_in() -> None:
    totals = []
    for replays in (Replays(), Replays(TapeRecorder())):
        total, rate = torch.zeros(()), torch.zeros(())
        for index in range(WARM_UP + 2):
            rate.fill_(index)
            replays(("by tensor",), lambda: total.add_(rate))  # type: ignore[arg-type, return-value] # noqa: B023
            replays(("by number",), lambda: total.add_(100 * index))  # type: ignore[arg-type, return-value] # noqa: B023
        totals.append(float(total))
    assert totals == [1010.0, 910.0]


def test_random_depth_is_drawn_anew_in_every_replay() -> None:
    recorder = TapeRecorder()
    expected, _ = run(7, Replays(), drop_path_rate=0.4)
    actual, _ = run(7, Replays(recorder), drop_path_rate=0.4)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_one_iteration_is_recorded_however_many_the_attack_takes() -> None:
    recorder = TapeRecorder()
    model = build()
    step, _ = make_step(model, ["blocks.2.mlp.fc1"], replays=Replays(recorder))
    images, labels = images_and_labels()
    radii = torch.tensor(0.03), torch.tensor(0.01)
    for num_iterations in (10, 2, 7):
        step.attack.steps = num_iterations
        replayed = step.attack(images, labels, *radii).clone()
        step.attack.generator = torch.Generator().manual_seed(9)
    assert len(recorder.tapes) == 1
    assert recorder.num_warm_ups == WARM_UP
    assert replayed.shape == images.shape


def test_a_new_selection_records_the_passes_again_and_not_the_attack() -> None:
    chosen = [["blocks.2.mlp.fc1"], ["blocks.1.attn.qkv"], ["head"]]
    results, recorded = [], []
    for replays in (Replays(), Replays(TapeRecorder())):
        step, arenas = make_step(build(), chosen[0], replays=replays)
        for layers in chosen:
            step.selection = arenas.select(layers)
            step.optimizer = build_optimizer(OptimConfig(name="sgd"), step.selection)
            step.__post_init__()
            recorded.append({key[0] for key in replays.recorded})
            for seed in range(5):
                step(*with_targets(seed), torch.tensor(0.03), torch.tensor(0.01))
        results.append(arenas.master.clone())
    assert torch.equal(*results)
    assert recorded == [set()] * 4 + [{"attack"}] * 2


def test_batches_of_another_size_are_recorded_apart() -> None:
    results = []
    for replays in (Replays(), Replays(TapeRecorder())):
        step, arenas = make_step(build(), ["blocks.2.mlp.fc1"], replays=replays)
        for index in range(12):
            images, labels = images_and_labels(6 if index % 3 else 4, seed=index)
            step(images, Targets.alike(labels), torch.tensor(0.03), torch.tensor(0.01))
        results.append(arenas.master.clone())
    assert torch.equal(*results)
    assert [key[0] for key in replays.recorded].count("attack") == 2


def test_a_phase_that_cannot_be_recorded_runs_as_written_and_says_why() -> None:
    lines: list[str] = []
    results = []
    for replays in (Replays(), Replays(TapeRecorder(), lines.append)):
        step, arenas = make_step(build(), ["blocks.2.mlp.fc1"], replays=replays)
        parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
        step.optimizer = torch.optim.Rprop(parameters)  # one that cannot skip on the device
        for seed in range(6):
            step(*with_targets(seed), torch.tensor(0.03), torch.tensor(0.01))
        results.append(arenas.master.clone())
    assert torch.equal(*results)
    assert {key[0] for key in replays.recorded} == {"attack", *RECORDED} - {"update"}
    reason = "operation not permitted when stream is capturing"
    assert lines == [f"CUDA graph of update: off ({reason})"]


def test_running_out_of_memory_while_recording_is_not_taken_for_a_refusal() -> None:
    class Full:
        def warm_up(self, phase: Any) -> None:
            phase()

        def record(self, phase: Any) -> Any:
            try:
                raise torch.OutOfMemoryError("full")
            except torch.OutOfMemoryError:
                raise RuntimeError("capture ended in an error") from None

    replays = Replays(Full())
    for _ in range(WARM_UP):
        replays(("phase",), lambda: None)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="capture ended"):
            replays(("phase",), lambda: None)


def test_all_phases_of_a_step_are_recorded_in_the_same_step() -> None:
    replays = Replays(TapeRecorder())
    total, recorded = torch.zeros(()), []
    for _ in range(WARM_UP + 1):
        with replays.step():
            for name in ("attack", "attack", "attack", "attack", "pass"):
                replays((name,), lambda: total.add_(1))  # type: ignore[arg-type, return-value]
        recorded.append(len(replays.recorded))
    assert recorded == [0] * WARM_UP + [2]
    assert total == 5 * (WARM_UP + 1)


def test_a_step_in_which_phases_are_forgotten_does_not_count_for_them() -> None:
    replays = Replays(TapeRecorder())
    for index in range(2 * WARM_UP + 1):
        with replays.step():
            replays(("attack",), lambda: None)
            if index == WARM_UP - 1:
                assert not replays.forget()
            assert bool(replays.recorded) == (index == 2 * WARM_UP)
    assert replays.forget()


def test_recordings_that_do_not_fit_together_are_all_dropped() -> None:
    class Small(TapeRecorder):
        def record(self, phase: Any) -> Any:
            if self.tapes:
                raise torch.OutOfMemoryError("full")
            return super().record(phase)

    replays = Replays(Small())
    for name in ("attack", "pass"):
        for _ in range(WARM_UP):
            replays((name,), lambda: None)
    replays(("attack",), lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        replays(("pass",), lambda: None)
    assert not replays.forget()


def test_phases_are_forgotten_by_name_or_all_together() -> None:
    replays = Replays(TapeRecorder())
    total = torch.zeros(())
    for name in ("a", "b"):
        for _ in range(WARM_UP + 1):
            replays((name, 1), lambda: total.add_(1))  # type: ignore[arg-type, return-value]
    assert replays.recorded == [("a", 1), ("b", 1)]
    replays.forget("a")
    assert replays.recorded == [("b", 1)]
    replays.forget()
    assert replays.recorded == []
    assert total == 2 * (WARM_UP + 1)


def test_a_buffer_stays_where_it_is_for_each_name_and_shape() -> None:
    buffers = Buffers()
    first = buffers.hold("x", torch.ones(3))
    assert buffers.hold("x", torch.zeros(3)) is first
    assert torch.equal(first, torch.zeros(3))
    assert buffers.hold("y", torch.ones(3)) is not first
    assert buffers.hold("x", torch.ones(2)) is not first
    assert buffers.hold("x", torch.ones(3, dtype=torch.int64)) is not first


def test_buffers_of_larger_parts_are_freed() -> None:
    buffers, batch = PartBuffers(), torch.arange(6.0)

    def hold(size: int, anew: bool) -> list[Tensor]:
        def compute() -> list[Tensor]:
            return list(batch.split(size))

        return buffers.hold(batch.shape, size, compute, anew=anew)

    whole = weakref.ref(hold(6, True)[0])
    batch += 1
    assert hold(6, False)[0][0] == 0  # as the first pass left it
    assert hold(6, True)[0] is whole()
    parts = hold(4, False)  # the second pass ran out of memory
    assert [part.tolist() for part in parts] == [[1, 2, 3, 4], [5, 6]]
    assert whole() is None
    assert all(map(torch.is_same_size, hold(4, True), parts))


class _FakeCuda:
    """Stands in for torch.cuda's streams and graphs, and writes down what is asked of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.pools: list[int] = []
        self.fails = False
        self.left: list[tuple[int, int]] = []
        outer = self

        class Stream:
            device = torch.device("cuda", 0)

            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                outer.events.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                outer.events.append("replay")

        @contextmanager
        def graph(graph: Any, *, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            outer.pools.append(pool)
            self.current = stream
            yield
            if outer.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.current = self.default

        @contextmanager
        def within(stream: Any) -> Iterator[None]:
            outer.events.append(f"on {stream.name}")
            yield

        self.default = self.current = Stream("default")
        patch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream))
        patch.setattr(torch.cuda, "stream", within)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(
            torch._C,
            "_cuda_endAllocateToPool",
            lambda device, pool: self.left.append((device, pool)),
            raising=False,
        )
        numbers = itertools.count()
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: next(numbers))


def test_graphs_are_captured_on_one_stream_and_in_one_pool_while_any_of_them_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = _FakeCuda(monkeypatch)
    replays = Replays(CudaRecorder(torch.device("cuda")), pytest.fail)
    calls: list[int] = []
    for name in ("a", "b"):
        for _ in range(WARM_UP + 2):
            replays((name,), lambda: calls.append(1))
    assert len(calls) == 2 * (WARM_UP + 1)
    warm_up = ["side waits for default", "on side", "default waits for side"]
    assert cuda.events == 2 * (WARM_UP * warm_up + ["replay", "replay"])
    assert cuda.pools == [0, 0]
    replays.forget("a")
    for _ in range(WARM_UP + 1):
        replays(("c",), lambda: None)
    replays.forget()
    gc.collect()
    for _ in range(WARM_UP + 1):
        replays(("d",), lambda: None)
    assert cuda.pools == [0, 0, 0, 1]


def test_a_capture_that_fails_leaves_stream_and_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _FakeCuda(monkeypatch)
    cuda.fails = True
    lines: list[str] = []
    replays = Replays(CudaRecorder(torch.device("cuda")), lines.append)
    for _ in range(WARM_UP + 2):
        replays(("update",), lambda: None)
    assert cuda.current is cuda.default
    assert cuda.left == [(0, cuda.pools[0])]
    reason = "operation not permitted when stream is capturing"
    assert lines == [f"CUDA graph of update: off ({reason})"]
