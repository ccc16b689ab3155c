"""Attention runs on the kernel that is fastest for the model's shape, and stays on it."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from bench.studies import attention as bench
from safer_fast.models import attention as models_attention
from safer_fast.models.attention import attention_shape, pin_for
from safer_fast.runtime import attention
from safer_fast.runtime.attention import (
    Shape,
    fastest,
    pin_attention,
    random_inputs,
    run_backend,
    usable_backends,
)
from tests.support.networks import UNCUTTABLE, build

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
        (UNCUTTABLE, None),
    ],
)
def test_the_shape_is_that_of_the_models_attention(family: str, expected: Shape | None) -> None:
    assert attention_shape(build(family), 32) == expected


def test_a_last_block_for_one_token_does_not_set_the_shape() -> None:
    model = build()
    model.enable_savings(["patch-order", "class-token"], 32)
    assert attention_shape(model, 32) == Shape(1, 3, 17, 16)


def test_windows_and_the_bias_added_to_their_scores_are_part_of_the_shape() -> None:
    model = build("swin_tiny_patch4_window7_224")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    assert attention_shape(model, 32) == Shape(64, 1, 4, 24, is_masked=True)


def test_what_is_timed_lies_in_memory_as_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    strides: list[tuple[int, ...]] = []

    def watch(self: object, query: torch.Tensor, *rest: object, **named: object) -> None:
        strides.append(query.stride())

    monkeypatch.setattr(models_attention._Watch, "_add", watch)
    with models_attention._Watch():
        build()(torch.zeros(4, 3, 32, 32))
    query, *_, gradient = random_inputs(Shape(1, 3, 17, 16), 4, torch.float32, CPU)
    assert strides == 4 * [query.stride()]
    assert gradient.transpose(1, 2).is_contiguous()


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
        ({}, "math"),
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
    assert again.refused == {"cudnn": "needs a GPU", "efficient": "needs a GPU"}
    assert calls == [["flash", "math"]]
    assert pin(tmp_path / "new" / "cache.json", dtype=torch.bfloat16).backend == "flash"


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[1]", b'{"cpu": 3}', b'{"a": {"flash"', b'{"a": [{"math": "fast"}, {}]}'],
)
def test_a_damaged_memory_is_measured_anew_and_mended(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cache.json"
    file.write_bytes(content)
    calls = measure(monkeypatch, flash=2.0, math=1.0)
    assert [pin(file).backend for _ in range(2)] == ["math", "math"]
    assert len(calls) == 1
    refused = {"cudnn": "needs a GPU", "efficient": "needs a GPU"}
    assert list(json.loads(file.read_text()).values()) == [[{"flash": 2.0, "math": 1.0}, refused]]


def test_a_machine_that_has_measured_tries_no_kernel_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pin(tmp_path / "cache.json")
    monkeypatch.setattr(attention, "run_backend", pytest.fail)
    assert pin(tmp_path / "cache.json") == first


def test_what_another_run_wrote_meanwhile_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, flash=2.0, math=1.0)
    measured = attention._measure

    def slowly(*case: Any) -> attention.KernelTimings:
        monkeypatch.setattr(attention, "_measure", measured)
        assert pin(tmp_path / "cache.json").backend == "math"
        return attention.KernelTimings({"flash": 1.0, "math": 2.0}, {})

    monkeypatch.setattr(attention, "_measure", slowly)
    assert pin(tmp_path / "cache.json").backend == "math"


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


def test_a_user_without_a_home_measures_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", home)
    calls = measure(monkeypatch, flash=1.0, math=2.0)
    for _ in range(2):
        assert pin_attention("auto", SHAPE, 4, torch.float32, CPU).backend == "flash"
    assert len(calls) == 2


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
    assert pin(tmp_path / "cache.json", "math") == attention.Pinned("math", {}, {})
    assert not calls


def test_a_kernel_that_this_machine_lacks_is_replaced_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, flash=1.0, math=2.0)
    pinned = pin(tmp_path / "cache.json", "cudnn")
    assert pinned.backend == "flash"
    assert pinned.note == "attention: cudnn is off (needs a GPU), flash is used"


def test_a_kernel_that_is_wanted_is_replaced_even_if_it_worked_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, flash=1.0, math=2.0)
    assert pin(tmp_path / "cache.json").backend == "flash"
    refuse(monkeypatch, "flash", "out of memory")
    pinned = pin(tmp_path / "cache.json", "flash")
    assert pinned.backend == "math"
    assert pinned.note == "attention: flash is off (out of memory), math is used"


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


def refuse(monkeypatch: pytest.MonkeyPatch, refused: str, reason: str) -> None:
    """The kernel fails from now on."""
    run = attention.run_backend

    def refusing(name: str, inputs: Any) -> tuple[torch.Tensor, ...]:
        if name == refused:
            raise RuntimeError(reason)
        return run(name, inputs)

    monkeypatch.setattr(attention, "run_backend", refusing)


def test_where_only_plain_products_work_a_note_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "flash", "No available kernel. Aborting execution.\nDetails")
    pinned = pin(tmp_path / "cache.json")
    assert pinned.backend == "math"
    assert pinned.note == (
        "attention: plain products, as no other kernel works (flash: No available kernel. "
        "Aborting execution.; cudnn: needs a GPU; efficient: needs a GPU)"
    )
    assert pin(tmp_path / "cache.json") == pinned


def test_a_process_in_which_nothing_works_goes_on_with_plain_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "flash", "out of memory")
    refuse(monkeypatch, "math", "out of memory")
    assert pin(tmp_path / "cache.json").backend == "math"


def test_the_reason_is_the_one_that_torch_tells_of_this_kernel() -> None:
    query, key, value, gradient = random_inputs(SHAPE, 4, torch.float32, CPU)
    narrow = value[..., :8].detach().requires_grad_()
    reason = attention._refusal("flash", (query, key, narrow, gradient[..., :8]))
    assert reason is not None
    assert reason.startswith("Flash attention requires q,k,v to have the same last dimension.")
    assert "Triggered internally" not in reason


def test_reasons_against_kernels_that_were_switched_off_are_left_out() -> None:
    warned = [
        "Memory efficient kernel not used because: (Triggered internally at /sdp_utils.cpp:1.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at /a.h:2.)",
        "Flash attention kernel not used because: (Triggered internally at /sdp_utils.cpp:3.)",
        "Flash attention has been runtime disabled. (Triggered internally at /a.h:4.)",
        "cuDNN attention kernel not used because: (Triggered internally at /sdp_utils.cpp:5.)",
        "cuDNN SDPA is not deterministic. (Triggered internally at /sdp_utils.cpp:6.)",
    ]
    error = RuntimeError("No available kernel. Aborting execution.")
    assert attention._reason(error, warned) == "cuDNN SDPA is not deterministic."
    assert attention._reason(error, warned[:-1]) == "No available kernel. Aborting execution."
    assert attention._reason(RuntimeError("out of memory\nat"), warned) == "out of memory"


def test_a_model_without_torchs_attention_is_left_alone() -> None:
    assert pin_for(build("convit_tiny"), 32, 4, "auto") is None


def test_a_masked_shape_is_measured_with_a_mask(tmp_path: Path) -> None:
    shape = Shape(4, 2, 9, 16, is_masked=True)
    assert random_inputs(shape, 3, torch.float32, CPU)[4].shape == (1, 2, 9, 9)
    pinned = pin_attention("auto", shape, 3, torch.float32, CPU, tmp_path / "cache.json")
    assert set(pinned.times_ms) == {"flash", "math"}


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore")  # torch warns about slow kernels
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def test_every_kernel_repeats_and_is_nearly_as_near_to_fp64_as_plain_products(
    device: str, is_masked: bool
) -> None:
    case = (Shape(1, 6, 65, 64, is_masked), 4, torch.bfloat16, torch.device(device))
    usable, refused = usable_backends(*case)
    assert "math" in usable
    assert len(usable) > 1, refused
    inputs = random_inputs(*case)
    precise = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    truth = run_backend("math", tuple(precise))
    plain = errors(run_backend("math", inputs), truth)
    for name in usable:
        found = [run_backend(name, inputs) for _ in range(3)]
        assert all(torch.equal(*pair) for again in found for pair in zip(again, found[0]))  # noqa: B905
        of_output, *of_gradients = errors(found[0], truth)
        assert of_output <= 2 * plain[0], name
        for error, plain_error in zip(of_gradients, plain[1:], strict=True):
            assert error <= 3 * plain_error, (name, of_gradients, plain)


def errors(found: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]) -> list[float]:
    """Relative error of each tensor."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


