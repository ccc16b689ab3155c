"""Runs that were killed and folders that nobody may write: one line, with a way out."""

import errno
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from safer_fast import evaluate, evaluate_run, export, load_model, report, select
from tests.support.commands import refused
from tests.support.kills import Moment, Server

UPDATE = Moment("safer_fast.training.step.Step.update")
WRITTEN = Moment("safer_fast.runs.checkpoints.folder.CheckpointFolder._prune")  # comes right after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "state", "word"),
    [
        (UPDATE, "without a checkpoint yet", "begin"),
        (WRITTEN, "whose newest checkpoint is step-", "resume"),
    ],
    ids=["none", "one"],
)
def test_a_run_that_was_killed_says_how_far_it_came_and_how_it_ends(
    moment: Moment, state: str, word: str, server: Server, flags: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert server.train(run, flags, moment).status < 0
    for ask in (load_model, evaluate_run):
        with pytest.raises(
            ValueError, match=f"^run: expected a run that has ended, got {run}, {state}"
        ) as told:
            ask(run)
    ending = server.command("evaluate", run)
    begun, _, words = ending.errors.rstrip().partition(f"unless it still trains, {word} it with ")
    assert ending.status == 2
    assert begun.startswith(f"error: RUN: expected a run that has ended, got {run}, {state}")
    assert words.startswith("python -m safer_fast.train --config ")
    assert words in str(told.value)  # from Python too
    again = server.run(*shlex.split(words)[1:])
    assert again.returncode == 0, again.stderr
    assert load_model(run).class_names


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("command", "words", "line"),
    [
        (evaluate.main, ["--attacks=clean"], "RUN: {}; make it writable, or evaluate a copy of it"),
        (report.main, [], "--output: {}; give a file elsewhere"),
        (select.main, [], "--output: {}; give a file elsewhere"),
        (export.main, [], "--output: {}; give a folder elsewhere"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_before_the_work(
    command: Any,
    words: list[str],
    line: str,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    expected = f"expected a folder that can be written, got {finished} (Read-only file system)"
    assert refused(command, [str(finished), *words], capsys) == f"error: {line.format(expected)}\n"
