"""The picture of a run: layer map and attacked images, by the command, on a run of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from safer_fast import report
from tests.support import small_runs
from tests.support.commands import refused


def test_a_run_is_drawn_and_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_runs.run(tmp_path / "run", *small_runs.TINY)
    file = tmp_path / "run.png"
    report.main([str(run), "--picture", str(file)])
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
        assert len(picture.getcolors(2**24) or ()) > 50
    assert file.stat().st_size < 300_000
    capsys.readouterr()
    wrong = {
        "run.jpg": "--picture: expected a .png file, got",
        "no/run.png": "--picture: expected",
    }
    for name, message in wrong.items():
        words = [str(run), "--picture", str(tmp_path / name)]
        assert message in refused(report.main, words, capsys)
    words = [str(run), str(run), "--picture", str(file)]
    assert "--picture: expected one run, got 2" in refused(report.main, words, capsys)
    (run / "gallery.safetensors").unlink()
    words = [str(run), "--picture", str(file)]
    assert "--picture: expected a run with a gallery" in refused(report.main, words, capsys)
