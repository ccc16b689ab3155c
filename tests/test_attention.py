"""Attention runs on the kernel that is fastest for the model's shape, and stays on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from safer_fast import attention
from safer_fast.attention import BACKENDS, Shape, attention_shape, fastest, pin_attention, pin_for

from .networks import build

CPU = torch.device("cpu")
SHAPE = Shape(windows=1, heads=2, tokens=9, width=16)


def pin(cache: Path, wanted: Any = "auto", dtype: torch.dtype = torch.float32) -> attention.Pinned:
    return pin_attention(wanted, SHAPE, 4, dtype, CPU, cache)


def measure(monkeypatch: pytest.MonkeyPatch, **times_ms: float) -> list[list[str]]:
    """Stands in for the clock; gives a list that the names timed in each call are added to."""
    calls: list[list[str]] = []

    def times(names: list[str], inputs: object) -> dict[str, float]:
        calls.append(names)
        return {name: times_ms[name] for name in names}

    monkeypatch.setattr(attention, "time_backends", times)
    return calls


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("vit_tiny_patch16_224", Shape(1, 3, 17, 16)),
        ("deit_tiny_distilled_patch16_224", Shape(1, 3, 18, 16)),
        ("eva02_tiny_patch14_224", Shape(1, 3, 17, 16)),
        ("vit_small_patch16_dinov3", Shape(1, 3, 21, 16)),
        ("convit_tiny", None),
    ],
)
def test_the_shape_is_that_of_the_models_attention(family: str, expected: Shape | None) -> None:
    assert attention_shape(build(family), 32) == expected


def test_a_last_block_for_one_token_does_not_set_the_shape() -> None:
    model = build()
    model.save(["patch-order", "class-token"], 32)
    assert attention_shape(model, 32) == Shape(1, 3, 17, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_on_this_machine_is_one_of_its_kernels(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    pinned = pin(tmp_path / "cache.json", dtype=dtype)
    assert set(pinned.times_ms) == {"flash", "math"}
    assert pinned.backend == fastest(pinned.times_ms)
    assert pinned.refused == {"cudnn": "needs a GPU", "efficient": "needs a GPU"}
    assert pinned.note is None


@pytest.mark.parametrize(
    ("times_ms", "expected"),
    [
        ({"flash": 1.0, "math": 0.95}, "flash"),
        ({"flash": 1.0, "math": 0.89}, "math"),
        ({"flash": 1.0, "cudnn": 0.8, "efficient": 0.75, "math": 3.0}, "cudnn"),
        ({"efficient": 2.0, "math": 1.0}, "math"),
    ],
)
def test_another_kernel_must_be_clearly_faster_than_the_first(
    times_ms: dict[str, float], expected: str
) -> None:
    assert fastest(times_ms) == expected


def test_a_machine_measures_once_and_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measure(monkeypatch, flash=2.0, math=1.0)
    assert pin(tmp_path / "new" / "cache.json").backend == "math"
    measure(monkeypatch, flash=1.0, math=2.0)
    again = pin(tmp_path / "new" / "cache.json")
    assert again.backend == "math"
    assert again.times_ms == {"flash": 2.0, "math": 1.0}
    assert calls == [["flash", "math"]]
    assert pin(tmp_path / "new" / "cache.json", dtype=torch.bfloat16).backend == "flash"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"cpu": 3}', b'{"a": {"flash"'])
def test_a_damaged_memory_is_measured_anew_and_mended(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cache.json"
    file.write_bytes(content)
    calls = measure(monkeypatch, flash=2.0, math=1.0)
    assert [pin(file).backend for _ in range(2)] == ["math", "math"]
    assert len(calls) == 1
    assert list(json.loads(file.read_text()).values()) == [{"flash": 2.0, "math": 1.0}]


def test_a_place_that_cannot_be_written_to_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measure(monkeypatch, flash=2.0, math=1.0)
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache.json"
    assert [pin(cache).backend for _ in range(2)] == ["math", "math"]
    assert len(calls) == 2


def test_the_cache_lies_where_the_user_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure(monkeypatch, flash=1.0, math=2.0)
    assert pin_attention("auto", SHAPE, 4, torch.float32, CPU).backend == "flash"
    assert (tmp_path / "safer_fast" / "attention.json").is_file()


def test_the_process_computes_with_the_pinned_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend in ("math", "flash"):
        assert pin(tmp_path / "cache.json", backend).backend == backend
        assert torch.backends.cuda.flash_sdp_enabled() is (backend == "flash")
        assert torch.backends.cuda.math_sdp_enabled()
        with torch.profiler.profile() as profile:
            functional.scaled_dot_product_attention(*torch.randn(3, 4, 2, 9, 16).unbind())
        names = {event.key for event in profile.key_averages()}
        assert any("flash_attention" in name for name in names) is (backend == "flash")


def test_a_kernel_that_is_wanted_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measure(monkeypatch, flash=1.0, math=2.0)
    assert pin(tmp_path / "cache.json", "math") == attention.Pinned(
        "math", {}, {"cudnn": "needs a GPU", "efficient": "needs a GPU"}
    )
    assert not calls


def test_a_kernel_that_this_machine_lacks_is_replaced_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, flash=1.0, math=2.0)
    pinned = pin(tmp_path / "cache.json", "cudnn")
    assert pinned.backend == "flash"
    assert pinned.note == "attention: cudnn is off (needs a GPU), flash is used"


def test_a_kernel_that_gives_other_bits_is_none_for_deterministic_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = attention.run_backend, []

    def unsteady(name: str, inputs: Any) -> tuple[torch.Tensor, ...]:
        calls.append(name)
        return tuple(g + len(calls) * (name == "flash") for g in run(name, inputs))

    monkeypatch.setattr(attention, "run_backend", unsteady)
    measure(monkeypatch, flash=1.0, math=2.0)
    assert pin(tmp_path / "cache.json").backend == "flash"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    pinned = pin(tmp_path / "cache.json")
    assert pinned.backend == "math"
    assert pinned.refused["flash"] == "does not give the same bits twice"


def test_a_kernel_that_refuses_the_shape_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attention.run_backend

    def refusing(name: str, inputs: Any) -> tuple[torch.Tensor, ...]:
        if name == "flash":
            raise RuntimeError("No available kernel. Aborting execution.\nDetails")
        return run(name, inputs)

    monkeypatch.setattr(attention, "run_backend", refusing)
    pinned = pin(tmp_path / "cache.json")
    assert pinned.backend == "math"
    assert pinned.refused["flash"] == "No available kernel. Aborting execution."


def test_a_model_without_torchs_attention_is_left_alone() -> None:
    assert pin_for(build("convit_tiny"), 32, 4, "auto") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_kernel_of_the_gpu_agrees_with_fp64(tmp_path: Path) -> None:
    device, shape = torch.device("cuda"), Shape(1, 6, 197, 64)
    pinned = pin_attention("auto", shape, 8, torch.bfloat16, device, tmp_path / "cache.json")
    assert "math" in pinned.times_ms
    assert len(pinned.times_ms) > 1
    inputs = attention.random_inputs(shape, 8, torch.bfloat16, device)
    truth = attention.run_backend(
        "math",
        tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs),
    )
    errors = {
        name: [
            float((g - t).norm() / t.norm())
            for g, t in zip(attention.run_backend(name, inputs), truth, strict=True)
        ]
        for name in BACKENDS
        if name in pinned.times_ms
    }
    for name, values in errors.items():
        for value, plain in zip(values, errors["math"], strict=True):
            assert value <= max(3 * plain, 1e-2), (name, errors)
