"""The CIFAR-10 experiment: its arms train, nothing is done twice, tables say what rows say."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_rel

from bench.experiment import __main__ as experiment
from bench.experiment import figure as experiment_figure
from bench.experiment import jobs as experiment_jobs
from bench.experiment import worker
from bench.experiment.arms import (
    ARMS,
    BASELINE,
    COMPARED,
    MAIN,
    OPTIMIZER_ARMS,
    QUARTER,
    SCALES,
    STEPS_ARMS,
    UPPER,
    VARIANT_ARMS,
    Scale,
)
from bench.experiment.compared_table import (
    Found,
    chosen,
    compared_tables,
    holm,
    search_tables,
)
from bench.experiment.jobs import Jobs
from bench.experiment.pool import Pool
from bench.experiment.table import (
    choice_tables,
    earlier_tables,
    experiment_tables,
    groups_of,
    paired,
    selection_tables,
    sensitivity_tables,
)
from bench.experiment.tasks import (
    FILES,
    LATE,
    PEAK,
    RESULTS,
    Results,
    Task,
    Wanted,
    read_rows,
    tasks_of,
)
from bench.experiment.worker import Job, Measure
from safer_fast import evaluate_run
from safer_fast.attacks.radii import radii_at
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import EvaluateConfig
from tests.support.kills import Server
from tests.support.pictures import encode, photo
from tests.support.small_runs import TEST_IMAGES

MODEL = "vit_tiny_patch16_224"
TINY = replace(
    SCALES["reduced"],
    name="tiny",
    models={MODEL: {"model.patch_size": 16, "model.arguments": {"depth": 3, "embed_dim": 24}}},
    train_images=24,
    validation_images=8,
    test_images=8,
    autoattack_images=2,
    gap_images=8,
    start_epochs=2,
    arm_epochs=1,
    attack_steps=1,
    batch_size=8,
    clean_epochs=0,
    ramp_epochs=0,
    num_blocks=3,
    evaluation_batch_size=8,
    patience=1,
    common={"runtime.compile": "off", "selection.num_images": 8},
)


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    """Files of training and test images."""
    files = tmp_path / "train.parquet", tmp_path / "test.parquet"
    for file, count in zip(files, (40, 12), strict=True):
        rows = [
            {"bytes": encode(photo(32, 32, seed), "png"), "path": None} for seed in range(count)
        ]
        pq.write_table(pa.table({"image": rows, "label": [s % 10 for s in range(count)]}), file)
    return files


def jobs_in(folder: Path, scale: Scale = TINY, num_rows: int = 24) -> Jobs:
    """Jobs of an experiment whose training images are there, but nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "images.parquet"
    pq.write_table(pa.table({"label": list(range(num_rows))}), file)
    data = dict.fromkeys(("train", "validation", "test"), file)
    return Jobs(scale, folder, data, Results(folder / "rows.jsonl"))


# -- what is done, and in which order


def test_every_arm_is_a_run_that_the_command_line_takes(tmp_path: Path) -> None:
    for scale in SCALES.values():
        jobs = jobs_in(tmp_path / scale.name, scale)
        for model in scale.models:
            start = parse_config(jobs._flags(Task("start", model)))
            assert start.evaluation.patience == scale.patience
            for arm in scale.arms():
                config = parse_config(jobs._flags(Task("arm", model, PEAK, arm)))
                assert config.model.checkpoint.endswith("best.safetensors")  # type: ignore[union-attr]
                assert config.attack.clean_epochs == config.attack.epsilon_warmup_epochs == 0
                if config.attack.name == "apgd":
                    assert config.attack.steps == 2
                elif arm not in STEPS_ARMS:
                    assert config.attack.steps == start.attack.steps
                else:
                    assert config.attack.steps == ("auto" if arm.endswith("auto") else 10)
                    assert radii_at(config.attack, 1, 10)[1] == pytest.approx(2 / 255)
                assert config.epochs == scale.arm_epochs


