"""Limits and failures of the machine end a run in one line; no image is left out for them."""

from __future__ import annotations

import errno
import os
import resource
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from safer_fast import train_model
from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import DataConfig
from safer_fast.data import load_data, reading
from safer_fast.data.bad_images import BadImages
from safer_fast.data.formats import EncodedSource, open_splits
from safer_fast.data.formats.parts import FileParts
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.training.trainer import Trainer
from tests.support.kills import Server
from tests.support.pictures import encode, photo
from tests.support.plain_sets import write_npz, write_parquet, write_tar

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

NUM_SHARDS = 70
JPEGS = [encode(photo(24, 24, seed), "jpeg") for seed in range(12)]
TINY = [
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 16, num_heads: 1}",
    "--model.patch_size=8",
    "--data.image_size=24",
    "--data.bad_images=skip",
    "--data.num_workers=0",
    "--attack.steps=1",
    "--selection.warmup_epochs=1",
    "--evaluation.attacks=clean",
    "--evaluation.steps=1",
    "--evaluation.sentinel_images=0",
    "--runtime.num_threads=1",
]
LIMITED = """
import resource, sys
from safer_fast.runtime.command import run
from safer_fast.train import main
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
run(main)
"""


def folder_of(path: Path, *extra: str) -> Path:
    """A folder of JPEGs; `extra` become links to the memory of this process, which fail to read."""
    for number, image in enumerate(JPEGS):
        file = path / "ab"[number % 2] / f"{number:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    for name in extra:
        (path / name).symlink_to("/proc/self/mem")
    return path


def fail(path: Path, **settings: Any) -> str:
    """The line that an epoch ends with although bad images are to be skipped."""
    defaults: dict[str, Any] = {"num_workers": 0, "image_size": 24, "augmentation": "none"}
    config = DataConfig(path=str(path), bad_images="skip", **(defaults | settings))
    with pytest.raises(ValueError, match=r"^[a-z_.]+: expected [^\n]+, got [^\n]+$") as caught:
        list(load_data(config, batch_size=2, seed=0, report=pytest.fail).train.epoch(1))
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_shards_train_whole_where_few_files_may_be_open(
    server: Server, tmp_path: Path, backend: str
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    (tmp_path / "set").mkdir()
    for number in range(NUM_SHARDS):
        write_tar(tmp_path / f"set/{number:03}.tar", JPEGS[:2], b"%d" % (number % 2))
    words = [f"--data.path={tmp_path / 'set'}", f"--output={tmp_path / 'run'}", "--epochs=2"]
    words += [f"--data.backend={backend}", "--batch-size=60", *TINY]
    done = server.run("-c", LIMITED, *words)
    assert done.returncode == 0, done.stderr
    events = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [event["skipped_images"] for event in events if event["event"] == "epoch"] == [0, 0]
    assert "left out" not in done.stdout + done.stderr


def test_images_that_wait_hold_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    for number in range(40):
        write_tar(tmp_path / f"{number:02}.tar", [JPEGS[number % 12]])
    (source,) = open_splits(str(tmp_path), "data.path").values()
    assert isinstance(source, EncodedSource)
    before = len(os.listdir("/proc/self/fd"))
    waiting = [source.encoded(row) for row in (*range(40), *range(40))]
    assert len(os.listdir("/proc/self/fd")) - before <= 4
    assert [image.tobytes() for image in waiting] == [JPEGS[row % 12] for row in range(40)] * 2
    del source
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_kept_open_give_way_where_none_may_be_opened(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(8)]
    for file in files:
        file.write_bytes(file.name.encode() * 3)
    parts = FileParts(files, "data.path")
    assert parts.read(0, 1, 2).tobytes() == b"00"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    others: list[int] = []
    try:
        while True:
            try:
                others.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        assert parts.read(7, 0, 3).tobytes() == b"777"
        parts.close()
        others.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(ValueError, match=r"ulimit -n allows [0-9]+ open files: raise it"):
            parts.read(1, 0, 3)
    finally:
        for descriptor in others:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("settings", [
    {"backend": "device"},
    {"backend": "torch"},
    {"backend": "torch", "num_workers": 2},
    {"backend": "dali"},
])  # fmt: skip
def test_a_disk_that_fails_is_no_bad_image(tmp_path: Path, settings: dict[str, Any]) -> None:
    if settings["backend"] == "dali":
        pytest.importorskip("nvidia.dali")
    message = fail(folder_of(tmp_path, *(f"a/{number}.png" for number in range(9))), **settings)
    assert message.startswith("data.path: expected data that this machine can read, got Input/outp")
    assert f": {tmp_path / 'a'}" in message
    assert message.endswith("repair the disk or network, then resume with --resume)")


FORMATS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda path: folder_of(path / "set"),
    "parquet": lambda path: write_parquet(path / "a.parquet", JPEGS, np.arange(12) % 2),
    "tar": lambda path: write_tar(path / "a.tar", JPEGS),
}
ERRORS: dict[str, tuple[BaseException, str]] = {
    "EMFILE": (OSError(errno.EMFILE, "x"), "got Too many open files: "),
    "ENFILE": (OSError(errno.ENFILE, "x"), "(the system's limit fs.file-max: raise it"),
    "ENOMEM": (OSError(errno.ENOMEM, "x"), "GiB of memory, less by ulimit -v or a container"),
    "MemoryError": (MemoryError(), "GiB of memory, less by ulimit -v or a container"),
    "ENOSPC": (OSError(errno.ENOSPC, "x"), "make room"),
    "ESTALE": (OSError(errno.ESTALE, "x"), "got Stale file handle: "),
}


