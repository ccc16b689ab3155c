"""A run that was stopped, killed or damaged resumes and ends bit for bit like one never stopped."""

from __future__ import annotations

import fcntl
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safer_fast import evaluate_run
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import EvaluateConfig
from safer_fast.config.schema import Names
from safer_fast.runs.checkpoints.file import read_checkpoint
from safer_fast.runs.checkpoints.folder import CheckpointFolder
from safer_fast.runs.folder import clear_run_folder
from safer_fast.runs.loggers import logger, tensorboard
from safer_fast.training.trainer import Trainer
from tests.support.kills import (
    BACKENDS,
    EPOCHS,
    STEPS_PER_EPOCH,
    WARMUP_EPOCHS,
    Ending,
    Moment,
    Patch,
    Server,
    State,
    checkpoints_of,
    flags_for,
    send,
)
from tests.support.reports import LAYER_MAP
from tests.system.soak import WITH_BATCH_NORMS, cut_in_half, flip_a_bit, soak

SELECTOR = "safer_fast.training.selecting.LayerSelector"
TRAINER, STEP = "safer_fast.training.trainer.Trainer", "safer_fast.training.step.Step"
FOLDER = "safer_fast.runs.checkpoints.folder.CheckpointFolder"
TERM, INT = partial(send, signal.SIGTERM), partial(send, signal.SIGINT)

Train = Callable[..., Ending]
"""(*changes, flags, backend) -> how it ended."""


class Twins:
    """Runs that nobody stops, one for each way to run."""

    def __init__(self, once: Any, server: Server, photos: Path, finished: Path) -> None:
        self.once, self.server, self.photos = once, server, photos
        self.folders = {("device",): finished}
        self.states: dict[tuple[str, ...], State] = {}

    def folder(self, *way: str) -> Path:
        """The folder of the run; way: the backend, and flags."""
        if way not in self.folders:
            name = f"twin-{'-'.join(way)}".replace("/", "_")
            self.folders[way] = self.once(name, partial(self._train, way))
        return self.folders[way]

    def state(self, *way: str) -> State:
        if way not in self.states:
            self.states[way] = State.of(self.folder(*way))
        return self.states[way]

    def _train(self, way: tuple[str, ...], folder: Path) -> None:
        ending = self.server.train(folder, flags_for(self.photos, *way))
        assert (ending.status, ending.errors) == (0, ""), ending.output


@pytest.fixture(scope="module")
def twins(once: Any, server: Server, photos: Path, finished: Path) -> Twins:
    return Twins(once, server, photos, finished)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return str(request.param)


@pytest.fixture
def train(server: Server, photos: Path, tmp_path: Path) -> Train:
    """Start or resume the run of the test."""

    def train(
        *changes: Moment | Patch, flags: tuple[str, ...] = (), backend: str = "device"
    ) -> Ending:
        return server.train(tmp_path / "run", flags_for(photos, backend, *flags), *changes)

    return train


@pytest.fixture
def ends_alike(train: Train, twins: Twins, tmp_path: Path) -> Train:
    """Resume the run of the test to its end, and compare it with its twin."""

    def ends_alike(
        *changes: Moment | Patch,
        flags: tuple[str, ...] = (),
        free: tuple[str, ...] = (),
        backend: str = "device",
    ) -> Ending:
        ending = train(*changes, flags=(*flags, *free), backend=backend)
        assert (ending.status, ending.errors) == (0, ""), ending.output
        assert State.of(tmp_path / "run").differences(twins.state(backend, *flags)) == []
        return ending

    return ends_alike


def and_wait(hand_over: Callable[..., None]) -> Callable[..., None]:
    """Let training wait for the writer, so that there is a checkpoint of each step."""

    def hand_over_and_wait(self: CheckpointFolder, write: Callable[[], None]) -> None:
        hand_over(self, write)
        self.wait()

    return hand_over_and_wait


EACH_STEP = Patch(f"{FOLDER}._enqueue", and_wait)


