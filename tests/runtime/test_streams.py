"""Runs outlive whoever reads their output; commands that only print end without a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from safer_fast.runs.folder import load_run
from safer_fast.runs.loggers.metrics_file import read_metrics

FLAGS = [
    "--data.path=digits",
    "--data.max_images=100",
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 16, num_heads: 2}",
    "--model.patch_size=4",
    "--batch-size=50",
    "--epochs=1",
    "--selection.warmup_epochs=0",
    "--attack.steps=1",
    "--evaluation.attacks=clean",
    "--evaluation.max_images=10",
    "--evaluation.sentinel_images=0",
    "--runtime.device=cpu",
    "--runtime.num_threads=1",
]


def command(name: str, *words: str, closed: str = "", lost: str = "") -> tuple[int, str]:
    """The status of a command and all that can be read of it.

    closed: how a shell closes streams. lost: those that are a pipe without a reader.
    """
    reader, writer = os.pipe()
    os.close(reader)
    streams = {name: writer if name in lost else subprocess.PIPE for name in ("stdout", "stderr")}
    # pytest ignores SIGPIPE as Python does, and a shell keeps that up
    line = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", f"safer_fast.{name}"]
    try:
        ended = subprocess.run([*line, *words], text=True, timeout=120, check=False, **streams)
    finally:
        os.close(writer)
    return ended.returncode, (ended.stdout or "") + (ended.stderr or "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained without any stream."""
    folder = tmp_path_factory.mktemp("closed") / "run"
    ending = command("train", *FLAGS, f"--output={folder}", closed="<&- >&- 2>&-")
    assert ending == (0, "")
    return folder


@pytest.mark.slow
def test_a_run_without_streams_is_whole(run: Path) -> None:
    assert [event["event"] for event in read_metrics(run / "metrics.jsonl")][-1] == "end"
    assert (run / "report.html").is_file()
    assert load_run(run, device="cpu").weights == run / "model.safetensors"


@pytest.mark.slow
def test_training_and_evaluation_go_on_without_a_reader(run: Path, tmp_path: Path) -> None:
    words = [*FLAGS, f"--output={tmp_path / 'run'}"]
    assert command("train", *words, lost="stdout stderr") == (0, "")
    kinds = [
        [e["event"] for e in read_metrics(f / "metrics.jsonl")] for f in (run, tmp_path / "run")
    ]
    assert kinds[0] == kinds[1]
    words = [str(tmp_path / "run"), "--attacks=clean,fgsm", "--device=cpu"]
    assert command("evaluate", *words, lost="stdout") == (0, "")
    *_, clean, fgsm = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (clean["attack"], fgsm["attack"]) == ("clean", "fgsm")


@pytest.mark.slow
def test_what_only_prints_ends_without_a_word_as_by_sigpipe(run: Path) -> None:
    assert command("export", str(run), lost="stdout") == (141, "")
    assert (run / "export-timm" / "model.safetensors").is_file()
    assert command("report", "--help", lost="stdout") == (141, "")


@pytest.mark.slow
def test_mistakes_keep_their_status(tmp_path: Path) -> None:
    assert command("export", str(tmp_path), closed="2>&-") == (2, "")
    # report refuses a folder before it imports anything large
    for words in ({"closed": "2>&-"}, {"lost": "stderr"}, {"lost": "stdout stderr"}):
        assert command("report", str(tmp_path), **words) == (2, "")
    status, said = command("report", str(tmp_path), lost="stdout")
    assert status == 2
    assert said.startswith(f"error: {tmp_path}: expected a run folder")
