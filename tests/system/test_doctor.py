"""The doctor: says what is live, gives a remedy for what is not, and never fails itself."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from safer_fast.config.schema import DataConfig
from safer_fast.data import Data, trial
from safer_fast.data.trial import check_dali, check_data
from safer_fast.doctor import main
from safer_fast.runtime import attention, fast_paths, machine
from safer_fast.runtime.diagnosis import table, without_home
from safer_fast.runtime.fast_paths import OPTIONAL, Check, check_disk, diagnose
from safer_fast.runtime.machine import describe_machine
from tests.support.kills import Server
from tests.support.pictures import encode, photo

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
    "apex",
    "cpu threads",
    *OPTIONAL,
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two classes of small images."""
    for number in range(24):
        (tmp_path / f"{number % 2}").mkdir(exist_ok=True)
        file = tmp_path / f"{number % 2}" / f"{number:02}.png"
        file.write_bytes(encode(photo(32, 32, number), "png"))
    return tmp_path


def check(name: str) -> Check:
    return next(item for item in diagnose() if item.name == name)


def test_every_check_has_its_place_and_everything_off_a_remedy() -> None:
    checks = [*diagnose(), check_dali()]
    assert [item.name for item in checks] == [*NAMES, "dali"]
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


def test_json_has_the_machine_and_the_same_checks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in printed["checks"]] == [*NAMES, "dali", "disk"]
    assert set(printed["checks"][0]) == {"name", "is_live", "detail", "remedy"}
    assert printed["machine"]["packages"]["torch"] == version("torch")
    assert set(printed["machine"]) == set(describe_machine())


def test_the_command_prints_a_block_for_an_issue_and_ends_with_status_0() -> None:
    words = [sys.executable, "-m", "safer_fast.doctor"]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    lines = result.stdout.strip().split("\n")
    assert lines[0] == "```text"
    assert lines[-1] == "```"
    assert torch.__version__ in result.stdout
    for word in (str(Path.home()), platform.node()):
        assert f"{word}/" not in result.stdout


def test_flags_that_are_wrong_are_named(server: Server) -> None:
    result = server.run("-m", "safer_fast.doctor", "--data.backend", "floppy")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --data.backend: expected one of auto, dali")


def test_the_home_of_the_user_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    assert without_home("in /home/somebody/x and /srv") == "in ~/x and /srv"
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert without_home("in /srv") == "in /srv"


def test_a_checkout_is_named_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    file = tmp_path / "safer_fast" / "runtime" / "machine.py"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    words = [*git, "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setattr(machine, "__file__", str(file))
    assert describe_machine()["safer_fast"].endswith(f", commit {commit}")
    file.write_text("2\n")
    assert describe_machine()["safer_fast"].endswith(f", commit {commit} with changes")


def test_driver_and_memory_of_a_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(name="NVIDIA T", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79 * 2**30, 80 * 2**30))
    monkeypatch.setattr(machine, "_output", lambda *words: "550.54.14")
    found = describe_machine()
    assert found["gpus"] == ["NVIDIA T, 80.0 GiB, 79.0 GiB free, compute capability 9.0"]
    assert found["cuda"].endswith("driver 550.54.14")


def test_a_package_that_is_missing_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(fast_paths, "version", missing)
    found = fast_paths._optional("onnx", OPTIONAL["onnx"])
    assert not found.is_live
    assert found.remedy == "only for export --format onnx: pip install onnx"


def test_data_is_opened_and_decoded_by_every_backend(pictures: Path) -> None:
    checks = list(check_data(DataConfig(path=str(pictures), num_workers=0), 8))
    assert [item.name for item in checks] == [
        "data",
        "data by device",
        "data by dali",
        "data by torch",
    ]
    assert "2 classes" in checks[0].detail
    for item in checks[1:]:
        assert item.is_live or item.name == "data by dali", item
        assert not item.is_live or item.detail.startswith("first of "), item
    only = list(check_data(DataConfig(path=str(pictures), num_workers=0, backend="torch"), 8))
    assert [item.name for item in only] == ["data", "data by torch"]


def test_data_that_does_not_open_has_a_remedy(tmp_path: Path) -> None:
    [found] = check_data(DataConfig(path=str(tmp_path / "nowhere")), 8)
    assert not found.is_live
    assert "nowhere" in found.detail
    assert found.remedy


def test_a_backend_that_fails_is_reported_and_the_others_are_tried(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = trial._load

    def failing(config: DataConfig, batch_size: int) -> Data:
        if config.backend == "device":
            raise RuntimeError("no\nroom")
        return load(config, batch_size)

    monkeypatch.setattr(trial, "_load", failing)
    found = check_data(DataConfig(path=str(pictures), num_workers=0), 8)
    checks = {item.name: item for item in found}
    assert checks["data by device"].detail == "no room"
    assert checks["data by device"].remedy
    assert checks["data by torch"].is_live


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


def test_attention_on_a_gpu_names_the_generations_that_come_in_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def usable(*case: Any) -> tuple[list[str], dict[str, str]]:
        *_, device, names = case
        assert device.type == "cuda"
        return ["flash", "math"], {name: "is not installed" for name in names if name[:2] == "fa"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "usable_backends", usable)
    found = fast_paths._attention()
    assert found.detail == "flash, math work (fa3: is not installed; fa4: is not installed)"


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
    monkeypatch.setattr(fast_paths, "find_spec", {"apex": apex}.get)
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
    monkeypatch.setattr(fast_paths, "_PROBE", "#include <no_such_header.h>\n")
    assert "no_such_header.h" in check("torch.compile").detail


def test_too_few_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_paths, "num_usable_cores", lambda: 4 * torch.get_num_threads())
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
    monkeypatch.setattr(fast_paths, "_cpu_flags", lambda: {"avx2"})
    assert check("bf16").remedy == "train with --amp off"
    monkeypatch.setattr(fast_paths, "_cpu_flags", lambda: {"avx2", "amx_bf16"})
    assert check("bf16").is_live


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert check_disk(str(tmp_path / "not" / "there")).detail.endswith("not/there")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(fast_paths, "_LEAST_DISK_GIB", 10**9)
    found = check_disk(None)
    assert not found.is_live
    assert found.detail.endswith("the current folder")


def test_a_slow_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_paths, "_write_speed", lambda _: 3.0)
    found = check_disk(None)
    assert not found.is_live
    assert "3 MiB/s" in found.detail


def test_a_folder_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fast_paths, "_write_speed", refuse)
    assert check_disk("out").detail == "out cannot be written: Permission denied"
    assert check_disk("out").remedy
