"""The package as users get it: sdist and wheel away from the source tree, one program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from safer_fast import __main__, __version__
from safer_fast.kernels import native_status

ROOT = Path(__file__).parents[2]
SOURCES = ("safer_fast", "kernels", "docs", "setup.py", "pyproject.toml", "MANIFEST.in")
TINY = [
    "--data.max_images=32",
    "--batch-size=16",
    "--epochs=1",
    "--selection.warmup_epochs=0",
    "--attack.clean_epochs=0",
    "--attack.epsilon_warmup_epochs=0",
    "--selection.num_images=8",
    "--evaluation.max_images=8",
    "--evaluation.sentinel_images=0",
    "--evaluation.attacks=clean",
    "--attack.steps=1",
    "--model.arguments={depth: 1, embed_dim: 12, num_heads: 1}",
    "--runtime.num_threads=1",
]


def run(words: Sequence[object], folder: Path, **variables: str) -> str:
    """Standard output of a program that ends well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def make_sdist(folder: Path) -> Path:
    """An sdist of the source tree, which stays as it is, unpacked."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in (*SOURCES, *(path.name for path in ROOT.glob("*.md")), "LICENSE", "CITATION.cff"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    run([sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('..')"], tree)
    (packed,) = folder.glob("safer_fast-*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    return unpacked


def make_wheel(source: Path, folder: Path, **variables: str) -> tuple[Path, str]:
    """The wheel that pip builds of a source tree, and what pip prints."""
    words = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "."]
    printed = run([*words, "--wheel-dir", folder], source, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel, printed


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel, which sees the libraries of this one; its programs."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # no .pth file of a folder that one names is read: the editable installation stays out
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    run([*pip, "--no-deps", "--no-index", "--no-compile", wheel], folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdist(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with a wheel that was built without the native library."""
    folder = tmp_path_factory.mktemp("plain")
    wheel, printed = make_wheel(source, folder / "wheels", SAFER_FAST_NATIVE="0")
    assert wheel.name == f"safer_fast-{__version__}-py3-none-any.whl"
    assert len(printed.splitlines()) < 15, printed  # no screens of warnings
    return install(wheel, folder / "environment")


@pytest.mark.slow
def test_a_wheel_runs_where_there_is_no_source_tree(plain: Path, tmp_path: Path) -> None:
    program = plain / "safer-fast"
    assert run([program, "--version"], tmp_path) == f"safer_fast {__version__}\n"
    where = "import safer_fast.kernels as k; print(k.__file__)"
    assert Path(run([plain / "python", "-c", where], tmp_path).strip()).is_relative_to(plain.parent)
    run([program, "train", *TINY, "--output", "run"], tmp_path)
    assert (tmp_path / "run" / "report.html").is_file()
    assert "usage: safer-fast evaluate RUN" in run([program, "evaluate", "--help"], tmp_path)
    shown = run([plain / "python", "-m", "safer_fast", "--version"], tmp_path)
    assert shown == f"safer_fast {__version__}\n"


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A search path with a CMake that has the library of this installation in place of building it.

    CMake and compiler run when this project is installed for its tests, by the same function.
    """
    if native_status().library is None:
        pytest.skip("no native library to give away")
    cmake = tmp_path / "tools" / "cmake"
    cmake.parent.mkdir()
    copy = f'mkdir -p "$2" && cp {native_status().library} "$2"/'
    cmake.write_text(f'#!/bin/sh\nif [ "$1" = --build ]; then {copy}; fi\n')
    cmake.chmod(0o755)
    return f"{cmake.parent}:{os.environ['PATH']}"


@pytest.mark.slow
def test_the_doctor_of_a_wheel_builds_its_library_and_pip_removes_it(
    plain: Path, tmp_path: Path, path: str
) -> None:
    program = plain / "safer-fast"
    lines = run([program, "doctor"], tmp_path).splitlines()
    row = next(number for number, line in enumerate(lines) if line.startswith("native library"))
    assert "off" in lines[row]
    assert "remedy: safer-fast doctor --build-native" in lines[row + 1]
    shown = run([program, "doctor", "--build-native"], tmp_path, PATH=path).splitlines()
    assert next(line for line in shown if line.startswith("native library")).split()[2] == "live"
    (site,) = plain.parent.glob("lib/python*/site-packages")
    kernels = site / "safer_fast" / "kernels"
    assert (kernels / "libsafer_fast_cpu.so").is_file()
    for source in (ROOT / "kernels").rglob("*"):  # what CMake needs
        if source.suffix in (".cpp", ".h", ".txt"):
            assert (kernels / source.relative_to(ROOT / "kernels")).is_file(), source
    pip = [sys.executable, "-m", "pip", "--python", plain / "python", "uninstall", "--yes"]
    run([*pip, "safer_fast"], tmp_path)
    assert [file for file in site.rglob("safer_fast*") if file.is_file()] == []
    assert [file for file in site.rglob("libsafer_fast*") if file.is_file()] == []


@pytest.mark.slow
def test_a_wheel_that_is_built_beside_torch_holds_the_native_library(
    source: Path, tmp_path: Path, path: str
) -> None:
    wheel, _ = make_wheel(source, tmp_path / "wheels", PATH=path)
    assert wheel.name.startswith(f"safer_fast-{__version__}-py3-none-linux")
    programs = install(wheel, tmp_path / "environment")
    asked = "import safer_fast.kernels as k; print(k.native_status().library)"
    found = run([programs / "python", "-c", asked], tmp_path).strip()
    assert Path(found).is_relative_to(tmp_path / "environment")


def test_the_program_names_its_commands_and_the_nearest_of_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["safer-fast"])
    __main__.main()
    shown = capsys.readouterr().out
    for name in __main__.COMMANDS:
        assert f"\n  {name} " in shown
    monkeypatch.setattr(sys, "argv", ["safer-fast", "evalute", "RUN"])
    with pytest.raises(SystemExit) as exit_:
        __main__.main()
    assert exit_.value.code == 2
    assert "got evalute, did you mean evaluate?\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_every_command_tells_the_version(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["safer-fast", name, "--version"])
    with pytest.raises(SystemExit) as exit_:
        __main__.main()
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"safer_fast {__version__}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("safer-fast tr", ["train"]),
        ("safer-fast train --ba", ["--batch-size"]),
        ("safer-fast train --attack.step", ["--attack.steps", "--attack.step_size"]),
        ("safer-fast train --attac", None),
        ("safer-fast train --amp ", ["off", "bf16"]),
        ("safer-fast train --config dig", ["digits"]),
        ("safer-fast evaluate RUN --am", ["--amp"]),
    ],
)
def test_a_shell_completes_commands_flags_and_choices(
    line: str, words: list[str] | None, tmp_path: Path
) -> None:
    pytest.importorskip("argcomplete")
    code = "import os, sys; os.dup2(1, 8); from safer_fast.__main__ import main; main()"
    shown = run(
        [sys.executable, "-c", code],
        tmp_path,
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_IFS="\n",
        _ARGCOMPLETE_SUPPRESS_SPACE="1",
        COMP_LINE=line,
        COMP_POINT=str(len(line)),
        COMP_TYPE="9",
    ).split()
    if words is None:  # flags of the group, not the group
        assert "--attack" not in shown
        assert "--attack.norm" in shown
    else:
        assert shown == words


def test_the_paper_is_cited_with_the_software() -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Gopal",
        "Yang",
        "Horton",
        "Chen",
    ]
    assert any(item["value"] == "2501.01529" for item in paper["identifiers"]), paper
