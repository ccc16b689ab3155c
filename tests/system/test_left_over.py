"""A run whose folder is deleted ends with an error; a killed export leaves nothing for ever."""

import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from safer_fast import export
from safer_fast.runtime.command import run as run_command
from tests.support.kills import Moment, Server
from tests.support.ranks import Team, assert_status


def move(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def delete(folder: Path) -> None:
    """Delete the folder under another name: nothing is written in it meanwhile."""
    gone = folder.with_name("gone")
    folder.rename(gone)
    shutil.rmtree(gone)


@pytest.mark.parametrize(
    ("act", "function", "call"),
    [
        (delete, "safer_fast.training.step.Step.update", 5),
        (delete, "safer_fast.training.checkpointing.load_tensors", 1),
        (move, "safer_fast.training.step.Step.update", 18),
    ],
)
def test_a_run_whose_folder_is_gone_ends_with_an_error(
    act: Callable[[Path], None],
    function: str,
    call: int,
    server: Server,
    flags: list[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    moment = Moment(function, call, is_after=True, act=partial(act, folder))
    ending = server.train(folder, flags, moment)
    assert (ending.status, ending.errors) == (
        2,
        f"error: {folder}: expected the run folder, which was deleted or moved meanwhile: the run "
        "ends\n",
    )
    assert not (folder / "model.safetensors").exists()


def export_in_a_process(words: list[str], moment: Moment) -> None:
    moment.arm()
    sys.argv = ["export", *words]
    run_command(export.main)


def wait_for_word(folder: Path) -> None:
    (folder / "waits").touch()
    deadline = time.monotonic() + 60
    while not (folder / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


def test_what_a_killed_export_left_goes_with_the_next_and_nothing_of_a_live_one(
    finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    others = {".export-mine-abcdefgh", ".export-hub", ".export-x-abcdefgh.unfinished"}
    *folders, link = sorted(others)
    for name in folders:
        (run / name).mkdir()
    (run / link).symlink_to(tmp_path)
    save = "safer_fast.models.weights_file.save_weights"
    pause = Moment(save, is_after=True, act=partial(wait_for_word, tmp_path))
    live = Team(1, export_in_a_process, [str(run), "--format=timm"], pause)
    while not (tmp_path / "waits").exists():
        time.sleep(0.01)
    (its,) = hidden(run) - others
    words = [str(run), "--format=hub"]
    (killed,) = Team(1, export_in_a_process, words, Moment(save, is_after=True)).endings()
    assert killed.status == -signal.SIGKILL
    (left,) = hidden(run) - others - {its}
    assert (run / left / "model.safetensors").is_file()
    export.main(words)
    assert hidden(run) == {*others, its}
    (tmp_path / "go").touch()
    assert_status(0, live.endings())
    assert hidden(run) == others
    for name in ("export-timm", "export-hub"):
        assert (run / name / "model.safetensors").is_file()
