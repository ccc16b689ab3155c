"""Several threat models, data sets and corruptions: each figure is that of an evaluation alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safer_fast import EvaluateConfig, evaluate_run, export, report, train, train_model
from safer_fast import evaluate as command
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import ExportConfig
from safer_fast.data.corrupted import Corruption, corrupt
from safer_fast.evaluation.run import Evaluator
from safer_fast.evaluation.several import table
from safer_fast.runs.accuracies import distinct_names, named_apart
from safer_fast.runs.exporters.facts import measured_accuracies
from safer_fast.runs.report.evaluations import weights_and_splits
from safer_fast.runs.report.reading import read_runs
from safer_fast.runtime.command import run
from tests.support import small_runs
from tests.support.ranks import Team, assert_status

ATTACKS = "clean,pgd-2,apgd-ce"
BALLS = "linf:0.05,l2:1/2,l1:2"
NUM_IMAGES = 20
TWO = np.zeros((2, 8, 8), np.uint8), [0, 1]


@pytest.fixture
def folder(small_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_run, tmp_path / "run")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Noise in the format of the digits."""
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=images, labels=np.arange(NUM_IMAGES) % 10)
    return tmp_path / "noise.npz"


def flags_of(folder: Path, other: object, file: Path) -> list[str]:
    words = [str(folder), f"--attacks={ATTACKS}", f"--threat-models={BALLS}"]
    words += [f"--num-images={NUM_IMAGES}", f"--other-data={other}", f"--json={file}"]
    return [*words, "--device=cpu"]