@pytest.mark.parametrize("backend", ["device", "torch", "dali"])
@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS.keys())
def test_errors_of_the_machine_are_never_bad_images(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], Path],
    backend: str,
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    path = make(tmp_path)
    (source,) = open_splits(str(path), "data.path").values()
    original = type(source).encoded  # type: ignore[attr-defined]
    for error, expected in ERRORS.values():

        def failing(self: Any, row: int, error: BaseException = error) -> Any:
            if row == 5:
                raise error
            return original(self, row)

        monkeypatch.setattr(type(source), "encoded", failing)
        assert expected in fail(path, backend=backend)


def test_memory_that_ends_in_a_worker_process_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(reading, "fit", failing)
    message = fail(folder_of(tmp_path), backend="torch", num_workers=1)
    assert "got Cannot allocate memory: a batch with" in message


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_errors_of_the_machine_are_no_damage_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: tuple[BaseException, str]
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise error[0]

    write_npz(tmp_path / "a.npz")
    for name in ("tar", "parquet"):
        FORMATS[name](tmp_path)
    monkeypatch.setattr(tarfile.TarFile, "next", failing)
    monkeypatch.setattr(np, "load", failing)
    monkeypatch.setattr(pq, "read_metadata", failing)
    for name in ("a.tar", "a.npz", "a.parquet"):
        assert error[1] in fail(tmp_path / name)


def test_what_libraries_hide_behind_errors_of_their_own_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match="got Input/output error: ") as caught:
        open_splits(str(tmp_path / "a.tar"), "data.path", BadImages("skip", pytest.fail))
    assert str(caught.value).count(":") >= 2


def test_a_file_that_vanishes_is_no_bad_image_and_a_link_to_nowhere_is(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set")
    write_tar(tmp_path / "a.tar", JPEGS)
    (folder / "a/nowhere.jpg").symlink_to(tmp_path / "nowhere")
    lines: list[str] = []
    config = DataConfig(bad_images="skip", num_workers=0, backend="torch", image_size=24)
    sources = {}
    for path in (folder, tmp_path / "a.tar"):
        config.path = str(path)
        sources[path] = load_data(config, batch_size=2, seed=0, report=lines.append).train
        list(sources[path].epoch(1))
    assert len(lines) == 1
    assert "nowhere.jpg" in lines[0]
    for file in (folder / "a/04.jpg", folder / "b/05.jpg", tmp_path / "a.tar"):
        file.unlink()
    sources[tmp_path / "a.tar"].source.parts.close()  # type: ignore[attr-defined]
    for loader in sources.values():
        with pytest.raises(ValueError, match=r"the files that were there at the start, got"):
            list(loader.epoch(2))


def test_a_shard_that_was_cut_short_meanwhile_is_no_bad_image(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", JPEGS)
    (source,) = open_splits(str(file), "data.path").values()
    source.read(11)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match="as it was at the start, got a shorter file"):
        source.read(11)


def test_an_epoch_without_images_ends_a_run_before_checkpoints_are_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, take_step = folder_of(tmp_path / "set"), Trainer.take_step
    kept: list[set[str]] = []

    def checkpoints() -> set[str]:
        return {path.name for path in (tmp_path / "run/checkpoints").iterdir()}

    def taking(self: Trainer, epoch: int, index: int, *rest: Any) -> float:
        if (epoch, index) == (2, 0):
            self.saver.wait()
            kept.append(checkpoints())
        if epoch == 1 and index + 1 == rest[0]:
            for file in folder.glob("*/*.jpg"):
                file.write_bytes(b"no image")
        return take_step(self, epoch, index, *rest)

    monkeypatch.setattr(Trainer, "take_step", taking)
    words = [f"--data.path={folder}", f"--output={tmp_path / 'run'}", "--epochs=3", *TINY]
    words += ["--data.backend=torch", "--batch-size=2", "--checkpoint.every_steps=1"]
    words += [f"--data.validation_path={folder_of(tmp_path / 'other')}"]
    with pytest.raises(ValueError, match=r"^data\.path: expected an image .* got none of 12; "):
        train_model(parse_config(words))
    assert checkpoints() == kept[0]