def test_the_benchmark_has_a_row_for_every_kernel() -> None:
    case = bench.Case("small", SHAPE, gpu_batch=2, cpu_batch=2)
    rows = list(bench.rows_of(case, torch.bfloat16, False, CPU, 2))
    assert [row["implementation"] for row in rows] == ["flash", "math"]
    assert rows[0]["per_flash"] == 1
    assert {row["case"] for row in rows} == {"small, batch 2"}
    assert json.loads(json.dumps(rows)) == rows


def test_the_benchmark_compares_with_flash_only_where_flash_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse(monkeypatch, "flash", "out of memory")
    case = bench.Case("small", SHAPE, gpu_batch=2, cpu_batch=2)
    (row,) = bench.rows_of(case, torch.bfloat16, False, CPU, 2)
    assert row["implementation"] == "math"
    assert row["per_flash"] is None


# -- generations of flash attention from packages


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """FA3 and FA4 are installed and hooked in as names alone; names of those put in and out."""
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        pytest.skip("this PyTorch has no hooks for them")
    from torch.nn.attention import _registry

    happened: list[str] = []

    class Handle:
        def __init__(self, name: str) -> None:
            self.name = name
            happened.append(f"{name} in")

        def remove(self) -> None:
            happened.append(f"{self.name} out")

    hooks = {name: (lambda name=name: Handle(name)) for name in ("FA3", "FA4")}
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", hooks)
    monkeypatch.setattr(attention, "_is_installed", lambda name: True)
    yield happened
    attention.activate("flash")


