"""Links that somebody planted in a run folder lead no writer out of it."""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from safer_fast import evaluate, report, select
from safer_fast.runtime.files import NotPlainError, open_plain, write_new, write_whole
from tests.support.kills import Moment, Server

Main = Callable[[Sequence[str]], None]


@pytest.fixture(scope="module")
def killed(once: Any, server: Server, flags: list[str]) -> Path:
    """A run that was killed when it was about to export its weights."""

    def train(folder: Path) -> None:
        kill = Moment("safer_fast.training.results.export_model")
        assert server.train(folder, flags, kill).status == -signal.SIGKILL

    return Path(once("killed-before-export", train))


def plant(run: Path, names: Sequence[str], outside: Path) -> None:
    """Links of these names, each to a precious file and to one that is not there, side by side."""
    outside.mkdir()
    for name in names:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / name)
        (outside / name).write_text("precious")
        (outside / name).chmod(0o644)


WRITTEN = ["model.safetensors", "config.json", "gallery.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("is_temporary", [False, True])
@pytest.mark.parametrize("has_target", [False, True])
def test_a_run_that_goes_on_writes_through_no_link(
    is_temporary: bool,
    has_target: bool,
    server: Server,
    flags: list[str],
    killed: Path,
    tmp_path: Path,
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(killed, run)
    names = [f"{name}.tmp" for name in WRITTEN] if is_temporary else WRITTEN
    plant(run, names, outside)
    if not has_target:
        for name in names:
            (outside / name).unlink()
    ending = server.train(run, flags)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    left = {path.name: path.read_text() for path in outside.iterdir()}
    assert left == (dict.fromkeys(names, "precious") if has_target else {})
    assert not any(path.is_symlink() for path in run.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "run.lock", "checkpoints", "evaluation"])
@pytest.mark.parametrize("has_target", [False, True])
def test_what_grows_in_a_folder_is_refused_where_it_is_a_link(
    name: str,
    has_target: bool,
    server: Server,
    flags: list[str],
    killed: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    is_evaluated = name in ("metrics.jsonl", "evaluation")
    shutil.copytree(finished if is_evaluated else killed, run)
    outside.mkdir()
    if (run / name).exists():
        (run / name).rename(outside / name)
    elif has_target and name == "evaluation":
        (outside / name).mkdir()
    if not has_target and name == "metrics.jsonl":
        (outside / name).unlink()
    (run / name).symlink_to(outside / name)
    before = {str(path): path.is_file() and path.read_bytes() for path in outside.rglob("*")}
    if is_evaluated:
        with pytest.raises((ValueError, OSError)) as caught:
            evaluate.main([str(run), "--attacks=clean", "--device=cpu"])
        message = str(caught.value)
    else:
        ending = server.train(run, flags)
        assert (ending.status, ending.errors.count("\n")) == (2, 1)
        message = ending.errors
    assert f"{name}: expected a" in message or "can be locked" in message
    assert "link" in message or "symbolic" in message
    after = {str(path): path.is_file() and path.read_bytes() for path in outside.rglob("*")}
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "words", "names"),
    [
        (select.main, ["--num-images=8", "--plot"], ["selection.json", "selection.svg"]),
        (report.main, [], ["report.html"]),
    ],
)
def test_commands_write_through_no_link(
    main: Main, words: list[str], names: list[str], finished: Path, tmp_path: Path
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(finished, run)
    names = [*names, *(f"{name}.tmp" for name in names)]
    plant(run, names, outside)
    main([str(run), *words])
    left = {path.name: path.read_text() for path in outside.iterdir()}
    assert left == dict.fromkeys(names, "precious")
    assert not any(path.is_symlink() for path in run.iterdir())


def test_a_file_is_new_whole_and_plain(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"content")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileExistsError):
        write_new(path, [b""])
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "link", [b""])
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("link", "a link"), ("pipe", "another kind")):
        with pytest.raises(NotPlainError, match=f"/{name}: expected a plain file, got {kind}"):
            open_plain(tmp_path / name, os.O_RDWR)
    assert path.read_bytes() == b"new"