def figure_of(row: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("split", "attack", "norm", "epsilon", "accuracy", "loss", "num_images")
    return tuple(row[key] for key in keys)


@pytest.mark.slow
def test_a_table_holds_the_figures_of_evaluations_alone(
    folder: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    command.main(flags_of(folder, other, file))
    output = capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert len(rows) == 2 * (3 + 2 + 1)  # clean once, and no pgd in l1
    assert "note: l1 2: pgd-2 left out, made for linf and l2" in output
    single = {figure_of(row) for row in rows if row["norm"] == "l2"}
    for path in (None, str(other)):
        found = evaluate_run(
            str(folder),
            attacks="pgd-2",
            norm="l2",
            epsilon="1/2",
            num_images=NUM_IMAGES,
            path=path,
            fresh=True,
        )
        alone = {(f.split, f.attack, f.norm, f.epsilon, f.accuracy, f.loss) for f in found}
        assert alone <= {figure[:-1] for figure in single}
    lines = output.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("accuracy in %"))
    assert [line.split()[0] for line in lines[start + 1 :]][:2] == ["test", "noise"]
    assert "pgd-2 l2 0.5" in lines[start]
    assert "apgd-ce l1 2" in lines[start]
    robust = next(r for r in rows if (r["attack"], r["norm"]) == ("apgd-ce", "l1"))
    clean = next(r for r in rows if r["attack"] == "clean")
    assert robust["accuracy"] <= clean["accuracy"]


def test_attacks_that_nobody_named_are_made_for_the_norm(folder: Path) -> None:
    settings = {"norm": "l1", "epsilon": 2, "num_images": 4, "device": "cpu"}
    found = evaluate_run(folder, **settings)
    assert [accuracy.attack for accuracy in found] == ["clean", "apgd-ce"]
    norms = {"threat_models": ["linf:1/255", "l1:2"], "num_images": 4, "device": "cpu"}
    found = evaluate_run(folder, **norms)
    attacks = [(accuracy.attack, accuracy.norm) for accuracy in found]
    ours = [("clean", None), ("fgsm", "linf"), ("pgd-20", "linf")]
    assert attacks == [*ours, ("apgd-ce", "l1")]


def test_what_a_fresh_table_has_measured_stays(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"attacks": "pgd-1", "other_data": str(other), "num_images": 4, "device": "cpu"}
    several = {"threat_models": ["linf:1/255", "linf:2/255"]}
    first = evaluate_run(folder, fresh=True, **settings, **several)
    measured: list[str] = []
    measure = Evaluator._measure

    def counting(self: Evaluator, name: str, *rest: Any) -> Any:
        measured.append(name)
        return measure(self, name, *rest)

    monkeypatch.setattr(Evaluator, "_measure", counting)
    assert evaluate_run(folder, **settings, **several) == first
    assert measured == []
    assert evaluate_run(folder, fresh=True, **settings, **several) == first
    assert measured == ["clean", "pgd-1", "pgd-1"] * 2  # clean images once, not for each ball


def test_a_table_of_distances_has_means_of_corruptions_too() -> None:
    facts = {"split": "test", "norm": None, "epsilon": 0.0, "attack": "clean", "accuracy": None}
    rows: list[dict[str, Any]] = [{**facts, "embedding_distance": 0.25}]
    rows += [
        {**facts, "corruption": name, "severity": severity, "embedding_distance": value}
        for name, value in (("fog", 1.0), ("snow", 3.0))
        for severity in (1, 2)
    ]
    lines = [line.split() for line in table(rows).splitlines()]
    assert lines[0] == ["embedding", "distance", "clean"]
    assert lines[1:] == [
        ["test", "0.25"],
        ["fog", "1"],
        ["snow", "3"],
        ["mean", "of", "2", "corruptions", "2"],
    ]


def evaluate_in_rank(words: list[str]) -> None:
    command.main(words)


def test_ranks_find_the_same_table(folder: Path, other: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(folder, tmp_path / "alone")
    files = tmp_path / "two.json", tmp_path / "one.json"
    words = [
        flags_of(place, other, file) for place, file in zip((folder, alone), files, strict=True)
    ]
    words = [[word.replace(",apgd-ce", ",fgsm") for word in some] for some in words]
    words = [[word.replace(",l1:2", "") for word in some] for some in words]
    assert_status(0, Team(2, evaluate_in_rank, words[0]).endings())
    command.main(words[1])
    two, one = (json.loads(file.read_text()) for file in files)
    assert [figure_of(row) for row in two] == [figure_of(row) for row in one]


@pytest.fixture(scope="session")
def large_run(once: Callable[..., Path]) -> Path:
    """A run on digits of 32 pixels."""
    flags = ["--data.image_size=32", "--model.patch_size=16", "--data.max_images=64"]
    flags.append(f"--data.test_path={small_runs.TEST_IMAGES}")
    return once("run-of-32-pixels", partial(run_tiny, flags=flags))


def run_tiny(folder: Path, flags: list[str]) -> Path:
    return small_runs.run(folder, *small_runs.TINY, *flags)


def test_corruptions_are_made_on_the_fly_and_averaged(
    large_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("imagecorruptions")
    folder = shutil.copytree(large_run, tmp_path / "run")
    words = [str(folder), "--attacks=clean", "--corruptions=contrast,glass_blur", "--device=cpu"]
    words += ["--num-images=40", f"--json={tmp_path / 'a.json'}"]
    command.main(words)
    first = json.loads((tmp_path / "a.json").read_text())
    assert "mean of 2 corruptions" in capsys.readouterr().out
    made = [(row.get("corruption"), row.get("severity")) for row in first]
    expected = [(name, number) for name in ("contrast", "glass_blur") for number in range(1, 6)]
    assert made == [(None, None), *expected]
    assert len({row["loss"] for row in first}) == len(first)
    # measured again: corrupted images and figures are the same
    command.main([*words, "--fresh", "--batch-size=7"])
    again = json.loads((tmp_path / "a.json").read_text())
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in first]
    assert np.allclose([r["loss"] for r in again], [r["loss"] for r in first], rtol=0, atol=1e-4)
    assert '"split": "test, contrast 5"' in (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_corruption_depends_on_its_seed_alone(mode: str) -> None:
    pytest.importorskip("imagecorruptions")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    for name in ("glass_blur", "shot_noise", "fog"):
        np.random.seed(3)
        before = np.random.get_state()[1].copy()
        one, two, other = (corrupt(image, Corruption(name, 3), seed) for seed in (5, 5, 6))
        assert np.array_equal(np.random.get_state()[1], before)
        assert one.mode == mode
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)
        assert not np.array_equal(one, image)


def test_the_table_has_a_line_for_each_corruption_and_their_mean() -> None:
    def row(split: str, accuracy: float, **own: Any) -> dict[str, Any]:
        plain = {"attack": "clean", "norm": None, "epsilon": 0.0}
        return {"split": split, "accuracy": accuracy, **plain, **own}

    rows = [row("test", 0.9), row("test, fog 1", 0.5, corruption="fog", severity=1)]
    rows += [row("test, fog 2", 0.3, corruption="fog", severity=2)]
    rows += [row("test, snow 1", 0.2, corruption="snow", severity=1)]
    lines = [line.split() for line in table(rows).splitlines()]
    assert [line[-1] for line in lines] == ["clean", "90.00", "40.00", "20.00", "30.00"]


def test_data_of_the_same_name_have_lines_of_their_own(
    folder: Path, other: Path, tmp_path: Path
) -> None:
    for number in range(2):
        place = tmp_path / f"set-{number}"
        place.mkdir()
        shutil.copy(other, place / "1.npz")
    copies = [str(tmp_path / name / "1.npz") for name in ("set-0", "set-1")]
    file = tmp_path / "a.json"
    command.main([*flags_of(folder, ",".join(copies), file), "--attacks=clean"])
    assert [row["split"] for row in json.loads(file.read_text())] == ["test", "set-0/1", "set-1/1"]


@pytest.fixture
def same_names(other: Path, tmp_path: Path) -> list[Path]:
    """Two files of one name, and one that is named as the run's own split, of other images each."""
    copies = [tmp_path / place for place in ("a/1.npz", "b/1.npz", "c/test.npz")]
    with np.load(other) as file:
        for number, copy in enumerate(copies):
            copy.parent.mkdir()
            labels = (file["labels"] + number) % 10
            np.savez(copy, images=np.roll(file["images"], number, 0), labels=labels)
    return copies


def test_files_of_one_name_evaluated_one_by_one_are_told_apart(
    folder: Path, same_names: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    words = [str(folder), "--attacks=clean", "--device=cpu"]
    command.main([*words, "--num-images=20"])
    for file in (*same_names, Path("a/1.npz")):
        command.main([*words, "--path", str(file)])
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [event for event in events if event["event"] == "evaluation"][-4:]
    assert [event.get("path") for event in measured] == [None, *map(str, same_names)]
    assert [event["split"] for event in measured] == ["test", "1", "1", "test"]
    (run,) = read_runs([folder])
    splits = {split for weights, split in weights_and_splits(run) if weights == "last"}
    assert splits == {"test", "a/1", "b/1", "c/test"}
    card = measured_accuracies(ExportConfig(str(folder)), "linf")
    clean = [row["split"] for row in card if row["attack"] == "clean"]
    assert clean == ["test", "test", "a/1", "b/1", "c/test"]
    rows = evaluate_run(
        folder, attacks="clean", path=str(same_names[0]), other_data=[str(same_names[1])]
    )
    assert [row.split for row in rows] == ["a/1", "b/1"]


def test_data_of_earlier_versions_which_name_no_path_keep_their_names() -> None:
    def split(name: str, path: str | None = None) -> dict[str, Any]:
        return {"split": name} | ({} if path is None else {"path": path})

    alone = [split("1", "/a/1.npz"), split("test")]
    assert named_apart(alone) == alone
    damaged = [{"split": "1", "path": path} for path in ([1], 3, "", None)]
    assert named_apart(damaged) == damaged
    events = [split("1"), split("1", "/a/1.npz"), split("1, fog 3", "/a/1.npz"), split("digits")]
    assert [event["split"] for event in named_apart(events)] == ["1", "a/1", "1, fog 3", "digits"]


def test_other_data_may_be_held_by_python(
    folder: Path, other: Path, same_names: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(other) as file:
        images, labels = file["images"], file["labels"]
    held: dict[str, Any] = {"noise": (images, labels), "file": same_names[1]}
    rows = evaluate_run(folder, attacks="clean,fgsm", other_data=held, num_images=20)
    assert [row.split for row in rows] == ["test", "test", "noise", "noise", "file", "file"]
    for path, name in ((other, "noise"), (same_names[1], "file")):
        alone = evaluate_run(folder, attacks="clean,fgsm", path=str(path), num_images=20)
        own = [row for row in rows if row.split == name]
        assert [(r.accuracy, r.loss) for r in own] == [(r.accuracy, r.loss) for r in alone]
    config = EvaluateConfig(str(folder), attacks="clean", other_data={"noise": (images, labels)})  # type: ignore[arg-type]
    given = evaluate_run(config, data=(images[:5], labels[:5]))
    assert [(row.split, row.num_images) for row in given] == [("given", 5), ("noise", 20)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(np.zeros((2, 8, 8)), [0, 1])], "expected paths, or data sets and paths by name in a"),
        ({"noise": np.zeros((2, 8, 8))}, "expected images and labels as two arrays"),
        ({"test": (np.zeros((2, 8, 8)), [0, 1])}, "expected names of their own, got 'test'"),
        ({"noise": "none.npz"}, r"expected a \.parquet"),
        ({2024: TWO}, "expected names that are texts of one line, got 2024"),
        ({"v2": TWO, "": TWO}, "expected names that are texts of one line, got ''"),
        ({" ": TWO}, "expected names that are texts of one line, got ' '"),
        ({"a,b\n|c": TWO}, r"expected names that are texts of one line, got 'a,b\\n\|c'"),
        (3, "expected paths, or data sets"),
    ],
    ids=["list", "array", "test", "path", "name", "no-name", "space", "two-lines", "number"],
)
def test_what_is_no_other_data_gets_one_line(data: Any, message: str, folder: Path) -> None:
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"^other_data: {message}") as caught:
        evaluate_run(folder, attacks="clean", other_data=data)
    assert "\n" not in str(caught.value)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_figures_of_a_command_name_the_step_of_those_of_training(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    for weights in ("last", "best"):
        command.main(
            [str(folder), "--attacks=clean,fgsm", f"--weights={weights}", "--num-images=9"]
        )
    events = [json.loads(line) for line in file.read_text().splitlines()]
    measured = [event for event in events if event["event"] == "evaluation"]
    places = {(e["weights"], e["epoch"], e["step"]) for e in measured if e["weights"] != "start"}
    end = next(event for event in events if event["event"] == "end")
    assert end["step"] > 0
    assert places == {(weights, end["epoch"], end["step"]) for weights in ("last", "best")}
    assert {event["num_images"] for event in measured} == {80, 9}


def test_report_and_card_survive_data_whose_name_is_no_text(folder: Path) -> None:
    evaluate_run(folder, attacks="clean", num_images=2)
    with (folder / "metrics.jsonl").open("r+") as file:
        event = json.loads(file.readlines()[-1])
        for name in (2024, ["test"], {"a": 1}, True):  # an earlier version wrote any name
            file.write(json.dumps(event | {"split": name, "accuracy": 0.125}) + "\n")
    report.main([str(folder)])
    assert "12.5" in (folder / "report.html").read_text()
    card = measured_accuracies(ExportConfig(str(folder)), "linf")
    assert {row["split"] for row in card} == {"test"}


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinct_names(["a/x.npz", "b/y.npz"]) == ["x", "y"]
    assert distinct_names(["a/b/x", "a/c/x.npz"]) == ["b/x", "c/x"]
    assert distinct_names(["k/b/x", "l/b/x", "z"]) == ["k/b/x", "l/b/x", "z"]
    assert distinct_names(["sets/test.npz"]) == ["sets/test"]
    assert distinct_names(["x.npz", "x.parquet"]) == ["x.npz", "x.parquet"]


def test_missing_data_are_named_before_anything_is_measured(folder: Path) -> None:
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"^other_data: expected a \.parquet"):
        evaluate_run(str(folder), attacks="clean", other_data="none.npz", fresh=True)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not list((folder / "evaluation").glob("*"))