def test_arms_differ_in_what_their_names_say() -> None:
    arms = [*ARMS, *OPTIMIZER_ARMS, *VARIANT_ARMS, "SAFER, blocks, fraction 25 %"]
    settings = {arm: SCALES["full"].arm_settings("deit_tiny_patch16_224", arm) for arm in arms}

    def changed(arm: str, base: str) -> set[str]:
        names = settings[arm].keys() | settings[base].keys()
        return {n for n in names if settings[arm].get(n) != settings[base].get(n)}

    assert changed("PGD-AT, low rate", BASELINE) == {"optim.learning_rate"}
    assert changed("PGD-AT, Muon", BASELINE) == {"optim.name"}
    assert changed("SAFER, Muon", "SAFER") == {"optim.name"}
    assert changed("SAFER, SGD", "SAFER") == {
        f"optim.{of}" for of in ("name", "learning_rate", "weight_decay")
    }
    apgd = {f"attack.{of}" for of in ("name", "steps", "step_size")}
    assert changed("PGD-AT, APGD-2", BASELINE) == apgd
    assert changed("PGD-AT, growing images", BASELINE) == {"data.resolution_schedule"}
    quarter = "SAFER, blocks, fraction 25 %"
    assert changed(f"{quarter}, LoRA", quarter) == {"selection.lora_rank"}
    assert changed(f"{quarter}, DoRA", f"{quarter}, LoRA") == {"selection.adapter"}
    assert changed("SAM on all", BASELINE) == {"sam.rho"}
    assert changed("random, SAM", "SAFER") == {"selection.criterion"}
    assert changed("least sharp, SAM", "SAFER") == {"selection.criterion"}
    assert changed("criticality, SAM", "SAFER") == {"selection.criterion"}
    assert changed("sharpest, no SAM", "SAFER") == {"sam.rho"}
    assert changed("SAFER, relative radius", "SAFER") == {"selection.radius"}
    assert changed("TRADES", BASELINE) == {"objective.name"}
    assert changed("TRADES, SAFER", "SAFER") == {"objective.name"}
    assert settings["SAFER"]["selection.fraction"] == 0.05
    assert settings[BASELINE]["attack.step_size"] == "2/255"


def test_the_main_arms_have_all_seeds_before_others_have_one() -> None:
    tasks = tasks_of(SCALES["full"], Wanted(list(SCALES["full"].models), num_seeds=3))
    assert len(set(tasks)) == len(tasks)
    assert tasks[0] == Task("start", "deit_tiny_patch16_224")
    first = [task for task in tasks if task.kind == "arm"]
    assert {(task.arm, task.seed) for task in first[:12]} == {
        (a, s) for a in MAIN for s in range(3)
    }
    assert [task.arm for task in first[:4]] == list(MAIN)
    arms = {task.arm for task in first if (task.start, task.seed) == (PEAK, 0)}
    assert arms == set(SCALES["full"].arms())
    assert {task.arm for task in first if task.start == LATE} == {*ARMS, *UPPER, *STEPS_ARMS}
    judged = {(task.start, task.arm, task.seed) for task in tasks if task.kind == "autoattack"}
    assert judged >= {(s, arm, n) for s in (PEAK, LATE) for arm in STEPS_ARMS for n in range(3)}
    models = [task.model for task in tasks]
    assert models == sorted(models)  # DeiT before ViT, without a mixture


def test_a_search_comes_before_what_was_fixed_and_sees_no_test_image(tmp_path: Path) -> None:
    scale = SCALES["medium"]
    tasks = tasks_of(scale, Wanted([MODEL], num_seeds=3))
    assert len(set(tasks)) == len(tasks)
    kinds = [task.kind for task in tasks]
    num_searched = len(scale.searched)
    assert kinds[: num_searched + 1] == ["start", *["search"] * num_searched]
    assert "search" not in kinds[num_searched + 1 :]
    assert not {t.seed for t in tasks if t.kind == "search"} & set(range(3))
    compared = {(t.start, t.arm, t.seed) for t in tasks if t.kind == "arm"}
    everything = {(s, arm, n) for s in (PEAK, LATE) for arm in COMPARED for n in range(3)}
    assert compared == everything
    judged = {(t.start, t.arm, t.seed) for t in tasks if t.kind == "autoattack"}
    assert judged - {(s, "start", 0) for s in (PEAK, LATE)} == everything
    jobs = jobs_in(tmp_path, scale)
    searched = jobs.job(tasks[1])
    assert {(m.split, m.weights) for m in searched.measures} == {
        ("validation", "best"),
        ("validation", "last"),
    }
    attacked = jobs.job(Task("autoattack", MODEL, PEAK, BASELINE, 2))
    weights = [(measure.weights, measure.attacks) for measure in attacked.measures]
    assert weights == [("best", ["autoattack"]), ("last", ["autoattack"])]


