"""Loading: what is live is known, what is missing has a reason, what is broken is an error."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from safer_fast.kernels import _library, native_status
from safer_fast.runtime.command import run
from tests.support.commands import refused

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh_status() -> Iterator[None]:
    """The status is worked out anew, and once more after the test."""
    _library.native_status.cache_clear()
    yield
    _library.native_status.cache_clear()


def run_python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in another Python, without the environment variable of the library unless given."""
    inherited = {name: os.environ[name] for name in os.environ if name != "SAFER_FAST_NATIVE"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def test_either_a_path_or_a_reason_is_given() -> None:
    status = native_status()
    assert (status.library is None) == bool(status.library_reason)
    assert (status.triton is None) == bool(status.triton_reason)


def test_the_native_library_serves_the_cpu_where_it_is_built() -> None:
    names = ["linf_step_", "l2_step_", "sum_squares", "perturb_", "restore_"]
    served = [
        torch._C._dispatch_has_kernel_for_dispatch_key(f"safer_fast::{name}", "CPU")
        for name in names
    ]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    assert served == [native_status().library is not None or interpreted] * len(names)


@pytest.mark.slow
def test_switched_off_it_says_so_and_the_reference_runs() -> None:
    code = (
        "import torch, safer_fast.kernels as k; print(k.native_status().library_reason);"
        "print(k.sum_squares(torch.ones(3)).item())"
    )
    result = run_python(code, SAFER_FAST_NATIVE="0")
    assert result.stdout.split("\n")[:2] == ["switched off by SAFER_FAST_NATIVE=0", "3.0"], result


def test_a_missing_library_names_the_command(monkeypatch, tmp_path: Path, fresh_status) -> None:
    monkeypatch.delenv("SAFER_FAST_NATIVE", raising=False)
    monkeypatch.setattr(_library, "LIBRARY", tmp_path / "libsafer_fast_cpu.so")
    status = native_status()
    assert status.library is None
    assert status.library_reason == "not built: run `make native`"


def test_a_library_that_does_not_load_names_the_command(
    monkeypatch, tmp_path: Path, fresh_status
) -> None:
    broken = tmp_path / "libsafer_fast_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.delenv("SAFER_FAST_NATIVE", raising=False)
    monkeypatch.setattr(_library, "LIBRARY", broken)
    with pytest.raises(ImportError, match="does not load, rebuild it with `make native`"):
        native_status()


@pytest.mark.skipif(native_status().library is None, reason="the native library is not built")
def test_a_library_built_for_another_torch_names_both(monkeypatch) -> None:
    built_for = torch.__version__
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    with pytest.raises(ImportError) as raised:
        _library.load_library(_library.LIBRARY)
    assert f"was built for torch {built_for}, this is 1.0.0" in str(raised.value)
    assert "`make native`" in str(raised.value)


def test_a_command_with_such_a_library_ends_with_one_line(capsys) -> None:
    def main(words: object) -> None:
        raise ImportError("built for torch 1, this is 2: rebuild it", name="safer_fast.kernels")

    assert refused(main, [], capsys) == "error: built for torch 1, this is 2: rebuild it\n"
    with pytest.raises(ImportError, match="another"):
        run(lambda words: __import__("another_module"))


def test_without_triton_there_is_a_reason(monkeypatch, fresh_status) -> None:
    _library.find_triton.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status = native_status()
    _library.find_triton.cache_clear()
    assert (status.triton, status.triton_reason) == (None, "triton is not installed")


@pytest.mark.slow
def test_the_import_imports_no_triton() -> None:
    code = "import sys, safer_fast.kernels; print([n for n in sys.modules if n == 'triton'])"
    result = run_python(code)
    assert result.stdout.strip() == "[]", result


def test_imported_under_its_folder_name_it_names_the_right_one() -> None:
    result = run_python("import sys; sys.path.insert(0, '.'); import kernels")
    assert result.returncode != 0
    assert "this package is safer_fast.kernels, not kernels" in result.stderr.splitlines()[-1]
