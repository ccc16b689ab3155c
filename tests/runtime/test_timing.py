"""The wait of the device for data is measured, without its work."""

import time
from collections.abc import Iterator

import torch

from safer_fast.runtime.timing import DataWait


def test_waiting_for_data_is_measured_and_nothing_else() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    waits = DataWait(torch.device("cpu"))
    started = time.perf_counter()
    for _ in waits.watch(slow()):
        time.sleep(0.1)
    elapsed = time.perf_counter() - started
    waited = waits.take()
    assert 0.15 <= waited <= elapsed - 0.3
    assert waits.take() == 0