def test_data_that_do_not_fit_are_named_before_anything_is_attacked(
    folder: Path, tmp_path: Path
) -> None:
    classes = tmp_path / "pictures"
    for name in ("airplane", "ship"):
        (classes / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(classes / name / "1.png")
    message = r"^other_data: expected the class names of the training data, got airplane"
    with pytest.raises(ValueError, match=message):
        evaluate_run(str(folder), attacks="clean,pgd-2", other_data=str(classes), fresh=True)
    assert not list((folder / "evaluation").glob("*"))
    with pytest.raises(ValueError, match=r"^(threat_models|epsilon): expected"):
        evaluate_run(str(folder), attacks="clean,pgd-2", threat_models="linf:0.1,l2:900")
    assert not list((folder / "evaluation").glob("*"))


def test_data_held_by_python_are_not_called_training_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    own, others = (
        (rng.integers(0, 256, (16, 8, 8), dtype=np.uint8), np.arange(16) % 4) for _ in range(2)
    )
    run_ = tmp_path / "run"
    extra = "--data.extra_fraction=0.5"
    config = parse_config([*small_runs.TINY, extra, "--output", str(run_)])
    train_model(config, data={"train": own, "test": others, "extra": own})
    assert "does nothing" not in capsys.readouterr().out
    [row] = evaluate_run(str(run_), attacks="clean", data=others)
    assert row.split == "given"
    assert "trained on" not in capsys.readouterr().out


def test_training_images_are_called_that_wherever_their_accuracy_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, run_ = np.random.default_rng(0), tmp_path / "run"
    for name, count in (("pics", 24), ("others", 8)):
        images = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(count) % 4)
    path = f"--data.path={tmp_path / 'pics.npz'}"
    train.main([*small_runs.TINY, path, "--output", str(run_)])
    own, others = tmp_path / "pics.npz", tmp_path / "others.npz"
    words = ["--attacks=clean,autoattack", "--num-images=4", "--device=cpu"]
    capsys.readouterr()
    command.main([str(run_), *words, f"--path={own}", f"--other-data={others}"])
    printed = capsys.readouterr().out
    assert "note: pics holds images that the run was trained on" in printed
    assert "others holds" not in printed
    assert re.search(r"^pics \(training images\) +\d", printed, re.M)
    export.main([str(run_), "--format=hub"])
    card = (run_ / "export-hub" / "README.md").read_text()
    assert "| pics (training images) | autoattack |" in card
    assert "| others | autoattack |" in card
    report.main([str(run_)])
    assert "pics (training images)" in (run_ / "report.html").read_text()
    capsys.readouterr()
    export.main([str(run_), "--format=robustbench"])
    assert "which --claim-data names: others\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="got training images: pics"):
        export.main([str(run_), "--format=robustbench", f"--claim-data={own}", "--output=x"])


