"""The log of a run: strict, readable after a kill, and without a wait for the device."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch.utils._python_dispatch import TorchDispatchMode

from safer_fast.metrics import FILE_NAME, DeviceSums, MetricsLog, read_metrics, uninterrupted

EPOCH: dict[str, Any] = {
    "train_loss": 0.5,
    "train_robust_accuracy": 0.4,
    "clean_accuracy": 0.8,
    "robust_accuracy": None,
    "learning_rate": 1e-3,
    "epsilon": 8 / 255,
    "images_per_second": 512.5,
    "data_wait_fraction": 0.01,
    "peak_memory_mib": 100.0,
    "skipped_steps": 0,
    "skipped_images": 0,
}
EVALUATION: dict[str, Any] = {
    "split": "test",
    "attack": "pgd-20",
    "epsilon": 8 / 255,
    "accuracy": 0.45,
    "num_images": 1000,
    "weights": "best",
}
SELECTION: dict[str, Any] = {
    "criterion": "sharpness",
    "scores": {"head": 0.25, "blocks.0.attn.qkv": 1.5},
    "selected": ["blocks.0.attn.qkv"],
    "cut": 0,
}


class NoSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where a value would have to come to the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read from the device")
        return func(*args, **(kwargs or {}))


def test_a_line_has_the_fixed_keys_first_and_then_the_values(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "new" / "run") as log:
        log.write("run", epoch=0, step=0, device="cpu", versions={"torch": "2"}, banner=("a", "b"))
        log.write("epoch", epoch=1, step=10, **EPOCH)
    run, epoch = read_metrics(tmp_path / "new" / "run" / "metrics.jsonl")
    assert list(run) == ["event", "epoch", "step", "time_s", "device", "versions", "banner"]
    assert run["banner"] == ["a", "b"]
    assert (epoch["event"], epoch["epoch"], epoch["step"]) == ("epoch", 1, 10)
    assert {key: epoch[key] for key in EPOCH} == EPOCH
    assert 0 <= run["time_s"] <= epoch["time_s"]


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 4):
            log.write("step", epoch=1, step=step, loss=1.0)
            assert len(read_metrics(tmp_path / "metrics.jsonl")) == step


def test_floats_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("step", epoch=1, step=1, loss=math.nan, nested={"values": [math.inf, -1.0]})
    text = (tmp_path / "metrics.jsonl").read_text()
    event = json.loads(text, parse_constant=pytest.fail)
    assert event["loss"] is None
    assert event["nested"] == {"values": [None, -1.0]}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.tensor(1.0), "step.loss: expected a JSON value, got Tensor"),
        ([{1, 2}], r"step.loss\[0\]: expected a JSON value, got set"),
        ({"a": Path()}, "step.loss.a: expected a JSON value"),
        ({1: "a"}, "step.loss: expected a JSON value, got dict"),
    ],
)
def test_a_value_that_json_does_not_know_is_refused_by_name(
    tmp_path: Path, value: Any, name: str
) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(TypeError, match=name):
        log.write("step", epoch=1, step=1, loss=value)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("event", "values"),
    [("epoch", EPOCH), ("selection", SELECTION), ("evaluation", EVALUATION)],
)
def test_an_event_without_one_of_its_keys_is_refused(
    tmp_path: Path, event: Any, values: dict[str, Any]
) -> None:
    with MetricsLog(tmp_path) as log:
        for key in values:
            rest = {name: value for name, value in values.items() if name != key}
            with pytest.raises(AssertionError, match=f"{event} lacks {key}"):
                log.write(event, epoch=1, step=1, **rest)
        log.write(event, epoch=1, step=1, **values)


def test_an_unknown_event_is_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(AssertionError, match="unknown event 'pause'"):
        log.write("pause", epoch=1, step=1)  # type: ignore[arg-type]


def test_tensorboard_has_the_scalars_by_group_and_name(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("epoch", epoch=1, step=7, **EPOCH)
        log.write("selection", epoch=1, step=7, **SELECTION)
        log.write("evaluation", epoch=1, step=7, **EVALUATION)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"epoch/{key}" for key in EPOCH} - tags == {"epoch/robust_accuracy"}  # it is None
    assert {"selection/head", "selection/blocks.0.attn.qkv"} <= tags
    (scalar,) = events.Scalars("evaluation/best-test-pgd-20")
    assert (scalar.step, round(scalar.value, 6)) == (7, 0.45)


def test_a_log_that_is_opened_again_goes_on(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsLog(tmp_path) as log:
            log.write("step", epoch=1, step=step)
    assert [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(("end", "kept"), [('{"step": 2', 1), ('{"step": 2}', 2), ("", 1)])
def test_a_last_line_cut_short_is_left_out_and_then_overwritten(
    tmp_path: Path, end: str, kept: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + end)
    assert len(read_metrics(path)) == kept
    with MetricsLog(tmp_path) as log:
        log.write("step", epoch=1, step=9)
    assert [event["step"] for event in read_metrics(path)] == [*[1, 2][:kept], 9]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"a": NaN}', "", '{"a": 1'])
def test_other_damage_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object, got "):
        read_metrics(path)


def test_sums_are_those_of_the_values_and_start_from_nothing_after_take() -> None:
    sums = DeviceSums()
    for value in range(1000):
        sums.add(loss=torch.tensor(value / 7), correct=torch.tensor(value))
    taken = sums.take()
    assert taken["correct"] == 499_500
    assert taken["loss"] == pytest.approx(499_500 / 7, rel=1e-7)
    assert sums.take() == {"loss": 0.0, "correct": 0.0}
    sums.add(loss=torch.tensor(2.0))
    assert sums.take() == {"loss": 2.0, "correct": 0.0}
    assert DeviceSums().take() == {}


def test_sums_do_not_lose_small_values_beside_large_ones() -> None:
    sums = DeviceSums()
    sums.add(count=torch.tensor(2.0**25))
    for _ in range(3):
        sums.add(count=torch.tensor(1.0))
    assert sums.take() == {"count": 2.0**25 + 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_a_sum_keeps_no_hold_of_its_first_value(dtype: torch.dtype) -> None:
    sums, value = DeviceSums(), torch.ones((), dtype=dtype)
    sums.add(x=value)
    sums.add(x=value)
    value.zero_()
    assert sums.take() == {"x": 2.0}


def test_adding_never_waits_for_the_device_and_keeps_no_graph() -> None:
    sums = DeviceSums()
    loss = torch.tensor(1.5, requires_grad=True) * 2
    with NoSync():  # type: ignore[no-untyped-call]
        for _ in range(3):
            sums.add(loss=loss, correct=torch.tensor([True, False]).sum())
    assert sums.take() == {"loss": 9.0, "correct": 3.0}


def test_taking_is_one_transfer_for_all_sums() -> None:
    sums = DeviceSums()
    sums.add(**{f"value_{index}": torch.tensor(float(index)) for index in range(50)})
    with NoSync():  # type: ignore[no-untyped-call]  # one scalar at a time would be fifty transfers
        assert sums.take() == {f"value_{index}": float(index) for index in range(50)}


def test_a_value_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"loss: expected a 0-d tensor, got \(2,\)"):
        DeviceSums().add(loss=torch.zeros(2))


def test_an_interrupt_comes_after_what_must_not_be_interrupted() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")
        done.append("never")
    assert done == ["all of it"]
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_lines_are_written_does_not_lock_the_log(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path) as log:  # noqa: PT012
        add = log._tensorboard.add_scalar

        def interrupted(*arguments: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            add(*arguments)

        log._tensorboard.add_scalar = interrupted  # type: ignore[method-assign]
        log.write("step", epoch=1, step=1, loss=1.0)
    assert [event["step"] for event in read_metrics(tmp_path / FILE_NAME)] == [1]
