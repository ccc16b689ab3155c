"""What a run does not need to go on costs a line when it is damaged, not the run."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safer_fast import evaluate, evaluate_run
from safer_fast.config.command_line import OPEN_FLAGS
from safer_fast.config.commands import EvaluateConfig
from safer_fast.runs.checkpoints.file import read_checkpoint
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime.tensor_files import write_tensors
from tests.support.kills import Moment, Server, checkpoints_of


@pytest.fixture(scope="module")
def killed(once: Any, server: Server, flags: list[str]) -> Path:
    """A run that was killed in its last epoch."""

    def train(folder: Path) -> None:
        kill = Moment("safer_fast.training.step.Step.update", 18)
        assert server.train(folder, flags, kill).status == -signal.SIGKILL

    return Path(once("killed-in-the-last-epoch", train))


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    shutil.copytree(killed, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x80
    file.write_bytes(content)


def lose_best(run: Path) -> None:
    for file in (run / "checkpoints").glob("best-*"):
        flip(file, -5)
    flip(run / "best.safetensors", -5)


def spoil_log(run: Path) -> None:
    flip(run / "metrics.jsonl", 10)


def empty_config(run: Path) -> None:
    (run / "run.yaml").write_bytes(b"")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "best weights": (lose_best, "is used without best-"),
    "log": (spoil_log, "a damaged line left out; all other lines are kept"),
    "no log": (lambda run: (run / "metrics.jsonl").unlink(), "its end is gone ("),
    "settings": (empty_config, "run.yaml was damaged ("),
    "no settings": (lambda run: (run / "run.yaml").unlink(), "run.yaml was damaged ("),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_a_run_goes_on_without_what_it_does_not_need(
    what: str, server: Server, flags: list[str], killed: Path, run: Path
) -> None:
    damage, line = DAMAGE[what]
    damage(run)
    ending = server.train(run, flags)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert line in ending.output
    events = read_metrics(run / "metrics.jsonl")
    assert [event["event"] for event in events].count("end") == 1
    assert what == "log" or events[0]["event"] == "run"
    steps = {event["step"] for event in read_metrics(killed / "metrics.jsonl")}
    assert "log" in what or steps <= {event["step"] for event in events}
    if "settings" in what:
        assert (run / "run.yaml").read_text().splitlines()[1:] == (
            (killed / "run.yaml").read_text().splitlines()[1:]
        )


@pytest.mark.slow
def test_damaged_settings_do_not_change_those_that_training_chooses(
    server: Server, flags: list[str], run: Path
) -> None:
    # the name of a network implies its patch size
    chosen = tuple(f"--{flag}=" for flag in OPEN_FLAGS if flag != "model.patch_size")
    typed = [word for word in flags if not word.startswith(chosen)]
    assert len(typed) < len(flags)
    empty_config(run)
    ending = server.train(run, typed)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert "as the run began" in ending.output
    assert "run.yaml was damaged (" in ending.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "best.safetensors"])
def test_a_finished_run_that_has_lost_a_file_writes_it_again(
    name: str,
    server: Server,
    flags: list[str],
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert server.train(run, flags).status == 0
    evaluate.main([str(run), "--attacks=clean,pgd-2", "--num-images=4", "--device=cpu"])
    wanted, events = (run / name).read_bytes(), read_metrics(run / "metrics.jsonl")
    (run / name).unlink()
    weights = "best" if name.startswith("best") else "last"
    with pytest.raises(ValueError, match=r"^run: expected a run folder with .* write it again"):
        evaluate_run(EvaluateConfig(run=str(run), weights=weights))
    ending = server.train(run, flags)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert f"{name} is lost, it is written again from the last checkpoint" in ending.output
    assert (run / name).read_bytes() == wanted

    def facts(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        names = "event", "epoch", "step", "attack", "weights", "accuracy"
        return [tuple(e.get(n) for n in names) for e in events if e["event"] != "run"]

    assert facts(read_metrics(run / "metrics.jsonl")) == facts(events)
    assert not list(run.glob("metrics-after-end*"))
    (run / name).unlink()
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    ending = server.train(run, flags)
    assert (ending.status, ending.errors) == (0, "")
    assert f"{name} is lost, and there is no checkpoint" in ending.output
    assert "finished already" in ending.output
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_whose_log_or_settings_are_damaged_is_still_finished(
    server: Server, flags: list[str], run: Path
) -> None:
    assert server.train(run, flags).status == 0
    spoil_log(run)
    empty_config(run)
    for lines in (2, 0):
        ending = server.train(run, flags)
        assert (ending.status, ending.errors) == (0, ""), ending.output
        assert "finished already" in ending.output
        assert ending.output.count("\n") == lines + 1


def test_what_was_deleted_while_a_run_went_on_is_there_at_its_end(
    server: Server, flags: list[str], run: Path
) -> None:
    gone = Moment(
        "safer_fast.training.validation.Validator.on_validation", act=(run / "run.yaml").unlink
    )
    ending = server.train(run, flags, gone)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert (run / "run.yaml").is_file()


def change(state: dict[str, Any], name: str, value: Any) -> None:
    """The field `group.name` has another value; it is gone for None."""
    *groups, last = name.split(".")
    for group in groups:
        state = state[group]
    if value is None:
        del state[last]
    else:
        state[last] = value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("format", 2, "expected format 1, got 2: of another version"),
        ("format", True, "expected format 1, got True"),
        ("config", None, "expected config, got None"),
        ("progress", None, "expected progress, got None"),
        ("progress", [], "expected progress, got []"),
        ("progress.new", 1, "it has an unknown field progress.new"),
        ("progress.index", None, "it lacks field progress.index"),
        ("progress.metrics_size", "9", "progress.metrics_size: expected another value, got '9'"),
        ("progress.epoch", 0, "progress.epoch: expected another value, got 0"),
        ("progress.best", [1.0], "progress.best: expected another value, got [1.0]"),
        ("progress.moved", [1], "progress.moved: expected another value, got [1]"),
        ("facts.data", None, "expected facts.data, got None"),
    ],
)
def test_a_checkpoint_of_another_version_ends_in_one_line_or_is_passed_over(
    name: str, value: Any, line: str, server: Server, flags: list[str], run: Path
) -> None:
    paths = checkpoints_of(run)
    for path in paths:
        checkpoint = read_checkpoint(path)
        change(checkpoint.state, name, value)
        metadata = {"step": str(checkpoint.step), "state": json.dumps(checkpoint.state)}
        write_tensors(path, checkpoint.tensors, {**metadata, "needs": json.dumps(checkpoint.needs)})
    ending = server.train(run, flags)
    assert ending.status == 2, ending.output
    assert ending.errors.count("\n") == 1
    assert f"no checkpoint can be used; the newest: {paths[-1]}: {line}" in ending.errors
    assert checkpoints_of(run) == paths


def test_layers_and_tensors_that_the_run_does_not_have_are_named(
    server: Server, flags: list[str], run: Path
) -> None:
    path = checkpoints_of(run)[-1]
    checkpoint = read_checkpoint(path)
    needs = json.dumps(checkpoint.needs)
    for state, tensors in (
        ({**checkpoint.state["progress"], "selected": ["no.layer"]}, checkpoint.tensors),
        (checkpoint.state["progress"], {}),
    ):
        content = json.dumps(checkpoint.state | {"progress": state})
        write_tensors(
            path, tensors, {"step": str(checkpoint.step), "state": content, "needs": needs}
        )
        ending = server.train(run, flags)
        assert (ending.status, ending.errors.count("\n")) == (2, 1), ending.output
        assert f"error: {path}: it does not fit this run: KeyError: " in ending.errors
