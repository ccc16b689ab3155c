"""The doctor: says what is live, gives a remedy for what is not, and never fails itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from safer_fast import attention, doctor
from safer_fast.doctor import Check, diagnose, main, table

NAMES = [
    "python",
    "torch",
    "gpu",
    "timm",
    "native library",
    "triton",
    "torch.compile",
    "cuda graphs",
    "attention",
    "bf16",
    "dali",
    "apex",
    "cpu threads",
    "disk",
]


def check(name: str) -> Check:
    return next(item for item in diagnose() if item.name == name)


def test_every_check_has_its_place_and_everything_off_a_remedy() -> None:
    checks = diagnose()
    assert [item.name for item in checks] == NAMES
    assert [item.name for item in checks if not item.detail] == []
    assert [item.name for item in checks if not item.is_live and not item.remedy] == []


def test_the_text_is_aligned_with_remedies_below() -> None:
    checks = [Check("gpu", False, "none", "buy one"), Check("native library", True, "there")]
    assert table(checks).splitlines() == [
        "gpu             off   none",
        "                      remedy: buy one",
        "native library  live  there",
    ]
    assert max(map(len, table([replace(checks[0], remedy="word " * 50)]).splitlines())) <= 100


def test_json_has_the_same_checks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in printed] == NAMES
    assert set(printed[0]) == {"name", "is_live", "detail", "remedy"}


def test_the_command_ends_with_status_0() -> None:
    words = [sys.executable, "-m", "safer_fast.doctor"]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert torch.__version__ in result.stdout


def test_attention_names_the_kernels_that_work_and_why_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = check("attention")
    assert found.is_live
    assert found.detail == "flash, math work (cudnn: needs a GPU; efficient: needs a GPU)"
    refused = dict.fromkeys(("flash", "cudnn", "efficient"), "too old")
    monkeypatch.setattr(attention, "usable_backends", lambda *case: (["math"], refused))
    found = check("attention")
    assert not found.is_live
    assert found.detail.startswith("math work (flash: too old; ")
    assert found.remedy


def test_attention_on_a_device_that_fails_is_reported_and_not_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*case: object) -> None:
        raise RuntimeError("CUDA out of memory.\nDetails")

    monkeypatch.setattr(attention, "usable_backends", fail)
    assert check("attention") == Check("attention", False, "CUDA out of memory.", "see gpu")


def test_a_package_named_apex_without_the_kernels_is_not_taken_for_apex(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apex = ModuleType("apex")
    monkeypatch.setitem(sys.modules, "amp_C", None)
    monkeypatch.setattr(doctor, "find_spec", {"apex": apex}.get)
    found = check("apex")
    assert not found.is_live
    assert "not NVIDIA's fused kernels" in found.detail
    assert found.remedy is not None
    assert found.remedy.startswith("pip uninstall apex")


def test_apex_is_live_where_its_extension_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", ModuleType("amp_C"))
    assert check("apex").is_live


@pytest.mark.parametrize(
    ("compiler", "complaint"), [("/no/such/compiler", "No such file"), ("false", "exit status 1")]
)
def test_a_compiler_that_does_not_work_is_not_live(
    monkeypatch: pytest.MonkeyPatch, compiler: str, complaint: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    found = check("torch.compile")
    assert not found.is_live
    assert complaint in found.detail


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert check("torch.compile").detail == "no C++ compiler"


def test_headers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor, "_PROBE", "#include <no_such_header.h>\n")
    assert "no_such_header.h" in check("torch.compile").detail


def test_too_few_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_num_usable_cores", lambda: 4 * torch.get_num_threads())
    found = check("cpu threads")
    assert not found.is_live
    assert "OMP_NUM_THREADS" in (found.remedy or "")


def test_a_native_library_that_does_not_load_is_reported_and_not_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "safer_fast.kernels", None)
    found = check("native library")
    assert not found.is_live
    assert "make native" in (found.remedy or "")


def test_a_cpu_without_bfloat16_is_told_to_train_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: {"avx2"})
    assert check("bf16").remedy == "train with --amp off"
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: {"avx2", "amx_bf16"})
    assert check("bf16").is_live


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LEAST_DISK_GIB", 10**9)
    assert not check("disk").is_live