def half_a_file(sync: Callable[[int], None]) -> Callable[[int], None]:
    """End the process when half of a file is written."""

    def cut(file: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
            os.truncate(file, os.fstat(file).st_size // 2)
            send(signal.SIGKILL)
        sync(file)

    return cut


def half_a_line(_: object) -> Callable[..., None]:
    """End the process when half of a line is written."""

    def append(self: Any, line: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(line[: len(line) // 2])
        send(signal.SIGKILL)

    return append


KILLS: dict[str, list[Moment | Patch]] = {
    "before there is a checkpoint": [
        Moment("safer_fast.training.setup.save_config"),
        Moment("safer_fast.training.setup.save_config", is_after=True),
        Moment("safer_fast.runs.loggers.run_log.RunLog.write", is_after=True),
        Moment("pathlib.Path.unlink", call=1, is_after=True),
        Moment("pathlib.Path.mkdir", call=3, is_after=True),
        Moment("pathlib.Path.unlink", call=2, is_after=True),
        Patch("os.fsync", half_a_file),
        Moment("os.replace"),
        Moment("os.replace", call=2),
        Moment("shutil.rmtree", is_after=True),
        Moment("os.replace", call=2),
    ],
    "in warm-up": [
        Moment(f"{STEP}.update", call=2),
        Moment(f"{STEP}.update", call=2, is_after=True),
        Moment("safer_fast.training.optimizers.AveragedWeights.update", call=2, is_after=True),
        Moment(f"{TRAINER}._log_step", call=2),
        Moment(f"{TRAINER}._log_step", call=2, is_after=True),
        Moment(f"{TRAINER}.begin_epoch", call=2),
        Moment(f"{TRAINER}.begin_epoch", call=2, is_after=True),
    ],
    "in evaluation": [
        Moment("safer_fast.evaluation.batch.BatchEvaluator.measure", call=3),
        Moment(f"{TRAINER}._keep_best"),
        Moment(f"{TRAINER}._keep_best", is_after=True),
        Moment("os.link", call=2),
        Moment("os.link", call=2, is_after=True),
        Moment(f"{TRAINER}.end_epoch", is_after=True),
    ],
    "between the stages": [
        Moment(f"{TRAINER}._start_safer"),
        Moment(f"{TRAINER}._log_final_accuracies", is_after=True),
        Moment(f"{FOLDER}.save_companion"),
        Moment(f"{TRAINER}._start_safer", is_after=True),
        Moment("safer_fast.selection.inputs.store_mean_gradients"),
        Moment("safer_fast.selection.sharpness.loss_rises"),
        Moment("safer_fast.selection.sharpness.restore_", call=3),
        Moment(f"{SELECTOR}.select", is_after=True),
        Moment(f"{SELECTOR}.changes"),
        Moment(f"{TRAINER}.begin_epoch", is_after=True),
    ],
    "in SAFER": [
        Moment(f"{STEP}.ascend", call=2),
        Moment(f"{STEP}.ascend", call=2, is_after=True),
        Moment(f"{STEP}.update", call=2, is_after=True),
        Moment(f"{SELECTOR}.select", call=1),
        Moment(f"{TRAINER}.choose", call=1, is_after=True),
        Moment(f"{STEP}.update", call=2),
        Moment(f"{SELECTOR}.select", call=1, is_after=True),
    ],
    "while checkpoints are written": [
        Moment(f"{FOLDER}._write_checkpoint", call=3),
        Patch("os.fsync", half_a_file),
        *(Moment("os.fsync", call) for call in (7, 8, 9, 10)),
        Moment("os.replace", call=4),
        Moment("os.replace", call=4, is_after=True),
        Moment(f"{FOLDER}._prune", call=3),
        Moment(f"{FOLDER}._prune", call=3, is_after=True),
        *(Moment("pathlib.Path.unlink", call) for call in (4, 5, 6, 7)),
    ],
    "while lines are written": [
        Patch("safer_fast.runs.loggers.metrics_file.MetricsFile.append", half_a_line),
        Moment("safer_fast.runs.loggers.metrics_file.MetricsFile._write", call=3),
        Moment("safer_fast.runs.loggers.tensorboard.EventFile.add", call=3),
        Moment("safer_fast.runs.loggers.tensorboard.EventFile.add", call=3, is_after=True),
        Moment("safer_fast.runs.loggers.metrics_log.truncate_to"),
        Moment("os.truncate", is_after=True),
        Moment("safer_fast.runs.loggers.tensorboard._new_path"),
        Moment("safer_fast.runs.loggers.tensorboard._new_path", is_after=True),
        Moment("tensorboard.summary.writer.record_writer.RecordWriter.write", call=2),
        Moment("tensorboard.summary.writer.record_writer.RecordWriter.write", call=9),
        Moment("safer_fast.training.setup.RunLog", is_after=True),
    ],
    "at the end": [
        Moment(f"{TRAINER}.finish"),
        Moment("safer_fast.training.validation.Validator.final_accuracies", call=1),
        Moment("safer_fast.training.validation.Validator.final_accuracies", call=2),
        Moment(f"{TRAINER}._log_final_accuracies", call=2, is_after=True),
        Moment("safer_fast.models.weights_file.save_weights", is_after=True),
        Moment("safer_fast.runtime.files.save_json"),
        Moment("safer_fast.runtime.files.save_json", is_after=True),
        Moment("safer_fast.training.results.export_model", is_after=True),
        Moment("safer_fast.training.results.write_report"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("theme", KILLS)
def test_a_run_killed_at_chosen_moments_ends_like_one_never_stopped(
    theme: str, train: Train, ends_alike: Train
) -> None:
    for moment in KILLS[theme]:
        ending = train(EACH_STEP, moment)
        assert (ending.status, ending.errors) == (-signal.SIGKILL, ""), (moment, ending.output)
    ends_alike(EACH_STEP)


def test_a_run_of_growing_images_killed_at_each_size_ends_like_one_never_stopped(
    train: Train, ends_alike: Train, twins: Twins
) -> None:
    flags = ("--data.resolution_schedule=8@0.6,12",)  # the first three of five epochs
    for moment in (
        Moment(f"{STEP}.update", call=2),
        Moment(f"{STEP}.update", call=9, is_after=True),
        Moment(f"{TRAINER}.begin_epoch", call=2),  # of the first epoch of larger images
        Moment(f"{STEP}.ascend", is_after=True),
        Moment(f"{STEP}.update", call=2, is_after=True),
    ):
        ending = train(EACH_STEP, moment, flags=flags)
        assert (ending.status, ending.errors) == (-signal.SIGKILL, ""), (moment, ending.output)
    ends_alike(EACH_STEP, flags=flags)
    grown, alike = twins.state("device", *flags), twins.state("device")
    assert grown.differences(alike)
    folders = [twins.folder("device", *ways) for ways in ((), flags)]
    shapes = [
        {name: value.shape for name, value in load_file(folder / "model.safetensors").items()}
        for folder in folders
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("peft") is None, reason="no peft here")
def test_a_run_of_factors_and_magnitudes_killed_in_safer_ends_like_one_never_stopped(
    train: Train, ends_alike: Train
) -> None:
    adapter = ("--selection.lora_rank=2", "--selection.adapter=dora")
    flags = (*adapter, "--optim.ema_decay=null", "--amp=bf16")
    for moment in (
        Moment(f"{SELECTOR}.select", is_after=True),
        Moment(f"{STEP}.ascend", call=2, is_after=True),
        Moment(f"{STEP}.update", call=5),  # after the next selection, with new factors
    ):
        ending = train(EACH_STEP, moment, flags=flags)
        assert (ending.status, ending.errors) == (-signal.SIGKILL, ""), (moment, ending.output)
    ends_alike(EACH_STEP, flags=flags)


def test_a_run_killed_at_random_times_ends_like_one_never_stopped(
    backend: str, server: Server, photos: Path, ends_alike: Train, tmp_path: Path
) -> None:
    draw = random.Random(backend)
    for _ in range(4):
        training = server.start(tmp_path / "run", flags_for(photos, backend))
        time.sleep(draw.uniform(0.3, 1.5))
        training.send(signal.SIGKILL)
        assert training.ending().errors == ""
    ends_alike(backend=backend)


def test_a_run_against_auto_pgd_comes_back(train: Train, ends_alike: Train) -> None:
    flags = ("--attack.name=apgd", "--attack.steps=3")
    kill = Moment(f"{STEP}.update", WARMUP_EPOCHS * STEPS_PER_EPOCH + 2)
    assert train(EACH_STEP, kill, flags=flags).status == -signal.SIGKILL
    ends_alike(flags=flags)


def test_momentum_of_muon_comes_back(train: Train, ends_alike: Train) -> None:
    flags = ("--optim.name=muon",)
    for call in (STEPS_PER_EPOCH + 2, WARMUP_EPOCHS * STEPS_PER_EPOCH):
        kill = Moment(f"{STEP}.update", call)
        assert train(EACH_STEP, kill, flags=flags).status == -signal.SIGKILL
    ends_alike(flags=flags)


def test_statistics_of_batch_norms_come_back(train: Train, ends_alike: Train) -> None:
    for call in (STEPS_PER_EPOCH + 2, WARMUP_EPOCHS * STEPS_PER_EPOCH):
        kill = Moment(f"{STEP}.update", call)
        assert train(EACH_STEP, kill, flags=WITH_BATCH_NORMS).status == -signal.SIGKILL
    ends_alike(flags=WITH_BATCH_NORMS)


def test_extra_images_come_in_the_same_batches(
    backend: str, photos: Path, train: Train, ends_alike: Train
) -> None:
    flags = (f"--data.extra_path={photos}", "--data.extra_fraction=0.5")
    for call in (STEPS_PER_EPOCH + 2, WARMUP_EPOCHS * STEPS_PER_EPOCH):
        kill = Moment(f"{STEP}.update", call)
        ending = train(EACH_STEP, kill, flags=flags, backend=backend)
        assert ending.status == -signal.SIGKILL
    ends_alike(flags=flags, backend=backend)
    assert re.search(r"training \(and \d+ extra, \d+% of each batch\)", ending.output)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_a_run_on_a_gpu_that_is_killed_ends_like_one_never_stopped(
    graphs: str, backend: str, train: Train, ends_alike: Train
) -> None:
    flags = ("--runtime.device=cuda", f"--runtime.cuda_graph={graphs}", "--amp=bf16")
    for call in (3, 2, 7, 2):
        kill = Moment(f"{STEP}.__call__", call, is_after=True)
        assert train(kill, flags=flags, backend=backend).status == -signal.SIGKILL
    ends_alike(flags=flags, backend=backend)


@pytest.mark.slow
def test_runs_outlive_kills_signals_and_damage_again_and_again(tmp_path: Path) -> None:
    figures = soak(8, seed=0, place=tmp_path)
    print("\n".join(figures.lines(0)))
    assert figures.num_finished >= 1  # the last one is left alone until it ends
    assert figures.failures == []


def test_a_resumed_run_writes_checkpoints_at_once(train: Train, tmp_path: Path) -> None:
    ending = train(EACH_STEP, Moment(f"{STEP}.ascend", call=2))
    before = checkpoints_of(tmp_path / "run")[-1]
    ending = train(EACH_STEP, Moment(f"{STEP}.update", call=2))
    after = checkpoints_of(tmp_path / "run")[-1]
    assert int(after.stem[-8:]) == int(before.stem[-8:]) + 1, ending.output
    assert read_checkpoint(after).needs == read_checkpoint(before).needs
    assert after.stat().st_size == pytest.approx(before.stat().st_size, rel=0.05)


def test_a_run_killed_while_its_first_best_weights_get_their_name_begins_again(
    train: Train, ends_alike: Train, tmp_path: Path
) -> None:
    ending = train(Moment("os.link", is_after=True), flags=("--checkpoint.every_steps=1000",))
    assert ending.status == -signal.SIGKILL
    assert (tmp_path / "run" / "best.safetensors.tmp").exists()
    ends_alike()


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_folder_that_was_half_cleared_is_still_known_as_that_of_a_run(
    is_reversed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterdir, unlink = Path.iterdir, Path.unlink
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(iterdir(self), reverse=is_reversed))
    own = ["best.safetensors", "best.safetensors.tmp", "events.out.tfevents.1", "run.yaml"]
    for num_removed in range(len(own)):
        for name in own:
            (tmp_path / name).touch()
        left = num_removed

        def remove_some(path: Path) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            unlink(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", remove_some)
            with pytest.raises(KeyboardInterrupt):
                clear_run_folder(tmp_path)
        clear_run_folder(tmp_path)
        assert list(tmp_path.iterdir()) == []


# When, which signal, and the step at which the run stops.
STOPS: list[tuple[Moment | Patch, signal.Signals, int]] = [
    (Moment(f"{TRAINER}.begin_epoch", act=TERM), signal.SIGTERM, 0),
    (Moment(f"{STEP}.update", call=3, act=INT), signal.SIGINT, 3),
    (Moment(f"{TRAINER}._log_step", call=1, is_after=True, act=TERM), signal.SIGTERM, 4),
    (
        Moment("safer_fast.evaluation.batch.BatchEvaluator.measure", call=1, act=INT),
        signal.SIGINT,
        4,
    ),
    (Moment(f"{TRAINER}._keep_best", is_after=True, act=TERM), signal.SIGTERM, 4),
    (Moment(f"{TRAINER}._log_final_accuracies", call=1, act=INT), signal.SIGINT, 8),
    (Moment(f"{TRAINER}._start_safer", is_after=True, act=TERM), signal.SIGTERM, 8),
    (Moment("safer_fast.selection.sharpness.loss_rises", act=INT), signal.SIGINT, 8),
    (
        Moment(f"{SELECTOR}.select", is_after=True, act=TERM),
        signal.SIGTERM,
        8,
    ),
    (Moment(f"{STEP}.ascend", call=3, act=INT), signal.SIGINT, 11),
    (Moment("safer_fast.selection.sharpness.restore_", call=2, act=TERM), signal.SIGTERM, 12),
    (Moment(f"{TRAINER}._log_final_accuracies", call=1, act=INT), signal.SIGINT, 20),
    (Moment(f"{TRAINER}._log_final_accuracies", call=2, act=TERM), signal.SIGTERM, 20),
]


def test_a_run_that_is_asked_to_stop_does_so_where_it_is_and_goes_on_from_there(
    train: Train, ends_alike: Train, tmp_path: Path
) -> None:
    for moment, number, step in STOPS:
        status, output, errors = train(moment)
        assert (status, errors) == (128 + number, ""), (moment, output)
        newest = checkpoints_of(tmp_path / "run")[-1]
        assert int(newest.stem[-8:]) == read_checkpoint(newest).step == step, moment
        assert output.splitlines()[-1] == (
            f"{number.name}: stopped after step {step}; the same command with --output "
            f"{tmp_path / 'run'} --resume auto resumes from {newest}"
        )
    ends_alike()


def test_a_run_that_is_asked_to_stop_when_it_is_all_but_done_ends_as_usual(
    ends_alike: Train,
) -> None:
    ends_alike(Moment("safer_fast.training.results.export_model", act=TERM))


@pytest.mark.parametrize(
    "moment", [f"{STEP}.update", "safer_fast.training.checkpointing.Saver.wait"]
)
def test_a_second_signal_ends_a_run_at_once(moment: str, train: Train, ends_alike: Train) -> None:
    first = Moment(f"{STEP}.update", call=7, act=INT)
    second = Moment(moment, call=7 if moment.endswith("update") else 1, is_after=True, act=TERM)
    status, output, errors = train(first, second)
    assert (status, errors) == (128 + signal.SIGTERM, "")
    assert "stopped" not in output
    ends_alike()


def stuck(update: Callable[..., None]) -> Callable[..., None]:
    def late(*arguments: Any) -> None:
        send(signal.SIGTERM)
        time.sleep(60)
        update(*arguments)

    return late


def test_a_run_that_cannot_stop_in_time_says_so_and_ends(train: Train, ends_alike: Train) -> None:
    before = time.monotonic()
    ending = train(Patch(f"{STEP}.update", stuck), flags=("--checkpoint.grace_s=0.5",))
    line = "error: SIGTERM: not at its next checkpoint within checkpoint.grace_s=0.5\n"
    assert (ending.status, ending.errors) == (128 + signal.SIGTERM, line)
    assert time.monotonic() - before < 20
    ends_alike()


@pytest.fixture(scope="module")
def stopped(once: Any, server: Server, flags: list[str]) -> Path:
    """A run that was stopped at the end of its first epoch of SAFER, with two checkpoints."""
    at = WARMUP_EPOCHS + 1

    def train(folder: Path) -> None:
        moment = Moment(f"{TRAINER}._keep_best", call=at, act=TERM)
        ending = server.train(folder, flags, EACH_STEP, moment)
        assert ending.status == 128 + signal.SIGTERM, ending

    folder = Path(once("stopped-after-an-epoch-of-safer", train))
    steps = [read_checkpoint(path).step for path in checkpoints_of(folder)]
    assert steps == [at * STEPS_PER_EPOCH - 1, at * STEPS_PER_EPOCH]
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """The test's own copy of it; best.safetensors is a name of one of its checkpoints' files."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    best = max((folder / "checkpoints").glob("best-*"))
    (folder / "best.safetensors").unlink()
    (folder / "best.safetensors").hardlink_to(best)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_settings_that_change_the_result_are_refused_in_one_line(run: Path, train: Train) -> None:
    before = contents(run)
    others = ("--epochs=9", "--sam.rho=0.1", "--optim.ema_decay=null", "--data.mixup=0.3")
    status, _, errors = train(flags=(*others, "--checkpoint.keep=5"))
    assert (status, errors) == (
        2,
        "error: --resume: expected the settings of the run: epochs 5, not 9; data.mixup 0.2, not "
        "0.3; sam.rho 0.05, not 0.1; optim.ema_decay 0.8, not null\n",
    )
    assert contents(run) == before


def test_settings_that_change_nothing_may_change(
    run: Path, photos: Path, ends_alike: Train, tmp_path: Path
) -> None:
    moved = shutil.copytree(photos, tmp_path / "moved")
    data = (f"--data.path={moved}", "--data.num_workers=0", "--data.prefetch=1")
    checkpoint = ("--checkpoint.keep=1", "--checkpoint.every_steps=4", "--checkpoint.grace_s=3")
    ending = ends_alike(free=(*data, *checkpoint, "--runtime.max_skipped_steps=3"))
    assert "other rounding" not in ending.output
    assert len(checkpoints_of(run)) == 1


def test_the_configuration_in_the_folder_is_that_of_the_run(
    run: Path, server: Server, twins: Twins
) -> None:
    ending = server.train(run, ["--config", str(run / "run.yaml"), "--resume=must"])
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert State.of(run).differences(twins.state("device")) == []


@pytest.mark.usefixtures("run")
def test_another_machine_may_round_otherwise_and_that_is_said(train: Train) -> None:
    stop = Moment(f"{TRAINER}.begin_epoch", act=TERM)
    status, output, errors = train(stop, flags=("--runtime.num_threads=2", "--runtime.compile=off"))
    assert (status, errors) == (128 + signal.SIGTERM, "")
    assert [line for line in output.splitlines() if "other rounding" in line] == [
        "note:       resumed with other rounding: runtime.compile auto, not off",
        "note:       resumed with other rounding: runtime.num_threads 1, not 2",
        "note:       resumed with other rounding: threads 1, now 2",
    ]
    assert f"stopped after step {(WARMUP_EPOCHS + 1) * STEPS_PER_EPOCH}" in output


def test_other_data_is_refused_in_one_line(
    run: Path, photos: Path, train: Train, tmp_path: Path
) -> None:
    before = contents(run)
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "train" / "a" / "1.png").rename(other / "train" / "b" / "other.png")
    for flag in (f"--data.path={other}", "--data.backend=torch"):
        status, _, errors = train(flags=(flag,))
        assert status == 2
        assert re.match(
            r"error: --data\.\w+: expected the data of the run that is resumed \(\w+\), "
            r"got other data \(\w+\)\n$",
            errors,
        )
    assert contents(run) == before


def test_a_finished_run_says_so_and_stays_as_it_is(
    train: Train, ends_alike: Train, run: Path
) -> None:
    ends_alike()
    before = contents(run)
    for how in ("auto", "must"):
        ending = train(flags=(f"--resume={how}",))
        assert ending == (0, f"finished already; report: {run / 'report.html'}\n", "")
    assert contents(run) == before
    status, output, errors = train(flags=("--epochs=9", "--runtime.compile=off"))
    assert (status, output) == (2, "")
    assert errors.startswith("error: --resume: expected the settings of the run: epochs ")
    assert errors.endswith(", not 9\n")
    assert errors.count("\n") == 1
    assert contents(run) == before


@pytest.mark.parametrize("how", ["never", "must", "auto"])
def test_folders_that_are_no_run_are_left_alone(how: str, train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    ending = train(flags=(f"--resume={how}",))
    expected = (
        f"error: --output: expected a new or empty folder, got {folder}, which is not empty\n"
    )
    if how == "must":
        expected = f"error: --resume: expected a run with checkpoints for must, got {folder}\n"
    assert ending == (2, "", expected)
    assert contents(folder) == {"thesis.txt": b"mine"}


def test_a_used_folder_is_refused_by_those_who_do_not_resume(train: Train, run: Path) -> None:
    before = contents(run)
    ending = train(flags=("--resume=never",))
    expected = f"error: --output: expected a new or empty folder, got {run}, which is not empty\n"
    assert ending == (2, "", expected)
    assert contents(run) == before


def test_nothing_is_resumed_from_nothing(train: Train, tmp_path: Path) -> None:
    ending = train(flags=("--resume=must",))
    run = tmp_path / "run"
    assert ending == (
        2,
        "",
        f"error: --resume: expected a run with checkpoints for must, got {run}\n",
    )
    assert not run.exists()
    with pytest.raises(ValueError, match=r"^--resume: expected --output"):
        parse_config(["--resume", "auto"])


def test_a_new_and_an_empty_folder_are_where_a_run_begins(
    ends_alike: Train, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    ends_alike()


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit])
@pytest.mark.parametrize("kind", ["step", "best"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], None], kind: str, run: Path, ends_alike: Train
) -> None:
    before, newest = checkpoints_of(run)
    damaged = max((run / "checkpoints").glob(f"{kind}-*"))
    damage(damaged)
    output = ends_alike().output
    assert f"damaged checkpoint {newest}" in output
    assert str(damaged) in output
    assert f"resumed from {before}" in output
    assert newest.with_name(f"{newest.name}.damaged").exists()


def test_a_log_that_is_shorter_than_the_newest_checkpoint_knows_leads_to_the_one_before(
    run: Path, ends_alike: Train
) -> None:
    before, newest = checkpoints_of(run)
    size = read_checkpoint(before).state["progress"]["metrics_size"]
    os.truncate(run / "metrics.jsonl", size + 10)
    output = ends_alike().output
    assert f"damaged checkpoint {newest}: it needs" in output
    assert f"resumed from {before}" in output


@pytest.mark.parametrize("kind", ["step", "start"])
def test_where_no_checkpoint_is_whole_nothing_is_touched(
    kind: str, run: Path, train: Train
) -> None:
    for path in (run / "checkpoints").glob(f"{kind}-*"):
        flip_a_bit(path)
    before = contents(run)
    ending = train()
    assert ending.status == 2
    folder = run / "checkpoints"
    assert ending.errors.startswith(f"error: {folder}: no checkpoint can be used; the newest: ")
    assert ending.errors.count("\n") == 1
    assert contents(run) == before


def test_lines_of_a_lost_future_are_gone_after_a_resume(run: Path, ends_alike: Train) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "epoch": 5, "step": 22, "time_s": 1.0, "loss": 9.0}\n{"ev')
    ends_alike()


def test_checkpoints_of_safer_hold_what_has_moved_and_bring_back_all(
    train: Train, ends_alike: Train, tmp_path: Path
) -> None:
    larger = "--model.arguments={depth: 4, embed_dim: 64, num_heads: 4}"
    flags = (larger, "--selection.fraction=0.1")
    late = Moment(f"{STEP}.ascend", call=2 * STEPS_PER_EPOCH + 2)
    ending = train(EACH_STEP, late, flags=(*flags, "--checkpoint.keep=100"))
    assert ending.status == -signal.SIGKILL
    sizes: dict[bool, list[int]] = {True: [], False: []}
    selections = set()
    for path in checkpoints_of(tmp_path / "run"):
        progress = read_checkpoint(path).state["progress"]
        sizes[progress["start_file"] is not None].append(path.stat().st_size)
        selections.add(tuple(progress["selected"] or ()))
    whole, partial_ = min(sizes[False]), max(sizes[True])
    print(f"checkpoints of warm-up: {whole:,} bytes, of SAFER: at most {partial_:,}")
    assert len(selections) >= 3  # none, and two of SAFER
    assert partial_ < whole / 4
    ends_alike(flags=flags)


def limit_files(num_bytes: int) -> None:
    """Let no file of this process grow beyond that, as on a full disk."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))


FREE = partial(limit_files, resource.RLIM_INFINITY)


def fill_disk_with_maps() -> None:
    """Let no file grow beyond 60 kB, and write maps of layers in their real size."""
    for place in (logger, tensorboard):
        vars(place)["layer_map"] = LAYER_MAP
    limit_files(60_000)


def test_what_does_not_fit_on_the_disk_is_reported_and_training_goes_on(
    train: Train, twins: Twins, tmp_path: Path
) -> None:
    full = Moment(f"{STEP}.update", call=3, act=fill_disk_with_maps)
    status, output, errors = train(EACH_STEP, full)
    assert (status, errors) == (0, ""), output
    differences = State.of(tmp_path / "run").differences(twins.state("device"))
    assert [name.partition("[")[0] for name in differences] == ["scalars"]
    assert "event file cannot be written: File too large" in output  # maps take room
    assert output.count("was not written") == 1
    assert re.search(r"checkpoint at step [23] was not written: \S+: File too large; ", output)
    assert "writing checkpoints works again" in output  # those of SAFER are smaller


@pytest.mark.parametrize("epoch", [2, EPOCHS])
def test_a_disk_that_is_full_for_a_while_costs_nothing_but_the_curves(
    epoch: int, train: Train, twins: Twins, tmp_path: Path
) -> None:
    full = Moment(f"{TRAINER}._keep_best", call=epoch, act=partial(limit_files, 0))
    free = Moment(f"{TRAINER}.begin_epoch", call=epoch + 1, act=FREE)
    if epoch == EPOCHS:
        free = Moment(f"{TRAINER}.finish", act=FREE)
    status, output, errors = train(EACH_STEP, full, free)
    assert (status, errors) == (0, ""), output
    assert "metrics.jsonl can be written again" in output
    assert "event file cannot be written: File too large" in output
    differences = State.of(tmp_path / "run").differences(twins.state("device"))
    assert [name.partition("[")[0] for name in differences] == ["scalars"]


def test_a_run_that_ends_on_a_full_disk_goes_on_when_there_is_room(
    train: Train, ends_alike: Train, tmp_path: Path
) -> None:
    full = Moment(f"{TRAINER}._keep_best", call=EPOCHS, act=partial(limit_files, 0))
    status, output, errors = train(EACH_STEP, full)
    assert status == 2, output
    assert errors.startswith("error: ")
    assert "File too large" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()
    ends_alike()


def replace_by_a_file(folder: Path) -> None:
    folder.rename(folder.with_name("away"))
    folder.touch()


def test_a_folder_of_checkpoints_that_became_a_file_is_reported_and_training_goes_on(
    train: Train, twins: Twins, ends_alike: Train, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    blocked = Moment(f"{STEP}.ascend", call=3, act=partial(replace_by_a_file, folder))
    status, output, errors = train(EACH_STEP, blocked)
    assert (status, errors) == (0, ""), output
    assert re.search(r"checkpoint at step 1[01] was not written: .+; training continues, ", output)
    shutil.copytree(tmp_path / "run", tmp_path / "ended")
    for name in ("checkpoints", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "away").rename(folder)
    (tmp_path / "ended" / "checkpoints").unlink()
    (tmp_path / "ended" / "away").rename(tmp_path / "ended" / "checkpoints")
    differences = State.of(tmp_path / "ended").differences(twins.state("device"))
    assert [name.partition(":")[0] for name in differences] == ["checkpoint"]


@pytest.mark.alone
def test_training_does_not_wait_for_a_checkpoint_to_be_written(
    photos: Path, tmp_path: Path
) -> None:
    larger = "--model.arguments={depth: 12, embed_dim: 192, num_heads: 3}"
    flags = flags_for(photos, "device", larger, "--attack.steps=1", "--checkpoint.every_steps=99")
    ratios = []
    with Trainer(parse_config([*flags, "--output", str(tmp_path / "run")])) as trainer:
        trainer.begin_epoch(1)
        trainer.take_step(1, 0, STEPS_PER_EPOCH, next(trainer.data.train.epoch(1)))
        for _ in range(3):
            start = time.perf_counter()
            trainer.save()
            handed_over = time.perf_counter()
            trainer.saver.wait()
            written = time.perf_counter()
            ratios.append((handed_over - start) / (written - start))
    size = checkpoints_of(tmp_path / "run")[0].stat().st_size
    ratio = sorted(ratios)[1]
    print(f"a checkpoint of {size / 2**20:.0f} MiB: handed over in {ratio:.1%} of its time")
    assert ratio < 0.5


def not_finite_at(
    steps: set[tuple[int, int]], take_step: Callable[..., float]
) -> Callable[..., float]:
    """The loss of these steps, by epoch and index, is NaN."""

    def take(self: Trainer, epoch: int, index: int, *others: Any) -> float:
        objective = self.step.objective
        loss = type(objective).loss
        if (epoch, index) in steps:
            type(objective).loss = lambda *each: loss(*each) * torch.nan  # type: ignore[method-assign]
        try:
            return take_step(self, epoch, index, *others)
        finally:
            type(objective).loss = loss  # type: ignore[method-assign]

    return take


def test_steps_that_are_not_finite_are_counted_across_a_resume(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    steps = {(2, 1), (2, 2), (3, 3), (4, 0), (4, 2), (5, 0), (5, 1), (5, 3)}
    changes = EACH_STEP, Patch(f"{TRAINER}.take_step", partial(not_finite_at, steps))
    flags = flags_for(photos, "device", "--runtime.max_skipped_steps=3")
    for folder, kills in {"twin": [], "run": [7, 1, 7, 2, 4]}.items():
        for call in kills:
            kill = Moment("safer_fast.training.health.Skips.count", call, is_after=True)
            ending = server.train(tmp_path / folder, flags, *changes, kill)
            assert ending.status == -signal.SIGKILL, ending
        ending = server.train(tmp_path / folder, flags, *changes)
        assert (ending.status, ending.errors) == (0, "")
    twin = State.of(tmp_path / "twin")
    assert State.of(tmp_path / "run").differences(twin) == []
    skipped = [line["skipped_steps"] for line in twin.lines if line["event"] == "epoch"]
    assert skipped == [0, 2, 1, 2, 3]


# With lines after steps 3, 4, 6, 8, 9 and 12: those in a row are the last before a line, or not.
@pytest.mark.parametrize("steps", [{(2, 1), (2, 2), (2, 3)}, {(3, 1), (3, 2)}])
def test_too_many_steps_that_are_not_finite_end_a_run_that_was_resumed_between_them(
    steps: set[tuple[int, int]], train: Train, tmp_path: Path
) -> None:
    changes = EACH_STEP, Patch(f"{TRAINER}.take_step", partial(not_finite_at, steps))
    flags = (f"--runtime.max_skipped_steps={len(steps)}",)
    epoch = max(epoch for epoch, _ in steps)
    last_step = epoch * STEPS_PER_EPOCH
    kill = Moment("safer_fast.training.health.Skips.count", last_step)
    assert train(*changes, kill, flags=flags).status == -signal.SIGKILL
    assert read_checkpoint(checkpoints_of(tmp_path / "run")[-1]).step == last_step - 1
    for _ in range(2):
        status, _, errors = train(*changes, flags=flags)
        last = checkpoints_of(tmp_path / "run")[-1]
        assert (status, errors) == (
            2,
            "error: --runtime.max_skipped_steps: the loss or its gradient was not finite in "
            f"{len(steps)} steps in a row, at epoch {epoch}; lower the learning rate or clip the "
            f"gradient; last checkpoint: {last}\n",
        )


def test_a_run_that_lost_its_patience_ends_at_the_same_epoch(
    train: Train, twins: Twins, ends_alike: Train
) -> None:
    flags = ("--evaluation.patience=2",)
    epochs = [line["epoch"] for line in twins.state("device", *flags).lines]
    assert WARMUP_EPOCHS < max(epochs) < EPOCHS
    for moment in (
        Moment(f"{TRAINER}._keep_best", call=max(epochs) - 1, is_after=True),
        Moment(f"{TRAINER}.finish"),
    ):
        assert train(EACH_STEP, moment, flags=flags).status == -signal.SIGKILL
    output = ends_alike(flags=flags).output
    assert "evaluation.patience: no gain in 2 evaluations" in output


def test_a_run_that_was_made_to_be_resumed_can_be_evaluated(twins: Twins, tmp_path: Path) -> None:
    folder = shutil.copytree(twins.folder("device"), tmp_path / "run")
    (result,) = evaluate_run(EvaluateConfig(run=str(folder), attacks=Names(["clean"])))
    final = [line for line in twins.state("device").lines if line["event"] == "evaluation"][-2]
    assert (final["weights"], final["attack"]) == ("last", "clean")
    assert result.accuracy == final["accuracy"]
