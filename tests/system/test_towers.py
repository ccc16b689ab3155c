"""Towers that give embeddings are made robust with fare and tecoa, resumed, and evaluated."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.nn.functional import normalize

from safer_fast import evaluate_run, load_model
from safer_fast.config.commands import ExportConfig
from safer_fast.config.schema import ObjectiveConfig
from safer_fast.data import as_pixels, load_data
from safer_fast.evaluate import main as evaluate
from safer_fast.models.text_head import read_text_head
from safer_fast.report import main as report
from safer_fast.runs.exporters import export
from safer_fast.runs.exporters.open_clip import open_clip_names
from safer_fast.runs.folder import load_run
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runs.report.page import write_report
from safer_fast.train import main as train
from safer_fast.training.objectives import Objective, Targets
from tests.support import small_runs
from tests.support.kills import Moment, Server, State
from tests.support.ranks import assert_status, training
from tests.support.towers import SIZES, TOWERS, save_texts, save_tower, width_of

Once = Callable[[str, Callable[[Path], object]], Path]
FLAGS = [
    "--epochs=2",
    "--selection.warmup_epochs=0",
    "--attack.clean_epochs=0",
    "--attack.epsilon_warmup_epochs=0",
    "--attack.epsilon=0.1",
    "--optim.learning_rate=0.001",
    "--runtime.device=cpu",
    "--runtime.attention=math",
]


@pytest.fixture(scope="module")
def flags(once: Once) -> list[str]:
    """Flags of a small FARE run of a CLIP tower on the digits, the same in all processes."""

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "flags.json").write_text(json.dumps(save_tower(folder, "clip")))

    tower = json.loads((once("clip", save) / "flags.json").read_text())
    return [*small_runs.SMALL, *FLAGS, *tower, "--objective.name=fare"]


@pytest.fixture(scope="module")
def fare(once: Once, flags: list[str]) -> Path:
    """The folder of such a run."""
    return once("fare", lambda folder: small_runs.run(folder, *flags))


@pytest.fixture
def measured(fare: Path, tmp_path: Path) -> Path:
    """A copy of it, to which evaluations add."""
    return Path(shutil.copytree(fare, tmp_path / "measured"))


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [
        event for event in read_metrics(run / "metrics.jsonl") if event["event"] == "evaluation"
    ]


def test_fare_is_the_squared_distance_to_the_original_and_asks_for_no_labels() -> None:
    objective = Objective(ObjectiveConfig(name="fare"))
    embeddings, originals = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = torch.stack([(a - b).dot(a - b) for a, b in zip(embeddings, originals, strict=True)])
    loss = objective.loss(embeddings, Targets.alike(originals))
    torch.testing.assert_close(loss, expected.mean())
    attack = objective.attack_loss
    assert (attack.against_clean, attack.counts) == (False, False)
    torch.testing.assert_close(attack.function(embeddings, originals), expected.sum())


def test_fare_keeps_embeddings_of_attacked_images_closer_than_the_original_does(fare: Path) -> None:
    distances = {
        (row["weights"], row["attack"]): row["embedding_distance"] for row in rows_of(fare)
    }
    assert distances["start", "clean"] == 0
    assert 0 < distances["last", "clean"] < distances["last", "pgd-2"]
    assert distances["last", "pgd-2"] < distances["start", "pgd-2"]
    assert all(row["accuracy"] is None for row in rows_of(fare))
    epochs = [e for e in read_metrics(fare / "metrics.jsonl") if e["event"] == "epoch"]
    for epoch in epochs:
        assert epoch["clean_accuracy"] is epoch["train_robust_accuracy"] is None
        assert epoch["embedding_distance"] > epoch["clean_embedding_distance"] > 0


def test_the_original_stays_as_it_was(fare: Path) -> None:
    config = load_run(fare, device="cpu").config
    assert config.model.checkpoint is not None
    before, kept = load_file(config.model.checkpoint), load_file(fare / "teacher.safetensors")
    trained = load_file(fare / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert any(not torch.equal(trained[name], value) for name, value in before.items())


def test_the_command_measures_the_distances_of_the_run(measured: Path) -> None:
    last = [row for row in rows_of(measured) if row["weights"] == "last"]
    found = evaluate_run(measured, device="cpu")
    assert [accuracy.attack for accuracy in found] == ["clean", "pgd-2"]
    for accuracy, row in zip(found, last, strict=True):
        assert accuracy.accuracy != accuracy.accuracy, "not a number"
        assert accuracy.embedding_distance == pytest.approx(row["embedding_distance"], abs=2e-6)


def test_attacks_of_a_tower_need_no_wish_and_a_wish_is_kept(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate([str(measured), "--num-images=4", "--device=cpu"])
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        "clean",
        "pgd-2",
    ]
    mistakes = {
        "--attacks=clean,fgsm,pgd-20": "--attacks: expected clean or pgd-K for a tower without",
        "--norm=l1": "--norm: expected linf or l2 for pgd-2 of a tower without text embeddings, ",
    }
    for word, expected in mistakes.items():
        with pytest.raises(ValueError, match=f"^{expected}[^\n]+$"):
            evaluate([str(measured), word, "--epsilon=0.1", "--device=cpu"])


def test_a_table_of_other_images_holds_the_distances_of_evaluations_alone(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 8), dtype=np.uint8)
    (tmp_path / "flat").mkdir()
    for number, image in enumerate(images[0]):
        Image.fromarray(image).save(tmp_path / "flat" / f"{number}.png")
    np.savez(tmp_path / "alone.npz", images=images[1])
    paths = [tmp_path / "flat", tmp_path / "alone.npz"]
    alone = {
        (found.split, found.attack): found.embedding_distance
        for path in paths
        for found in evaluate_run(measured, path=str(path), device="cpu", fresh=True)
    }
    file, others = tmp_path / "figures.json", ",".join(map(str, paths))
    capsys.readouterr()
    words = [f"--other-data={others}", f"--json={file}", "--threat-models=linf:0.1,l2:0.5"]
    evaluate([str(measured), *words, "--device=cpu"])
    table = capsys.readouterr().out.splitlines()[-4:]
    rows = {(row["split"], row["attack"], row["norm"]): row for row in json.loads(file.read_text())}
    assert len(rows) == 3 * 3
    assert all(row["accuracy"] is None for row in rows.values())
    for (split, attack), distance in alone.items():
        row = rows[split, attack, None if attack == "clean" else "linf"]
        assert row["embedding_distance"] == distance > 0
    assert table[0].split("  ")[0] == "embedding distance"
    for line, split in zip(table[1:], ("test", "flat", "alone"), strict=True):
        keys = [(split, "clean", None), (split, "pgd-2", "linf"), (split, "pgd-2", "l2")]
        assert line.split() == [split, *(f"{rows[key]['embedding_distance']:.4g}" for key in keys)]
    given = evaluate_run(measured, other_data={"v2": images[0]}, device="cpu")
    assert [found.split for found in given] == ["test", "test", "v2", "v2"]
    for found in given[2:]:
        assert found.embedding_distance == alone["flat", found.attack]


def test_a_text_head_gives_zero_shot_accuracy(measured: Path, tmp_path: Path) -> None:
    file = save_texts(tmp_path / "texts.safetensors")
    settings = {"device": "cpu", "text_embeddings": str(file)}
    clean, robust = evaluate_run(measured, attacks="clean,pgd-2", **settings)
    usual = evaluate_run(measured, num_images=4, **settings)
    assert [accuracy.attack for accuracy in usual] == ["clean", "fgsm", "pgd-20"]
    loaded = load_run(measured, device="cpu")
    test = load_data(loaded.config.data, batch_size=64, seed=0).test
    assert test is not None
    units = normalize(load_file(file)["embeddings"], dim=1)
    num_right = 0
    for batch in test.epoch(1):
        images, labels = as_pixels(batch.images), batch.labels
        with torch.no_grad():
            nearest = (normalize(loaded.model(images), dim=1) @ units.T).argmax(1)
        num_right += int((nearest == labels)[: batch.num_images].sum())
    assert clean.accuracy == num_right / test.num_images
    assert robust.accuracy <= clean.accuracy
    assert clean.embedding_distance is None
    # classes of data without names are the rows in their order, whatever these are called
    accuracies = set()
    for number, names in enumerate((None, list("jihgfedcba"))):
        texts = save_texts(tmp_path / f"{number}.npz", names=names)
        other = {"path": str(small_runs.TEST_IMAGES), "text_embeddings": str(texts)}
        (found,) = evaluate_run(measured, attacks="clean", device="cpu", **other)
        accuracies.add(found.accuracy)
    assert len(accuracies) == 1


def sections_of(page: str) -> dict[str, str]:
    """Texts of the tables below headings of a report, without marks."""
    parts = re.split(r"<h2>(.*?)</h2>", page)[1:]
    texts = (
        " ".join(re.sub(r"<[^>]+>", " ", part.partition("<details>")[0]).split())
        for part in parts[1::2]
    )
    return dict(zip(parts[::2], texts, strict=True))


def test_the_report_tells_distances_in_place_of_accuracies(measured: Path, tmp_path: Path) -> None:
    page = write_report([measured]).read_text()
    distances = {
        (row["weights"], row["attack"]): f"{row['embedding_distance']:.3g}"
        for row in rows_of(measured)
    }
    before, after = (distances[weights, "pgd-2"] for weights in ("start", "best"))
    gain = "less" if float(after) < float(before) else "more"
    verdict = (
        f"clean ones is {gain} in the end: {before} at the start, {after} after it, under PGD-2, "
    )
    assert "mean squared distance of embeddings of attacked images" in page
    assert verdict in page
    sections = sections_of(page)
    assert "Accuracy" not in sections
    for weights in ("start", "best", "last"):
        row = f"{weights} test split {distances[weights, 'clean']} {distances[weights, 'pgd-2']}"
        assert row in sections["Embedding distance"]
    assert "best: those of the smallest embedding distance under attack on the validation" in page
    for wrong in ("95 %", "best robust accuracy", "no accuracy under attack"):
        assert wrong not in page
    epochs = [e for e in read_metrics(measured / "metrics.jsonl") if e["event"] == "epoch"]
    smallest = min(e["embedding_distance"] for e in epochs if "embedding_distance" in e)
    assert f"best embedding distance {smallest:.3g} validation" in sections["At a glance"]
    assert "under attack clean" in sections["Training"], "the legend of the curves"

    # other balls, and accuracies by texts, stand beside them and change none
    texts = str(save_texts(tmp_path / "texts.npz"))
    settings = {"attacks": "clean,pgd-2", "num_images": 20, "device": "cpu"}
    evaluate_run(measured, norm="l2", epsilon=0.5, **settings)
    clean, _ = evaluate_run(measured, text_embeddings=texts, **settings)
    page = write_report([measured]).read_text()
    assert verdict in page
    sections = sections_of(page)
    assert f"{100 * clean.accuracy:.1f} %" in sections["Accuracy"]
    assert f"last test split {distances['last', 'clean']} " in sections["Embedding distance"]
    other = shutil.copytree(measured, tmp_path / "other")
    compared = write_report([measured, other], tmp_path / "both.html").read_text()
    assert "Embedding distances, here of measured and other, compare only with those" in compared


def test_plain_timm_loads_the_tower(fare: Path) -> None:
    robust = load_model(fare, device="cpu")
    network = timm.create_model(f"local-dir:{fare}", pretrained=True).eval()
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = network((images - robust.mean) / robust.std)
        torch.testing.assert_close(robust(images), expected)
    assert expected.shape == (2, width_of("clip"))


def test_open_clip_gets_names_that_timm_reads_back(fare: Path, tmp_path: Path) -> None:
    export(ExportConfig(str(fare), format="open_clip", output=str(tmp_path / "out")))
    written = load_file(tmp_path / "out" / "visual.safetensors")
    assert {"visual.conv1.weight", "visual.proj", "visual.class_embedding"} <= written.keys()
    network = load_run(fare, device="cpu").model.network
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = network(images)
        network.load_state_dict(checkpoint_filter_fn(written, network))
        assert not network.head.bias.any()
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TOWERS)
def test_weights_without_a_bias_return_bit_for_bit(kind: str, tmp_path: Path) -> None:
    save_tower(tmp_path, kind)
    weights = load_file(tmp_path / f"{kind}.safetensors")
    if kind == "clip":
        weights["head.bias"].zero_()
    sizes = {"img_size": 8, "in_chans": 1, "patch_size": 4, "num_classes": 0, **SIZES}
    sizes["num_classes"] = width_of(kind) if kind == "clip" else 0
    network = timm.create_model(TOWERS[kind], **sizes)
    read = checkpoint_filter_fn(open_clip_names(weights), network)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())


def test_formats_for_classifiers_are_refused(fare: Path, small_run: Path, tmp_path: Path) -> None:
    for run, form in ((fare, "robustbench"), (fare, "hub"), (small_run, "open_clip")):
        with pytest.raises(ValueError, match=r"^format: expected"):
            export(ExportConfig(str(run), format=form, output=str(tmp_path / "out")))


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_tecoa_trains_zero_shot_logits(kind: str, tmp_path: Path) -> None:
    file = save_texts(tmp_path / "texts.npz", kind)
    flags = [*small_runs.SMALL, *FLAGS, *save_tower(tmp_path, kind), "--objective.name=tecoa"]
    run = small_runs.run(tmp_path / "run", *flags, f"--objective.text_embeddings={file}")
    robust = load_model(run, device="cpu")
    images = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        embeddings = robust.network((images - robust.mean) / robust.std)
        units = normalize(torch.from_numpy(np.load(file)["embeddings"]), dim=1)
        torch.testing.assert_close(robust(images), normalize(embeddings, dim=1) @ units.T / 0.01)
    last = [row for row in rows_of(run) if row["weights"] == "last"]
    found = evaluate_run(run, attacks="clean,pgd-2", device="cpu")
    assert [accuracy.accuracy for accuracy in found] == [row["accuracy"] for row in last]
    with pytest.raises(ValueError, match="no weights of the original network"):
        evaluate([str(run), "--text-embeddings=none", "--device=cpu"])
    others = [save_texts(tmp_path / f"others-{number}.npz", kind) for number in range(2)]
    for other in others:
        evaluate([str(run), "--attacks=clean", f"--text-embeddings={other}", "--device=cpu"])
    report([str(run)])
    page = (run / "report.html").read_text()
    assert all(f"texts of {other}" in page for other in others)


def test_a_killed_run_resumes_with_the_same_bits(
    server: Server, flags: list[str], fare: Path, tmp_path: Path
) -> None:
    resumable = [*flags, "--checkpoint.every_steps=1", "--resume=auto"]
    step = Moment("safer_fast.training.step.Step.__call__", call=5)
    assert server.train(tmp_path / "run", resumable, step).status == -9
    ending = server.train(tmp_path / "run", resumable)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert "resumed from" in ending.output
    assert State.of(tmp_path / "run").differences(State.of(fare)) == []


def test_images_without_labels_are_enough_for_fare(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (48, 8, 8), dtype=np.uint8)
    splits = {"train": images[:40], "val": images[40:]}
    for split, own in splits.items():
        (tmp_path / "set" / split).mkdir(parents=True)
        for number, image in enumerate(own):
            Image.fromarray(image).save(tmp_path / "set" / split / f"{number:02}.png")
    arrays = {f"x_{split}": own for split, own in splits.items()}
    numbers = {f"y_{split}": np.arange(len(own)) % 10 for split, own in splits.items()}
    np.savez(tmp_path / "labelled.npz", **arrays, **numbers)
    flags = [*small_runs.TINY, *FLAGS, *save_tower(tmp_path), "--objective.name=fare"]
    flags += ["--selection.criterion=all", "--batch-size=16"]
    labelled = [*flags, f"--data.path={tmp_path / 'labelled.npz'}"]
    train([*labelled, f"--output={tmp_path / 'labelled'}"])

    alone = [*flags, f"--data.path={tmp_path / 'set'}"]
    resumable = [*alone, "--checkpoint.every_steps=1", "--resume=auto"]
    step = Moment("safer_fast.training.step.Step.__call__", call=2)
    assert server.train(tmp_path / "run", resumable, step).status == -9
    ending = server.train(tmp_path / "run", resumable)
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert re.search(r"data: +set, no labels, 40 training", ending.output)
    shutil.copytree(tmp_path / "set", tmp_path / "moved")
    moved = [*flags, f"--data.path={tmp_path / 'moved'}", "--resume=auto"]
    ending = server.train(tmp_path / "run", [*moved, "--checkpoint.every_steps=1"])
    assert (ending.status, ending.errors) == (0, ""), ending.output
    assert "finished already" in ending.output
    weights, others = (load_file(tmp_path / n / "model.safetensors") for n in ("run", "labelled"))
    assert all(torch.equal(weights[name], value) for name, value in others.items())

    capsys.readouterr()
    evaluate([str(tmp_path / "run"), "--attacks=clean,pgd-2", "--device=cpu"])
    assert "validation" in capsys.readouterr().out
    other = [str(tmp_path / "run"), f"--data.path={tmp_path / 'set' / 'val'}", "--device=cpu"]
    evaluate([*other, "--attacks=clean"])
    texts = f"--objective.text_embeddings={save_texts(tmp_path / 'texts.npz')}"
    for words in (["--objective.name=pgd-at"], [texts]):
        with pytest.raises(ValueError, match=r"data.path: expected a folder for each class, got"):
            train([*alone, *words, f"--output={tmp_path / 'refused'}"])
    assert not (tmp_path / "refused").exists()


def test_the_attack_of_fare_in_fp8_is_audited_and_resumed(
    server: Server, flags: list[str], tmp_path: Path
) -> None:
    cheap = [*flags, "--amp=bf16", "--attack.precision=fp8", "--attack.fp8_from=0"]
    cheap += ["--selection.criterion=all", "--attack.audit_images=16"]
    strict = server.train(tmp_path / "strict", [*cheap, "--attack.audit_ratio=1"])
    assert (strict.status, strict.errors) == (0, ""), strict.output
    assert "attack in FP8 (8 matrices)" in strict.output
    assert "attack.precision: amp from step 0 on (after the attack in fp8" in strict.output
    always = [*cheap, "--attack.audit_ratio=0", "--checkpoint.every_steps=1", "--resume=auto"]
    whole = server.train(tmp_path / "whole", always)
    assert (whole.status, whole.errors) == (0, ""), whole.output
    assert "attack.precision: amp" not in whole.output
    step = Moment("safer_fast.training.step.Step.__call__", call=4)
    assert server.train(tmp_path / "run", always, step).status == -9
    assert server.train(tmp_path / "run", always).status == 0
    assert State.of(tmp_path / "run").differences(State.of(tmp_path / "whole")) == []
    weights, others = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "strict")
    )
    assert any(not torch.equal(weights[name], value) for name, value in others.items())


def test_two_ranks_train_what_one_trains(flags: list[str], fare: Path, tmp_path: Path) -> None:
    team = training(2, [*flags, f"--output={tmp_path / 'run'}"])
    assert_status(0, team.endings())
    weights, others = (
        load_file(fare / "model.safetensors"),
        load_file(tmp_path / "run" / "model.safetensors"),
    )
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--objective.name=tecoa"], "--objective.text_embeddings"),
        (["--objective.name=pgd-at", "--objective.text_embeddings=x.npz"], "text_embeddings"),
        (["--objective.name=fare", "--objective.text_embeddings=x.pt"], "text_embeddings"),
        (["--objective.name=fare", "--evaluation.attacks=clean,fgsm"], "--evaluation.attacks"),
        (["--objective.name=fare", "--model.checkpoint=null"], "--model.checkpoint"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], flag: str, flags: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{flag}: expected [^\n]+, got [^\n]+$"):
        train([*flags, *words, f"--output={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def written(path: Path, embeddings: Any, names: Any = None) -> Path:
    np.savez(path, embeddings=embeddings, **({} if names is None else {"class_names": names}))
    return path


@pytest.mark.parametrize(
    ("embeddings", "names"),
    [
        (np.ones(4, np.float32), None),
        (np.ones((1, 4), np.float32), None),
        (np.ones((3, 4), np.int64), None),
        (np.zeros((3, 4), np.float32), None),
        (np.full((3, 4), np.nan, np.float32), None),
        (np.array([[{}] * 4] * 3), None),
        (np.ones((3, 4), np.float32), np.array(["a", "b"])),
        (np.ones((3, 4), np.float32), np.array([{}, {}, {}])),
        (np.ones((3, 4), np.float32), np.arange(3)),
    ],
)
def test_embeddings_that_are_none_are_refused(embeddings: Any, names: Any, tmp_path: Path) -> None:
    file = written(tmp_path / "x.npz", embeddings, names)
    with pytest.raises(ValueError, match=r"^--objective.text_embeddings: expected [^\n]+$"):
        read_text_head(file, 0.01)


def test_rows_follow_the_classes_of_the_data(tmp_path: Path) -> None:
    embeddings = np.eye(3, 4, dtype=np.float32)
    head = read_text_head(written(tmp_path / "x.npz", embeddings, np.array(["b", "c", "a"])), 1.0)
    assert head.for_classes(["a", "b", "c"]).embeddings.argmax(1).tolist() == [2, 0, 1]
    assert head.for_classes(["0", "1", "2"]).embeddings.argmax(1).tolist() == [0, 1, 2]
    for names in (["a", "b"], ["a", "b", "d"]):
        with pytest.raises(ValueError, match=r"--objective.text_embeddings: expected"):
            head.for_classes(names)
    with pytest.raises(ValueError, match="embeddings of 5 numbers"):
        head.check_width(5)
    head.save(tmp_path / "x.safetensors")
    again = read_text_head(tmp_path / "x.safetensors", 1.0)
    assert again.class_names == ["b", "c", "a"]
    assert torch.equal(again.embeddings, head.embeddings)


def test_a_projection_is_kept_as_the_weights_have_it(tmp_path: Path) -> None:
    for kind in TOWERS:
        tower = save_tower(tmp_path, kind)
        file = tmp_path / f"{kind}.safetensors"
        has_head = "head.weight" in load_file(file)
        assert has_head == (kind == "clip")
        assert json.loads(tower[-1].partition("=")[2])["depth"] == 3
