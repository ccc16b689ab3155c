"""Device sums have the right values, and `take` is one transfer to the host."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from safer_fast.training.health import DeviceSums, Skips


class NoSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises if a value would be copied to the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read from the device")
        return func(*args, **(kwargs or {}))


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


def test_a_row_of_values_is_summed_up_place_by_place() -> None:
    sums = DeviceSums()
    for _ in range(2):
        sums.add(right=torch.tensor([1, 2]), images=torch.tensor(3), none=torch.zeros(0))
    assert sums.take() == {"images": 6.0, "right_0": 2.0, "right_1": 4.0}
    with pytest.raises(AssertionError, match="loss: expected at most 1 dimension, got 2"):
        sums.add(loss=torch.zeros(2, 2))


def test_loaded_sums_continue_where_they_were() -> None:
    sums, resumed = DeviceSums(), DeviceSums()
    for value in (1 / 3, 1 / 7):
        sums.add(loss=torch.tensor(value), images=torch.tensor(2), right=torch.tensor([1, value]))
    resumed.load({"right": (2,), "images": (), "loss": ()}, sums.values())
    for each in (sums, resumed):
        each.add(loss=torch.tensor(1 / 11), images=torch.tensor(3), right=torch.ones(2))
    assert resumed.take() == sums.take()


def test_the_most_skips_in_a_row_are_remembered() -> None:
    skips = Skips(torch.device("cpu"))
    for is_skipped in (1.0, 1.0, 0.0, 1.0):
        skips.count(torch.tensor(is_skipped))
    assert (int(skips.in_a_row), skips.most_in_a_row()) == (1, 2)
