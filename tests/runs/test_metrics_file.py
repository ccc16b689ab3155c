"""The log of a run: strict, readable after a kill, and without a wait for the device."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from safer_fast.runs.figures import layer_map
from safer_fast.runs.layout import METRICS
from safer_fast.runs.loggers.metrics_file import read_metrics, uninterrupted
from safer_fast.runs.loggers.metrics_log import MetricsLog
from tests.support.reports import with_reports

EPOCH: dict[str, Any] = {
    "train_loss": 0.5,
    "train_robust_accuracy": 0.4,
    "clean_accuracy": 0.8,
    "robust_accuracy": None,
    "learning_rate": 1e-3,
    "epsilon": 8 / 255,
    "images_per_second": 512.5,
    "data_wait_fraction": 0.01,
    "peak_memory_mib": 100.0,
    "skipped_steps": 0,
    "skipped_images": 0,
}
EVALUATION: dict[str, Any] = {
    "split": "test",
    "attack": "pgd-20",
    "epsilon": 8 / 255,
    "accuracy": 0.45,
    "num_images": 1000,
    "weights": "best",
}
SELECTION: dict[str, Any] = {
    "criterion": "sharpness",
    "scores": {"head": 0.25, "blocks.0.attn.qkv": 1.5},
    "selected": ["blocks.0.attn.qkv"],
    "cut": 0,
}


def test_a_line_has_the_fixed_keys_first_and_then_the_values(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "new" / "run") as log:
        log.write("run", epoch=0, step=0, device="cpu", versions={"torch": "2"}, banner=("a", "b"))
        log.write("epoch", epoch=1, step=10, **EPOCH)
    run, epoch = read_metrics(tmp_path / "new" / "run" / "metrics.jsonl")
    assert list(run) == ["event", "epoch", "step", "time_s", "device", "versions", "banner"]
    assert run["banner"] == ["a", "b"]
    assert (epoch["event"], epoch["epoch"], epoch["step"]) == ("epoch", 1, 10)
    assert {key: epoch[key] for key in EPOCH} == EPOCH
    assert 0 <= run["time_s"] <= epoch["time_s"]


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 4):
            log.write("step", epoch=1, step=step, loss=1.0)
            assert len(read_metrics(tmp_path / "metrics.jsonl")) == step


def test_floats_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("step", epoch=1, step=1, loss=math.nan, nested={"values": [math.inf, -1.0]})
    text = (tmp_path / "metrics.jsonl").read_text()
    event = json.loads(text, parse_constant=pytest.fail)
    assert event["loss"] is None
    assert event["nested"] == {"values": [None, -1.0]}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.tensor(1.0), "step.loss: expected a JSON value, got Tensor"),
        ([{1, 2}], r"step.loss\[0\]: expected a JSON value, got set"),
        ({"a": Path()}, "step.loss.a: expected a JSON value"),
        ({1: "a"}, "step.loss: expected a JSON value, got dict"),
    ],
)
def test_a_value_that_json_does_not_know_is_refused_by_name(
    tmp_path: Path, value: Any, name: str
) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(TypeError, match=name):
        log.write("step", epoch=1, step=1, loss=value)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("event", "values"),
    [("epoch", EPOCH), ("selection", SELECTION), ("evaluation", EVALUATION)],
)
def test_an_event_without_one_of_its_keys_is_refused(
    tmp_path: Path, event: Any, values: dict[str, Any]
) -> None:
    with MetricsLog(tmp_path) as log:
        for key in values:
            rest = {name: value for name, value in values.items() if name != key}
            with pytest.raises(AssertionError, match=f"{event} lacks {key}"):
                log.write(event, epoch=1, step=1, **rest)
        log.write(event, epoch=1, step=1, **values)


def test_an_unknown_event_is_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(AssertionError, match="unknown event 'pause'"):
        log.write("pause", epoch=1, step=1)  # type: ignore[arg-type]


def test_tensorboard_has_the_scalars_by_group_and_name(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("epoch", epoch=1, step=7, **EPOCH)
        log.write("selection", epoch=1, step=7, **SELECTION)
        log.write("evaluation", epoch=1, step=7, **EVALUATION)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"epoch/{key}" for key in EPOCH} - tags == {"epoch/robust_accuracy"}  # it is None
    assert {"selection/head", "selection/blocks.0.attn.qkv"} <= tags
    (scalar,) = events.Scalars("evaluation/best-test-pgd-20-8of255-1000images")
    assert (scalar.step, round(scalar.value, 6)) == (7, 0.45)


def test_tensorboard_has_numbers_within_dictionaries_and_lists(tmp_path: Path) -> None:
    health = {"stage_ms": {"attack": 2.5, "data": None}, "attack_success": [0.25, None, 0.75]}
    with MetricsLog(tmp_path) as log:
        log.write("epoch", epoch=1, step=7, **EPOCH, **health, catastrophic_overfitting=True)
        log.write("step", epoch=1, step=7, deep={"a": {"b": {"c": 1.0}, "d": 1.5}, "text": "1"})
    own = [one for one in scalars(tmp_path) if one[0].removeprefix("epoch/") not in EPOCH]
    assert own == [
        ("epoch/stage_ms/attack", 7, 2.5),
        ("epoch/attack_success/0", 7, 0.25),
        ("epoch/attack_success/2", 7, 0.75),
        ("epoch/catastrophic_overfitting", 7, 1.0),
        ("step/deep/a/d", 7, 1.5),  # what lies deeper is left out
    ]


def test_figures_of_transferred_images_have_a_name_of_their_own(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("evaluation", epoch=1, step=7, **EVALUATION, source=None)
        log.write("evaluation", epoch=1, step=7, **EVALUATION, source="other")
    names = [name for name, *_ in scalars(tmp_path)]
    assert names == [
        "evaluation/best-test-pgd-20-8of255-1000images" + end for end in ("", "-other")
    ]


@pytest.fixture
def drawn_maps() -> Iterator[None]:
    """Maps of layers are drawn, as in the runs of users."""
    with with_reports():
        yield


@pytest.mark.usefixtures("drawn_maps")
def test_tensorboard_has_a_map_of_the_layers_for_each_selection(tmp_path: Path) -> None:
    others = {"scores": {"head": 2.0, "blocks.0.attn.qkv": 1.0}, "selected": ["head"]}
    with MetricsLog(tmp_path) as log:
        log.write("selection", epoch=1, step=7, **SELECTION)
        log.write("selection", epoch=2, step=9, **SELECTION | others)
        log.write("selection", epoch=3, step=11, **SELECTION | {"scores": {}})
    (first, one), (second, other) = pictures(tmp_path, "selection/layers")
    assert (first, second) == (7, 9)
    assert one.size == other.size
    assert len(set(one.get_flattened_data())) > 10
    assert one.tobytes() != other.tobytes()


@pytest.mark.usefixtures("drawn_maps")
def test_a_resumed_run_has_the_maps_of_its_last_twelve_selections(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log._loggers.clear()  # drawing all of them takes seconds
        for step in range(14):
            log.write("selection", epoch=step, step=step, **SELECTION)
    assert pictures(tmp_path, "selection/layers") == []
    with MetricsLog(tmp_path, resume_at=log.size) as log:
        log.write("selection", epoch=14, step=14, **SELECTION)
    steps = [step for step, _ in pictures(tmp_path, "selection/layers")]
    assert steps == list(range(2, 15))


@pytest.mark.usefixtures("drawn_maps")
def test_a_map_that_cannot_be_drawn_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(layer_map, "draw_layer_map", failing)
    reports: list[str] = []
    with MetricsLog(tmp_path, report=reports.append) as log:
        for step in (1, 2):
            log.write("selection", epoch=1, step=step, **SELECTION)
    assert reports == [
        "TensorBoard's map of layers cannot be drawn: RuntimeError: no font; it is left out"
    ]
    assert [step for name, step, _ in scalars(tmp_path) if name == "selection/head"] == [1, 2]


def test_a_picture_comes_back_as_it_was_given(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), "red").save(buffer, format="PNG")
    with MetricsLog(tmp_path) as log:
        log.add_image("gallery", buffer.getvalue(), 5, 3, step=4)
    ((step, picture),) = pictures(tmp_path, "gallery")
    assert (step, picture.size, picture.getpixel((4, 2))) == (4, (5, 3), (255, 0, 0))


def test_a_picture_for_a_file_that_is_gone_is_left_out(tmp_path: Path) -> None:
    reports: list[str] = []
    with MetricsLog(tmp_path / "run", report=reports.append) as log:
        shutil.rmtree(tmp_path / "run")
        for step in (1, 2):
            log.add_image("gallery", b"", 5, 3, step=step)
    assert len(reports) == 1
    assert reports[0].startswith("TensorBoard's event file cannot be written: ")


def test_a_log_that_is_opened_again_goes_on(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsLog(tmp_path) as log:
            log.write("step", epoch=1, step=step)
    assert [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(("end", "kept"), [('{"step": 2', 1), ('{"step": 2}', 2), ("", 1)])
def test_a_last_line_cut_short_is_left_out_and_then_overwritten(
    tmp_path: Path, end: str, kept: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + end)
    assert len(read_metrics(path)) == kept
    with MetricsLog(tmp_path) as log:
        log.write("step", epoch=1, step=9)
    assert [event["step"] for event in read_metrics(path)] == [*[1, 2][:kept], 9]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"a": NaN}', "", '{"a": 1'])
def test_other_damage_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object, got "):
        read_metrics(path)


def test_an_interrupt_comes_after_what_must_not_be_interrupted() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")
        done.append("never")
    assert done == ["all of it"]
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_a_line_is_written_loses_neither_it_nor_its_scalars(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path) as log:  # noqa: PT012
        append = log._file.append

        def interrupted(line: bytes) -> None:
            signal.raise_signal(signal.SIGINT)
            append(line)

        log._file.append = interrupted  # type: ignore[method-assign]
        log.write("step", epoch=1, step=1, loss=1.0)
    assert [event["step"] for event in read_metrics(tmp_path / METRICS)] == [1]
    assert scalars(tmp_path) == [("step/loss", 1, 1.0)]


WRITES: list[Callable[[MetricsLog], None]] = [
    lambda log: log.write("run", epoch=0, step=0, device="cpu"),
    lambda log: log.write("step", epoch=1, step=1, loss=0.1, skipped_steps=0, name="é"),
    lambda log: log.write("step", epoch=1, step=2, loss=math.nan, learning_rate=1e-40),
    lambda log: log.write("selection", epoch=1, step=2, **SELECTION),
    lambda log: log.write("epoch", epoch=1, step=2, **EPOCH),
    lambda log: log.write("evaluation", epoch=1, step=2, **EVALUATION),
    lambda log: log.write("end", epoch=1, step=2),
]


def scalars(run: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of every scalar in the event files of a run, in order."""
    return [
        (value.tag, event.step, value.simple_value)
        for path in sorted(run.glob("events.out.tfevents.*"))
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def pictures(run: Path, tag: str) -> list[tuple[int, Image.Image]]:
    """Step and picture of every image that TensorBoard's reader finds under a tag."""
    events = EventAccumulator(str(run), {"images": 0})
    events.Reload()
    if tag not in events.Tags()["images"]:
        return []
    found = []
    for event in events.Images(tag):
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        assert picture.size == (event.width, event.height)
        found.append((event.step, picture.convert("RGB")))
    return found


def without_time(path: Path) -> list[dict[str, Any]]:
    return [{**event, "time_s": None} for event in read_metrics(path)]


def test_a_run_resumed_after_any_line_has_the_lines_and_scalars_of_one_never_stopped(
    tmp_path: Path,
) -> None:
    sizes = []
    with MetricsLog(tmp_path / "whole") as log:
        for write in WRITES:
            sizes.append(log.size)
            write(log)
        sizes.append(log.size)
    content = (tmp_path / "whole" / METRICS).read_bytes()
    assert sizes == [0, *(end + 1 for end, byte in enumerate(content) if byte == ord("\n"))]
    for kept, size in enumerate(sizes):
        run = tmp_path / f"resumed-{kept}"
        with MetricsLog(run) as log:
            for write in WRITES[:kept]:
                write(log)
            size = log.size
            for write in WRITES[kept:] + WRITES[:2]:
                write(log)
        with MetricsLog(run, resume_at=size) as log:
            assert scalars(run) == scalars(tmp_path / "whole")[: len(scalars(run))]
            assert log.size == size
            for write in WRITES[kept:]:
                write(log)
        assert without_time(run / METRICS) == without_time(tmp_path / "whole" / METRICS)
        assert scalars(run) == scalars(tmp_path / "whole")
        assert len(list(run.glob("*tfevents*"))) == 1


def test_the_reader_of_tensorboard_sees_each_scalar_of_a_resumed_run_once(tmp_path: Path) -> None:
    for size in (None, 0):
        with MetricsLog(tmp_path, resume_at=size) as log:
            for write in WRITES:
                write(log)
    with MetricsLog(tmp_path, resume_at=log.size):
        pass
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    seen = [
        (tag, scalar.step, scalar.value)
        for tag in events.Tags()["scalars"]
        for scalar in events.Scalars(tag)
    ]
    assert sorted(seen) == sorted(scalars(tmp_path))
    assert len(set(seen)) == len(seen) > 10


def test_scalars_of_kept_lines_lie_as_far_back_as_their_lines_do(tmp_path: Path) -> None:
    lines = [
        {"event": "step", "epoch": 1, "step": step, "time_s": time_s, "loss": 1.0}
        for step, time_s in enumerate((0.5, 60.5, 100.5))
    ]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = (tmp_path / METRICS).stat().st_size
    before = time.time()
    MetricsLog(tmp_path, resume_at=size).close()
    (path,) = tmp_path.glob("*tfevents*")
    _, *events = LegacyEventFileLoader(str(path)).Load()
    first, second, third = (event.wall_time for event in events)
    assert before <= third <= time.time()
    assert (third - first, third - second) == (pytest.approx(100.0), pytest.approx(40.0))


def test_a_plain_append_leaves_what_tensorboard_has_alone(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLog(tmp_path) as log:
            log.write("evaluation", epoch=1, step=7, **EVALUATION)
    (scalar, again) = scalars(tmp_path)
    assert scalar == again
    assert len(list(tmp_path.glob("*tfevents*"))) == 2


def test_a_run_cannot_be_resumed_where_no_line_ends(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for write in WRITES[:3]:
            write(log)
    content = (tmp_path / METRICS).read_bytes()
    events = scalars(tmp_path)
    ends = {0, *(end + 1 for end, byte in enumerate(content) if byte == ord("\n"))}
    for size in set(range(len(content))) - ends:
        with pytest.raises(ValueError, match=rf"metrics\.jsonl: .* end at byte {size}, got '{{"):
            MetricsLog(tmp_path, resume_at=size)
    assert (tmp_path / METRICS).read_bytes() == content
    assert scalars(tmp_path) == events


def test_a_run_cannot_be_resumed_from_a_file_that_is_shorter_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected the 9 bytes .* got no file"):
        MetricsLog(tmp_path / "run", resume_at=9)
    assert not (tmp_path / "run").exists()
    (tmp_path / METRICS).write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected the 10 bytes .* got 9"):
        MetricsLog(tmp_path, resume_at=10)
    assert (tmp_path / METRICS).read_text() == '{"a": 1}\n'


def test_a_run_cannot_be_resumed_from_damaged_lines(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: expected a JSON object"):
        MetricsLog(tmp_path, resume_at=9)


@pytest.mark.parametrize("is_resumed", [True, False])
def test_time_goes_on_from_that_of_the_last_line(tmp_path: Path, is_resumed: bool) -> None:
    line = {"event": "step", "epoch": 1, "step": 1, "time_s": 1000.123}
    (tmp_path / METRICS).write_text(json.dumps(line) + "\n")
    size = (tmp_path / METRICS).stat().st_size if is_resumed else None
    with MetricsLog(tmp_path, resume_at=size) as log:
        log.write("step", epoch=1, step=2)
        time.sleep(0.01)
        log.write("step", epoch=1, step=3)
    _, second, third = (event["time_s"] for event in read_metrics(tmp_path / METRICS))
    assert 1000.123 <= second < 1010
    assert second + 0.01 <= third + 1e-9


FULL_DISK = """
    import json, resource, sys
    from pathlib import Path
    from safer_fast.runs.layout import METRICS
    from safer_fast.runs.loggers.metrics_file import read_metrics
    from safer_fast.runs.loggers.metrics_log import MetricsLog

    def limit(num_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    folder = Path(sys.argv[1])
    write = lambda log, step: log.write("step", epoch=1, step=step, loss=1.0)
    steps = lambda run: [event["step"] for event in read_metrics(run / METRICS)]
"""


def in_a_process(script: str, folder: Path) -> str:
    """What the script prints, which has a minute to end; FULL_DISK goes before it."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK) + textwrap.dedent(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("can_cut", [True, False])
def test_lines_that_find_the_disk_full_are_written_once_and_in_order_when_there_is_room(
    tmp_path: Path, can_cut: bool
) -> None:
    script = """
        import os

        def no_truncate(*_):
            raise OSError("not now")

        can_cut, truncate = CAN_CUT, os.truncate
        for room in range(150):  # two lines and a part
            run, reports = folder / str(room), []
            log = MetricsLog(run, report=reports.append)
            log._loggers.clear()  # it would be full as well
            write(log, 1)
            limit(log.size + room)
            os.truncate = truncate if can_cut else no_truncate
            for step in range(2, 7):
                write(log, step)
            content = (run / METRICS).read_bytes()
            written = content.count(b"\\n")
            assert steps(run)[:written] == [1, 2, 3][:written]
            assert content.endswith(b"\\n") or not can_cut
            os.truncate = truncate
            limit(len(content) + 150)  # room for some that wait, but not for all
            write(log, 7)
            assert steps(run) == [1, 2, 3][:written]
            limit(resource.RLIM_INFINITY)
            write(log, 8)
            log.close()
            assert steps(run) == [1, 2, 3, 4, 5, 6, 7, 8]
            assert (run / METRICS).stat().st_size == log.size
            assert reports == [
                "metrics.jsonl cannot be written: File too large; lines are kept and written later",
                f"metrics.jsonl can be written again; lines written late: {8 - written}",
            ]
        print(written)
    """
    assert in_a_process(script.replace("CAN_CUT", str(can_cut)), tmp_path) == "3\n"


def test_a_log_that_is_opened_on_a_full_disk_has_all_lines_when_there_is_room(
    tmp_path: Path,
) -> None:
    script = """
        limit(10)
        log = MetricsLog(folder)
        for step in (1, 2):
            write(log, step)
        limit(resource.RLIM_INFINITY)
        log.close()
        print(steps(folder))
    """
    assert in_a_process(script, tmp_path).splitlines() == [
        "TensorBoard's event file cannot be written: File too large; it is left as it is",
        "metrics.jsonl cannot be written: File too large; lines are kept and written later",
        "metrics.jsonl can be written again; lines written late: 2",
        "[1, 2]",
    ]


def test_closing_on_a_full_disk_says_how_many_lines_are_lost(tmp_path: Path) -> None:
    script = """
        log = MetricsLog(folder)
        log._loggers.clear()
        write(log, 1)
        limit(log.size + 10)
        for step in (2, 3, 4):
            write(log, step)
        try:
            log.sync()
        except OSError as error:
            print("sync:", error.strerror)
        log.close()
        log.close()
        print(steps(folder))
    """
    assert in_a_process(script, tmp_path).splitlines() == [
        "metrics.jsonl cannot be written: File too large; lines are kept and written later",
        "sync: File too large",
        "metrics.jsonl could not be written: File too large; lines lost: 3",
        "[1]",
    ]


def test_a_full_disk_ends_the_event_file_alone_and_hangs_nothing(tmp_path: Path) -> None:
    script = """
        log = MetricsLog(folder)
        values = dict.fromkeys("abcdefghij", 1.0)
        for step in range(40):
            log.write("step", epoch=1, step=step, **values)
        (path,) = folder.glob("*tfevents*")
        size = path.stat().st_size
        assert log.size + 3 * 200 < size, (log.size, size)
        limit(size + 5)
        for step in range(40, 43):
            log.write("step", epoch=1, step=step, **values)
        limit(resource.RLIM_INFINITY)
        for step in range(43, 100):  # more than any queue takes
            log.write("step", epoch=1, step=step, **values)
        log.close()
        assert steps(folder) == list(range(100))
        assert path.stat().st_size == size + 5
        with MetricsLog(folder, resume_at=log.size):
            print(len(list(folder.glob("*tfevents*"))))
    """
    assert in_a_process(script, tmp_path).splitlines() == [
        "TensorBoard's event file cannot be written: File too large; it is left as it is",
        "1",
    ]
    assert len(scalars(tmp_path)) == 1000


def test_a_run_folder_that_is_removed_is_made_anew_without_its_event_file(tmp_path: Path) -> None:
    reports: list[str] = []
    log = MetricsLog(tmp_path / "run", report=reports.append)
    log.write("step", epoch=1, step=1)
    size = log.size
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        log.sync()
    for step in (2, 3):
        log.write("step", epoch=1, step=step, loss=1.0)
    log.sync()
    log.close()
    assert [event["step"] for event in read_metrics(tmp_path / "run" / METRICS)] == [2, 3]
    assert log.size == (tmp_path / "run" / METRICS).stat().st_size
    assert os.listdir(tmp_path / "run") == [METRICS]
    assert reports == [
        f"metrics.jsonl was removed or cut short: {size} bytes that were written are gone; "
        "it continues from here",
        "TensorBoard's event file cannot be written: No such file or directory; "
        "it is left as it is",
    ]


def test_sync_does_not_vouch_for_lines_that_somebody_cut_off(tmp_path: Path) -> None:
    reports: list[str] = []
    log = MetricsLog(tmp_path, report=reports.append)
    log.write("step", epoch=1, step=1)
    (tmp_path / METRICS).write_text("")
    with pytest.raises(OSError, match=r"metrics\.jsonl: lines that were written are gone"):
        log.sync()
    log.write("step", epoch=1, step=2)
    log.sync()
    assert len(reports) == 1


def test_an_event_file_that_cannot_take_the_place_of_old_ones_is_done_without(
    tmp_path: Path,
) -> None:
    reports: list[str] = []
    (tmp_path / METRICS).touch()
    (tmp_path / "events.out.tfevents.0").mkdir()  # even root cannot unlink it
    with MetricsLog(tmp_path, resume_at=0, report=reports.append) as log:
        log.write("step", epoch=1, step=1, loss=1.0)
    assert len(read_metrics(tmp_path / METRICS)) == 1
    (line,) = reports
    assert line.startswith("TensorBoard's event file cannot be written: ")


def test_lines_wait_while_their_disk_is_away(tmp_path: Path) -> None:
    reports: list[str] = []
    disk, away = tmp_path / "disk", tmp_path / "away"
    log = MetricsLog(disk / "run", report=reports.append)
    log.write("step", epoch=1, step=1)
    disk.rename(away)
    for step in (2, 3):
        log.write("step", epoch=1, step=step)
        with pytest.raises(FileNotFoundError):
            log.sync()
    assert not disk.exists()
    away.rename(disk)
    log.sync()
    assert [event["step"] for event in read_metrics(disk / "run" / METRICS)] == [1, 2, 3]
    assert reports[-1] == "metrics.jsonl can be written again; lines written late: 2"
    assert len([line for line in reports if "metrics.jsonl" in line]) == 2


def test_an_interrupt_while_a_log_is_closed_comes_when_it_is_closed(tmp_path: Path) -> None:
    reports: list[str] = []

    def report(line: str) -> None:
        if "lost" in line:
            signal.raise_signal(signal.SIGINT)
        reports.append(line)

    log = MetricsLog(tmp_path / "disk" / "run", report=report)
    shutil.rmtree(tmp_path / "disk")
    log.write("step", epoch=1, step=1)
    with pytest.raises(KeyboardInterrupt):
        log.close()
    log.close()
    assert [line for line in reports if "lost" in line] == [
        "metrics.jsonl could not be written: No such file or directory; lines lost: 1"
    ]


def test_what_others_append_or_leave_unfinished_meanwhile_is_respected(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    with MetricsLog(tmp_path) as log:
        log.write("step", epoch=1, step=1)
        with MetricsLog(tmp_path) as other:
            other.write("step", epoch=1, step=2)
        with path.open("a") as file:
            file.write('{"event": "st')
        log.write("step", epoch=1, step=3)
        assert log.size == path.stat().st_size
    assert [event["step"] for event in read_metrics(path)] == [1, 2, 3]


def test_another_thread_can_sync_while_lines_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    is_done = threading.Event()
    errors: list[BaseException] = []

    def sync() -> None:
        try:
            while not is_done.is_set():
                log.sync()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=sync)
    thread.start()
    for step in range(300):
        log.write("step", epoch=1, step=step)
    is_done.set()
    thread.join()
    assert errors == []
    assert [event["step"] for event in read_metrics(tmp_path / METRICS)] == list(range(300))


def test_sync_brings_all_lines_to_the_disk_and_writing_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path)
    log.write("step", epoch=1, step=1)
    size = log.size
    started, is_on_disk = threading.Event(), threading.Event()
    synced: list[tuple[int, int]] = []

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))
        started.set()
        assert is_on_disk.wait(30)

    monkeypatch.setattr(os, "fsync", fsync)
    thread = threading.Thread(target=log.sync)
    thread.start()
    assert started.wait(30)
    log.write("step", epoch=1, step=2)
    assert thread.is_alive()
    is_on_disk.set()
    thread.join()
    assert synced == [((tmp_path / METRICS).stat().st_ino, size)]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("bad disk")))
    with pytest.raises(OSError, match="bad disk"):
        log.sync()