def test_a_generation_is_active_until_another_kernel_is(generations: list[str]) -> None:
    for name in ("math", "fa3", "fa3", "fa4", "flash", "cudnn"):
        attention.activate(name)
    assert generations == ["FA3 in", "FA3 out", "FA4 in", "FA4 out"]


def test_the_fastest_generation_is_pinned_and_timed_like_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generations: list[str]
) -> None:
    monkeypatch.setattr(attention, "_candidates", lambda _: ["flash", "fa3", "fa4", "math"])
    monkeypatch.setattr(attention, "_refusal", lambda name, _: "of old" if name == "fa3" else None)
    calls = measure(monkeypatch, flash=1.0, fa4=0.5, math=2.0)
    pinned = pin(tmp_path / "cache.json")
    assert calls == [["flash", "fa4", "math"]]
    assert (pinned.backend, pinned.refused, pinned.note) == ("fa4", {"fa3": "of old"}, None)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.nn.attention.current_flash_attention_impl() == "FA4"
    assert pin(tmp_path / "cache.json") == pinned
    assert len(calls) == 1
    assert pin(tmp_path / "cache.json", "flash").backend == "flash"
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_a_generation_is_active_while_it_is_timed(generations: list[str]) -> None:
    inputs = random_inputs(SHAPE, 2, torch.float32, CPU)
    times = attention.time_backends(["flash", "fa4"], inputs)
    assert set(times) == {"flash", "fa4"}
    assert generations[:3] == ["FA4 in", "FA4 out", "FA4 in"]


def test_a_generation_that_is_not_installed_is_no_candidate_and_says_so() -> None:
    gpu = torch.device("cuda")
    assert attention._candidates(gpu) == ["flash", "cudnn", "efficient", "math"]
    inputs: Any = (SimpleNamespace(device=gpu),)
    assert attention._refusal("fa3", inputs) == "flash_attn_3 is not installed"
    assert attention._refusal("fa4", inputs) == "flash-attn-4 is not installed"
    assert attention._refusal("fa4", random_inputs(SHAPE, 2, torch.float32, CPU)) == "needs a GPU"


def test_a_generation_that_is_wanted_and_missing_is_replaced_with_a_note(tmp_path: Path) -> None:
    pinned = pin(tmp_path / "cache.json", "fa4")
    assert pinned.backend in ("flash", "math")
    assert pinned.note == f"attention: fa4 is off (needs a GPU), {pinned.backend} is used"


def test_a_package_is_found_without_being_imported_and_changes_what_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.syspath_prepend(tmp_path)
    case = (SHAPE, 4, torch.bfloat16, gpu)
    keys = [attention._key(*case)]
    (tmp_path / "flash_attn_interface.py").write_text("raise AssertionError")
    keys.append(attention._key(*case))
    folder = tmp_path / "flash_attn" / "cute"
    folder.mkdir(parents=True)
    assert not attention._is_installed("fa4")  # the package of FA2 alone
    (folder / "interface.py").write_text("raise AssertionError")
    importlib.invalidate_caches()
    assert attention._candidates(gpu) == ["flash", "fa3", "fa4", "cudnn", "efficient", "math"]
    keys.append(attention._key(*case))
    assert len(set(keys)) == 3
    assert all(key.startswith(keys[0].rpartition(" ")[0]) for key in keys)


def test_a_package_that_fails_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, generations: list[str]
) -> None:
    def fail(name: str) -> None:
        if name == "fa4":
            raise AssertionError("only for the latest GPUs\nDetails")

    monkeypatch.setattr(attention, "activate", fail)
    query, *rest = random_inputs(SHAPE, 2, torch.float32, CPU)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert attention._refusal("fa4", (on_gpu, *rest)) == "only for the latest GPUs"
    one, *others = attention._one_query((query, *rest))
    assert one.shape == (2, 2, 1, 16)
    assert [t.shape[2] for t in others] == [9, 9, 1]