def test_rates_of_arms_are_what_their_names_say() -> None:
    scale = SCALES["medium"]
    rates = {arm: scale.arm_settings(MODEL, arm)["optim.learning_rate"] for arm in scale.arms()}
    own = rates[BASELINE]
    named = {
        "PGD-AT, low rate": 0.1,
        "search, a third of the rate": 1 / 3,
        "search, fraction 50 %, a third of the rate": 1 / 3,
        "search, fraction 50 %, Muon, a third of the rate": 1 / 3,
        "search, three times the rate": 3,
    }
    for arm, factor in named.items():
        assert rates[arm] == pytest.approx(factor * own)  # type: ignore[operator]
    assert {arm for arm, rate in rates.items() if rate != own} == {*named, "search, SGD"}


def test_the_same_weights_are_attacked_once(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    measures = [Measure(w, "test", ["clean"], str(TEST_IMAGES), 8) for w in FILES]
    called: list[str] = []

    def evaluate(config: EvaluateConfig) -> Any:
        called.append(config.weights)
        return evaluate_run(config)

    monkeypatch.setattr(worker, "evaluate_run", evaluate)
    shutil.copy(run / FILES["last"], run / FILES["best"])
    rows = worker.rows_of(Job(str(run), measures=measures))
    assert called == ["best"]
    assert [row["weights"] for row in rows] == ["best", "last"]
    assert rows[0]["accuracy"] == rows[1]["accuracy"]
    called.clear()
    weights = load_file(run / FILES["best"])
    save_file({name: 2 * own for name, own in weights.items()}, run / FILES["best"])
    rows = worker.rows_of(Job(str(run), measures=measures))
    assert called == ["best", "last"]


def test_rows_lie_where_tables_and_pictures_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RESULTS in {*(Path(__file__).parents[2] / "bench" / "results").glob("*.jsonl")}
    file = tmp_path / "figure.svg"
    monkeypatch.setattr(sys, "argv", ["figure", "--scale", "reduced", str(file)])
    experiment_figure.main()
    assert "PGD-AT" in file.read_text()


def test_a_picture_of_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of("SAFER, auto", 0, 0.3)))
    words = ["figure", "--scale", "reduced", "--rows", str(file), str(tmp_path / "figure.svg")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as error:
        experiment_figure.main()
    assert error.value.code == 2
    assert "--scale: expected rows of arms of reduced" in capsys.readouterr().err


def test_a_part_of_the_experiment_is_that_part() -> None:
    wanted = Wanted([MODEL], starts=[LATE], num_seeds=2, arms=["SAFER"])
    tasks = tasks_of(TINY, wanted)
    assert {task.kind for task in tasks} == {"start", "arm", "select", "autoattack"}
    assert {task.arm for task in tasks} == {"start", "SAFER"}
    assert {task.start for task in tasks if task.kind != "start"} == {LATE}
    assert {task.seed for task in tasks} == {0, 1}
    assert {task.arm for task in tasks if task.kind == "autoattack"} == {"SAFER"}
    (attacked,) = tasks_of(TINY, replace(wanted, arms=["start"], kinds=["autoattack"]))[1:]
    assert (attacked.arm, attacked.start) == ("start", LATE)
    without = replace(wanted, kinds=["arm"])
    assert tasks_of(TINY, without) == [t for t in tasks if t.kind in ("start", "arm")]


def test_other_settings_and_another_start_are_another_task(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path)
    start = tmp_path / Task("start", MODEL).name
    start.mkdir()
    for name in ("best.safetensors", "model.safetensors"):
        (start / name).write_bytes(name.encode())
    task = Task("arm", MODEL, PEAK, "SAFER")
    about = jobs.about(task)
    others = [
        jobs.about(Task("arm", MODEL, LATE, "SAFER")),
        jobs.about(Task("arm", MODEL, PEAK, "random, SAM")),
        jobs.about(Task("arm", MODEL, PEAK, "SAFER", 1)),
        jobs.about(Task("autoattack", MODEL, PEAK, "SAFER")),
        jobs_in(tmp_path, replace(TINY, arm_epochs=2)).about(task),
        jobs_in(tmp_path, replace(TINY, test_images=9)).about(task),
    ]
    (start / "best.safetensors").write_bytes(b"other weights")
    others.append(jobs_in(tmp_path).about(task))
    assert all(other != about for other in others)
    results = jobs.results
    results.add([about | {"what": "experiment", "figure": "accuracy"}])
    assert results.has(about)
    assert not any(results.has(other) for other in others)
    again = Results(results.file)
    again.add([about | {"what": "experiment", "figure": "accuracy"}])
    assert len(read_rows(results.file)) == 1


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = Job("run", ["--seed=1"], [Measure("best", "test", ["clean"], "x", 3)], about={"a": 1})
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


# -- a whole experiment


def run_command(monkeypatch: pytest.MonkeyPatch, images: tuple[Path, Path], *words: str) -> None:
    monkeypatch.setitem(SCALES, "tiny", TINY)
    folder = images[0].parent
    flags = ["--scale=tiny", f"--folder={folder / 'runs'}", f"--output={folder / 'rows.jsonl'}"]
    words = (f"--train={images[0]}", f"--test={images[1]}", *flags, *words)
    monkeypatch.setattr(sys, "argv", ["bench.experiment", *words])
    experiment.main()


def test_an_experiment_is_stopped_and_goes_on_and_does_nothing_twice(
    images: tuple[Path, Path],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(subprocess, "Popen", server.popen)  # workers that have imported already
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # threads of one would wait for other tests
    only = ("--seeds=1", "--starts=peak", "--arms=SAFER;start")
    run_command(monkeypatch, images, *only, "--budget-minutes=0.01")
    assert "stopped, resumes in the next call" in capsys.readouterr().out
    assert not (images[0].parent / "rows.jsonl").exists()
    run_command(monkeypatch, images, *only, "--jobs=2")
    printed = capsys.readouterr().out
    assert "0 left" in printed
    assert "| SAFER | 1 |" in printed
    file = images[0].parent / "rows.jsonl"
    rows = read_rows(file)
    found = {(row["task"], row["figure"]) for row in rows}
    assert found == {
        ("start", "training"),
        ("start", "accuracy"),
        ("select", "selection"),
        ("arm", "training"),
        ("arm", "accuracy"),
        ("autoattack", "accuracy"),
    }
    (training,) = (row for row in rows if (row["task"], row["figure"]) == ("arm", "training"))
    (selection,) = training["selections"]
    (scores,) = (row for row in rows if row["figure"] == "selection")
    assert len(selection["selected"]) == 1
    assert set(scores["criteria"]) >= {"sharpness-absolute", "criticality"}
    measured = {
        (row["weights"], row["split"], row["attack"])
        for row in rows
        if (row["task"], row["figure"]) == ("arm", "accuracy")
    }
    on_test = {(w, "test", a) for w in ("best", "last") for a in ("clean", "pgd-20")}
    assert measured == on_test | {("last", s, "pgd-20") for s in ("train", "validation")}
    before = file.read_bytes()
    run_command(monkeypatch, images, *only)
    assert "5 tasks, 5 of them done" in capsys.readouterr().out
    assert file.read_bytes() == before
    run_command(monkeypatch, images, *only, "--list")
    assert capsys.readouterr().out.count("done") == 5
    # the runs are lost, and AutoAttack of the arm is left: both trainings are repeated
    shutil.rmtree(images[0].parent / "runs")
    kept = [
        line
        for line in before.splitlines(keepends=True)
        if (json.loads(line)["task"], json.loads(line)["arm"]) != ("autoattack", "SAFER")
    ]
    file.write_bytes(b"".join(kept))
    run_command(monkeypatch, images, *only, "--jobs=2")
    printed = capsys.readouterr().out
    titles = [f"{MODEL}: {what}" for what in ("shared start", "AutoAttack on SAFER")]
    assert all(f" s: {title}" in printed for title in titles)
    assert printed.count(" s: ") == 3
    assert "left, which wait" not in printed
    found_again = [_without_times(row) for row in read_rows(file)]
    assert sorted(found_again, key=str) == sorted(map(_without_times, rows), key=str)


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    times = ("date", "seconds", "seconds_per_epoch", "commit")
    return {name: value for name, value in row.items() if name not in times}


def test_validation_images_are_no_training_images(
    images: tuple[Path, Path], tmp_path: Path
) -> None:
    files = experiment._split(TINY, *images, tmp_path / "data")
    parts = {name: pq.read_table(file).to_pylist() for name, file in files.items()}
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [24, 8, 8]
    pictures = {name: {row["image"]["bytes"] for row in rows} for name, rows in parts.items()}
    assert not pictures["train"] & pictures["validation"]
    assert parts["test"] == pq.read_table(images[1]).to_pylist()[:8]
    with pytest.raises(ValueError, match="expected 1008 images or more, got 40"):
        experiment._split(replace(TINY, train_images=1000), *images, tmp_path / "more")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--arms=SAFER;nothing", "--arms: expected some of start; PGD-AT"),
        ("--models=resnet", "--models: expected some of vit_tiny"),
        ("--starts=early", "--starts: expected some of peak; late, got 'early'"),
        (
            "--kinds=attack",
            "--kinds: expected some of search; select; arm; autoattack, got 'attack'",
        ),
        ("--seeds=0", "--seeds: expected at least 1, got 0"),
        ("--train=nowhere", "expected a file, got nowhere"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(
    flag: str,
    message: str,
    images: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        run_command(monkeypatch, images, flag)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_too_few_images_are_refused_in_one_line(
    images: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        run_command(monkeypatch, (images[1], images[1]))
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: --train: expected 32 images or more, got 12\n"


class Failing(Jobs):
    """Jobs whose workers find nothing to do it on."""

    def job(self, task: Task) -> Job:
        return Job("nowhere", measures=[Measure("best", "test", ["clean"], "nowhere", 1)])


def test_a_worker_that_fails_is_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = Pool(Failing(**vars(jobs_in(tmp_path))), 1, time.monotonic() + 60)
    assert pool.run([Task("start", MODEL), Task("arm", MODEL, PEAK, "SAFER")]) == 1
    printed = capsys.readouterr().out
    assert "failed, exit 1" in printed
    assert "2 left, which wait" in printed


def test_a_signal_ends_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(Failing(**vars(jobs_in(tmp_path))), 1, time.monotonic() + 60)
    begun: list[Any] = []

    def begin(task: Task) -> None:
        Pool._begin(pool, task)
        begun.extend(worker.process for worker in pool._workers)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(pool, "_begin", begin)
    with pytest.raises(SystemExit) as error:
        pool.run([Task("start", MODEL)])
    assert error.value.code == 128 + signal.SIGTERM
    assert [process.returncode is not None for process in begun] == [True]


# -- tables


def rows_of(arm: str, seed: int, accuracy: float, **changes: Any) -> list[dict[str, Any]]:
    """All rows of an arm's run, with this accuracy everywhere on test images."""
    shared = {
        "what": "experiment",
        "task": "arm",
        "case": "reduced",
        "model": MODEL,
        "start": PEAK,
        "start_id": "one",
        "arm": arm,
        "seed": seed,
        "num_train_images": 9000,
        "device": "cpu",
        "num_threads": 1,
        "torch": "2.14",
        "date": "2026-01-01T00",
    } | changes
    curve = [accuracy, accuracy]
    names = ("train_robust_accuracy", "clean_accuracy", "robust_accuracy", "validation_loss")
    training = {
        "figure": "training",
        "num_epochs": 2,
        "best_epoch": 1,
        "seconds_per_epoch": 3.0,
        "seconds": 7.0,
        "num_weights": 2_000_000,
        "attack_steps": 3,
        "augmentation": "none",
        "curves": dict.fromkeys(names, curve),
        "selections": [{"epoch": 1, "selected": ["blocks.1.mlp.fc1"], "cut": 1}],
    }
    splits = [("best", "test"), ("last", "test"), ("last", "train"), ("last", "validation")]
    accuracies = [
        {
            "figure": "accuracy",
            "weights": weights,
            "split": split,
            "attack": attack,
            "epsilon": 8 / 255,
            "accuracy": accuracy + 0.1 * (split == "train"),
            "num_images": 1000,
        }
        for weights, split in splits
        for attack in ("clean", "pgd-20")
    ]
    return [shared | row for row in [training, *accuracies]]


def test_holms_correction_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_search_keeps_clean_accuracy_where_it_can() -> None:
    base, near, far = Found(BASELINE, 0.5, 0.3), Found("a", 0.496, 0.31), Found("b", 0.48, 0.32)
    assert chosen([base, near, far]) == "a"
    assert chosen([base, Found("c", 0.51, 0.305), near]) == "a"
    assert chosen([base, far, Found("d", 0.47, 0.31)]) == "b"  # none keeps it: the highest sum
    assert chosen([near, far]) is None
    assert chosen([base]) is None


def test_what_was_fixed_in_advance_has_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "reduced", replace(TINY, compared=(BASELINE, "SAFER")))
    rows = a_table()
    assert "PGD-AT" not in experiment_tables(rows)
    assert "rho 0.2" not in sensitivity_tables(rows)
    text = compared_tables(rows)
    assert "| SAFER | 3 | 34.3 ± 1.5 | 34.3 ± 1.5 | - | 34.3 ± 1.5 | 34.3 ± 1.5 | - |" in text
    p = 2 * ttest_rel([0.33, 0.34, 0.36], [0.30, 0.32, 0.31]).pvalue  # of two comparisons
    assert f"| SAFER | +3.3 ± 1.5 (p {p:.2g}) | +3.3 ± 1.5 (p {p:.2g}) | - |" in text
    held = {"task": "search", "seed": 9}
    searched = [
        row | held | ({"split": "validation"} if row["figure"] == "accuracy" else {})
        for arm, accuracy in ((BASELINE, 0.3), (QUARTER, 0.31))
        for row in rows_of(arm, 9, accuracy)
        if row.get("split") in (None, "test")
    ]
    assert compared_tables(rows + searched) == text
    assert f"| **{QUARTER}** | 31.0 | 31.0 |" in search_tables(rows + searched)


def a_table() -> list[dict[str, Any]]:
    values = {BASELINE: (0.30, 0.32, 0.31), "SAFER": (0.33, 0.34, 0.36), "SAFER, rho 0.2": (0.2,)}
    rows = [r for arm, own in values.items() for s, v in enumerate(own) for r in rows_of(arm, s, v)]
    start = rows_of("start", 0, 0.25, task="start", late_id="last one")
    return (
        rows + start + [row | {"weights": "best"} for row in start if row["figure"] != "training"]
    )


def test_the_table_has_means_deviations_and_paired_differences() -> None:
    text = experiment_tables(a_table())
    assert "| start | - | 25.0 | 25.0 | - |" in text
    assert (
        "| SAFER | 3 | 34.3 ± 1.5 | 34.3 ± 1.5 | - | 34.3 ± 1.5 | 34.3 ± 1.5 | 10.0 ± 0.0 |" in text
    )
    p = ttest_rel([0.33, 0.34, 0.36], [0.30, 0.32, 0.31]).pvalue
    assert f"| SAFER | +3.3 ± 1.5 (p {p:.2g}) |" in text
    assert "rho 0.2" not in text
    sensitivity = sensitivity_tables(a_table())
    assert "| SAFER, rho 0.2 | -10.0 |" in sensitivity
    for fact in (
        "9,000 images",
        "PGD-3",
        "epsilon 8/255",
        "1,000 test images",
        "2,000,000 weights",
    ):
        assert fact in " ".join(text.split()), fact


def test_differences_without_spread_or_without_pairs_have_no_p() -> None:
    assert paired([(0.5, 0.4)]) == "+10.0"
    assert paired([(0.5, 0.4), (0.75, 0.65)]).startswith("+10.0")
    assert paired([(0.5, 0.25), (0.75, 0.5)]) == "+25.0 ± 0.0"


def test_rows_of_another_start_are_left_out_and_the_newest_count() -> None:
    rows = a_table()
    later = rows_of("SAFER", 0, 0.5, start_id="two", date="2026-01-02T00")
    (group,) = groups_of(rows + later)
    assert group.arms() == ["SAFER"]
    again = rows_of("SAFER", 0, 0.4, date="2026-01-01T01")
    (group,) = groups_of(rows + again)
    assert group.accuracies("SAFER", "best", "clean") == {0: 0.4, 1: 0.34, 2: 0.36}


def test_trainings_of_the_start_stand_apart_and_are_paired_together() -> None:
    other: dict[str, Any] = {"start_id": "two", "date": "2026-01-02T00"}
    more = {BASELINE: (0.50, 0.50), "SAFER": (0.54, 0.52)}
    later = [
        row
        for arm, own in more.items()
        for seed, value in enumerate(own)
        for row in rows_of(arm, seed, value, **other)
    ]
    start = rows_of("start", 0, 0.45, task="start", late_id="last two", **other)
    start += [row | {"weights": "best"} for row in start if row["figure"] != "training"]
    rows = a_table() + later + start
    newest = experiment_tables(rows)
    assert "| start | - | 45.0 |" in newest
    assert "| SAFER | 2 | 53.0 ± 1.4 |" in newest
    earlier, together = earlier_tables(rows).split("2 trainings of it together")
    assert "| start | - | 25.0 |" in earlier
    assert "| SAFER | 3 | 34.3 ± 1.5 |" in earlier
    p = ttest_rel([0.33, 0.34, 0.36, 0.54, 0.52], [0.30, 0.32, 0.31, 0.50, 0.50]).pvalue
    assert f"(p {p:.2g}) |" in together
    assert earlier_tables(a_table()) == "None.\n"


def test_a_late_start_is_the_last_weights_of_the_start(tmp_path: Path) -> None:
    rows = [row for row in a_table() if row["arm"] == "start"]
    rows += rows_of("SAFER", 0, 0.3, start=LATE, start_id="last one")
    (group,) = groups_of(rows)
    assert set(group.arms()) == {"SAFER", "start"}
    assert group.accuracies("start", "best", "clean") == {0: 0.25}
    jobs = jobs_in(tmp_path)
    start = Task("start", MODEL)
    assert jobs.about(start)["start_id"] is None
    run = tmp_path / start.name
    run.mkdir()
    for name in ("best.safetensors", "model.safetensors"):
        (run / name).write_bytes(name.encode())
    about = jobs.about(start)
    assert about["start_id"] == jobs.about(Task("arm", MODEL, PEAK, "SAFER"))["start_id"]
    assert about["late_id"] == jobs.about(Task("arm", MODEL, LATE, "SAFER"))["start_id"]
    rows = [{"what": "experiment", "figure": "accuracy"} | about]
    rows[0] |= {"start_id": None, "late_id": None}  # as its worker begins
    jobs.file(start).with_suffix(".rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert jobs.is_done(start)
    (row,) = read_rows(jobs.results.file)
    assert (row["start_id"], row["late_id"]) == (about["start_id"], about["late_id"])


def test_the_layers_that_were_chosen_are_in_a_table() -> None:
    selection = {
        "figure": "selection",
        "task": "select",
        "images": 512,
        "attack": "pgd-3",
        "rho": 0.05,
        "criteria": {"criticality": {"selected": ["head"], "scores": {"head": 2.0, "stem": 1.0}}},
    }
    shared = {key: value for key, value in a_table()[0].items() if key not in ("figure", "task")}
    rows = [*a_table(), {**shared, **selection, "arm": "start"}]
    assert "| criticality | `head` | `head`, `stem` |" in selection_tables(rows)
    line = "| SAFER | 0 | 1: `blocks.1.mlp.fc1` (suffix from 1) |"
    assert choice_tables(rows).count(line) == 1
    searched = choice_tables([*rows, *(row | {"task": "search"} for row in a_table())])
    assert searched.count(line) == 2
    assert "reduced, search: " in searched


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_figure_shows_every_arm(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in a_table()))
    file = tmp_path / f"figure.{ending}"
    words = [str(file), "--scale", "reduced", "--rows", str(rows)]
    monkeypatch.setattr(sys, "argv", ["bench.experiment.figure", *words])
    experiment_figure.main()
    assert file.stat().st_size > 1000
    if ending == "svg":
        text = file.read_text()
        assert "SAFER" in text
        assert "PGD-AT (3)" in text
        experiment_figure.main()
        assert file.read_text() == text


def test_the_figure_of_what_was_fixed_in_advance_shows_autoattack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = (BASELINE, "SAFER", "SAFER, rho 0.2")
    monkeypatch.setitem(SCALES, "reduced", replace(TINY, compared=compared))
    attacked = [
        row | {"attack": "autoattack"}
        for row in a_table()
        if row.get("attack") == "pgd-20" and row["split"] == "test"
    ]
    file = tmp_path / "figure.svg"
    experiment_figure.draw(groups_of([*a_table(), *attacked]), file)
    text = file.read_text()
    assert "AutoAttack" in text
    assert "PGD-20" not in text
    assert "SAFER, rho 0.2 (1)" in text
    assert "last epoch" in text


def test_flags_are_written_as_the_command_line_reads_them() -> None:
    assert experiment_jobs._as_flag(["clean", "pgd-20"]) == "clean,pgd-20"
    assert experiment_jobs._as_flag({"depth": 4}) == '{"depth": 4}'
    assert experiment_jobs._as_flag(None) == "null"
    assert experiment_jobs._as_flag(True) == "true"
    assert experiment_jobs._as_flag("8/255") == "8/255"
