"""Settings of `auto` are decided by the size of the run, and notes name every path that is off."""

import sys
from math import inf
from typing import Any

import pytest
import torch

from safer_fast.config.schema import RuntimeConfig
from safer_fast.runtime.device import (
    CAPTURING_PAYS_FROM,
    COMPILING_PAYS_FROM,
    Runtime,
    decide_auto,
    keep_memory,
    prepare_runtime,
)


def runtime(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Runtime:
    return Runtime(torch.device(device), dtype, False, False, ("a note of before",))


@pytest.mark.parametrize(
    ("device", "setting", "num_operations", "expected"),
    [
        ("cpu", "auto", COMPILING_PAYS_FROM["cpu", torch.bfloat16], True),
        ("cpu", "auto", COMPILING_PAYS_FROM["cpu", torch.bfloat16] / 2, False),
        ("cpu", "on", 0, True),
        ("cpu", "off", inf, False),
        ("cuda", "auto", COMPILING_PAYS_FROM["cuda", torch.bfloat16], True),
        ("cuda", "auto", COMPILING_PAYS_FROM["cuda", torch.bfloat16] / 2, False),
    ],
)
def test_blocks_are_compiled_where_the_run_wins_back_the_time(
    device: str, setting: Any, num_operations: float, expected: bool
) -> None:
    planned = decide_auto(runtime(device), RuntimeConfig(compile=setting), num_operations)
    assert planned.is_compiled is expected
    assert any("torch.compile: off" in note for note in planned.notes) is not expected
    assert planned.notes[0] == "a note of before"


def test_fp32_on_a_cpu_is_compiled_only_when_asked() -> None:
    planned = decide_auto(runtime(dtype=torch.float32), RuntimeConfig(), 1e30)
    assert not planned.is_compiled
    expected = "torch.compile: off (no gain in fp32 on a CPU; runtime.compile=on forces it)"
    assert expected in planned.notes
    assert decide_auto(runtime(dtype=torch.float32), RuntimeConfig(compile="on"), 0).is_compiled


@pytest.mark.parametrize("is_wanted", [False, True])
def test_fp32_on_a_gpu_is_plain_unless_tf32_is_asked_for(
    is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    is_filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        prepare_runtime(RuntimeConfig(tf32=is_wanted))
        assert torch.get_float32_matmul_precision() == ("high" if is_wanted else "highest")
        assert torch.backends.cudnn.allow_tf32 is is_wanted
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.use_deterministic_algorithms(is_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = is_filled  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("device", "setting", "num_operations", "note"),
    [
        ("cuda", "auto", CAPTURING_PAYS_FROM, None),
        ("cuda", "auto", 0, "too short for it; runtime.cuda_graph=on forces it"),
        ("cuda", "on", 0, None),
        ("cuda", "off", inf, "CUDA graphs: off (runtime.cuda_graph=off)"),
        ("cpu", "on", inf, "CUDA graphs: off (no GPU is used)"),
        ("cpu", "auto", inf, "CUDA graphs: off (no GPU is used)"),
    ],
)
def test_graphs_are_captured_on_a_gpu_where_the_run_is_long_enough(
    device: str, setting: Any, num_operations: float, note: str | None
) -> None:
    planned = decide_auto(runtime(device), RuntimeConfig(cuda_graph=setting), num_operations)
    assert planned.is_captured is (note is None)
    found = [line for line in planned.notes if line.startswith("CUDA graphs")]
    assert len(found) == (note is not None)
    assert all(str(note) in line for line in found)


def test_on_and_off_hold_without_a_plan() -> None:
    assert prepare_runtime(RuntimeConfig(compile="on")).is_compiled
    assert not prepare_runtime(RuntimeConfig(compile="auto")).is_compiled
    assert not prepare_runtime(RuntimeConfig(cuda_graph="on", device="cpu")).is_captured


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc")
def test_glibc_is_told_to_keep_memory() -> None:
    assert keep_memory()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_on_a_machine_without_a_gpu_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"--runtime\.device: expected cpu or auto .* got cuda"):
        prepare_runtime(RuntimeConfig(device="cuda"))