MISTAKES = {
    "no radius": ("--threat-models=linf", "--threat-models: expected linf:EPSILON, l2:EPSILON or"),
    "no such norm": ("--threat-models=l7:1", "--threat-models: expected linf:EPSILON, l2:EPSILON"),
    "too large": (
        "--threat-models=linf:8",
        "--threat-models: expected 0 to 1, got 8: did you mean",
    ),
    "beside": (
        "--threat-models=l2:1 --norm=l2",
        "--threat-models: expected no --norm or --epsilon",
    ),
    "nothing for l1": ("--attacks=pgd-2 --threat-models=l1:2", "--attacks: expected an attack for"),
    "no attack": ("--attacks=", "--attacks: expected at least one attack, got none"),
    "pgd in l1": (
        "--norm=l1 --epsilon=1 --attacks=clean,pgd-2",
        "--attacks: expected attacks for l1",
    ),
    "unknown": ("--corruptions=fogg", "did you mean fog?"),
    "too small": ("--corruptions=fog", "--corruptions: expected images of at least 32 pixels"),
    "no such data": ("--other-data=none.npz", "--other-data: expected a .parquet"),
    "a part of a flag": ("--num-imag=3", "unknown flag --num-imag, did you mean --num-images"),
    "no such folder": ("--json=none/a.json", "--json: expected a file in a folder that exists"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "too small":
        pytest.importorskip("imagecorruptions")
    words, message = MISTAKES[case]
    given = [str(folder), "--num-images=2", "--device=cpu", *words.split()]
    monkeypatch.setattr("sys.argv", ["evaluate", *given])
    with pytest.raises(SystemExit) as stop:
        run(command.main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
