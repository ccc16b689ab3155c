"""Steps on a GPU that is not there are captured whole, wait for nothing and ask for no memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safer_fast.training.step import RECORDED
from tests.support.captured_steps import MEMORY, SETTINGS
from tests.support.fake_gpu import build, run, why_not
from tests.support.networks import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first to ask takes the steps of all
    pytest.mark.skipif(why_not() is not None, reason=f"no fake GPU: {why_not()}"),
]
CASES = (*FAMILIES, *SETTINGS)
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What happened in each case; one process takes the steps of them all."""
    library, folder = once("fake-gpu", build), tmp_path_factory.mktemp("images")
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "train.npz", images=images, labels=np.arange(16) % 2)
    lines = run(library, "tests.support.captured_steps", str(folder / "train.npz"), *CASES, *MEMORY)
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_all_phases_are_captured_and_a_replayed_step_neither_waits_nor_allocates(
    case: str, results: Results
) -> None:
    result = results[case]
    assert result["recorded"] == sorted({"attack", *RECORDED})
    assert result["refused"] == []
    assert result["violations"] == 0, result["last_violation"]
    last, before = result["steps"]
    assert last == before
    for name in ("waits", "copies_in", "copies_out", "allocations"):
        assert last[name] == 0, name
    # three iterations of the attack, for both halves in micro-batches; two passes, ascent, update
    assert last["graph_launches"] == (10 if case == "micro-batches" else 7)
    assert last["launches"] < 100


@pytest.mark.parametrize(("case", "num_images"), list(zip(MEMORY, (256, 512, 1024), strict=True)))
def test_parts_of_a_batch_are_as_large_as_memory_allows_also_beside_captured_graphs(
    case: str, num_images: int, results: Results
) -> None:
    result = results[case]
    assert (result["attacked"], result["trained"]) == (num_images, num_images)
    assert result["recorded"] == sorted({"attack", *RECORDED})
    assert 0.8 * MEMORY[case] < result["peak_gib"] <= MEMORY[case]


def test_on_a_gpu_the_attack_is_in_bf16_unless_the_run_is_not(results: Results) -> None:
    others = {"fp32": "amp", "fp8 attack": "fp8", "compiled, fp8": "fp8"}
    for case in CASES:
        assert results[case]["precision"] == others.get(case, "bf16"), case
