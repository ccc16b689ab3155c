"""The report: complete, self-contained, escaped, and calm about what is not there yet."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safer_fast.report import main
from safer_fast.runs.gallery import write_gallery
from safer_fast.runs.layout import GALLERY
from safer_fast.runs.report.page import write_report
from tests.support.galleries import new_gallery

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LAYERS = (
    "patch_embed.proj",
    *(f"blocks.{block}.{kind}" for block in range(12) for kind in KINDS),
    "head",
)
SWIN = (
    "patch_embed.proj",
    *(f"layers.0.blocks.{block}.{kind}" for block in range(2) for kind in KINDS),
    "layers.1.downsample.reduction",
    *(f"layers.1.blocks.{block}.{kind}" for block in range(2) for kind in KINDS),
    "head.fc",
)
CURVES = (
    "Robust accuracy",
    "Clean accuracy",
    "Loss",
    "Learning rate",
    "Epsilon",
    "Attack, step by step",
    "SAM: rise of the loss",
    "Norm of the gradient",
    "SAM: cosine",
    "Speed",
    "Time of a step by stage",
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that compare runs are written to the current folder."""
    monkeypatch.chdir(tmp_path)


def make_run(
    folder: Path,
    *,
    epochs: int = 40,
    selected_at: tuple[int, ...] = (21, 31),
    layers: tuple[str, ...] = LAYERS,
    shift: float = 0.0,
    is_finished: bool = True,
    is_old: bool = False,
) -> Path:
    """A run folder as a training of 20 warm-up epochs and SAFER leaves it, without weights.

    is_old: of the days before health and stages of a step were measured.
    """
    generator = random.Random(epochs)
    banner = ["CUDA graphs: off, no GPU here", "native kernels: live"]
    about = {"device": "cpu", "torch": "2.15.0", "versions": {"timm": "1.0.31"}, "banner": banner}
    events: list[dict[str, Any]] = [{"event": "run", "epoch": 0, "step": 0, "time_s": 0.1, **about}]
    for epoch in range(1, epochs + 1):
        if epoch in selected_at:
            events.append(_evaluation(epoch, "start", "clean", 0.771 + shift))
            events.append(_evaluation(epoch, "start", "pgd-20", 0.421 + shift))
            events.append(_selection(epoch, layers, generator))
        events.append(_epoch(epoch, shift, generator))
        if not is_old:
            events[-1] |= _health(epoch)
    if is_finished:
        for weights, gain in (("last", 0.02), ("best", 0.03)):
            events.append(_evaluation(epochs, weights, "pgd-20", 0.421 + shift + gain))
            events.append(_evaluation(epochs, weights, "clean", 0.771 + shift + gain))
        events.append({"event": "end", "epoch": epochs, "step": 100 * epochs, "time_s": 4000.0})
    folder.mkdir(parents=True)
    write_events(folder, events)
    (folder / "run.yaml").write_text(
        "amp: bf16\nepochs: 40\nmodel:\n  name: vit_small_patch16_224\n"
        "attack: {norm: linf, epsilon: 0.03137254901960784, steps: 10}\n"
        f"selection: {{criterion: sharpness, fraction: 0.05}}\nsam: {{rho: {0.05 + shift}}}\n"
    )
    model: dict[str, Any] = {
        "classes": ["cat", "dog"],
        "accuracies": [{"attack": "clean", "accuracy": 0.8}],
    }
    config = {"architecture": "vit_small_patch16_224", "safer_fast": model}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_events(folder: Path, events: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(text)


def _epoch(epoch: int, shift: float, generator: random.Random) -> dict[str, Any]:
    robust = 0.46 * (1 - math.exp(-epoch / 8)) + shift
    overfitting = max(0, epoch - 10) * 0.004
    return {
        "event": "epoch",
        "epoch": epoch,
        "step": 100 * epoch,
        "time_s": 95.0 * epoch,
        "train_loss": 2.3 * math.exp(-epoch / 25) + 0.05 * generator.random(),
        "train_robust_accuracy": robust + overfitting + 0.01 * generator.random(),
        "clean_accuracy": 0.8 * (1 - math.exp(-epoch / 5)) + 0.01 * generator.random() + shift,
        "robust_accuracy": robust + 0.01 * generator.random() if epoch % 2 == 0 else None,
        "learning_rate": 1e-3 * (1 + math.cos(math.pi * (epoch % 20) / 20)) / 2,
        "epsilon": min(1.0, epoch / 6) * 8 / 255,
        "images_per_second": (410 if epoch <= 20 else 760) + 10 * generator.random(),
        "data_wait_fraction": 0.01,
        "peak_memory_mib": 3120.5,
        "skipped_steps": 0,
    }


def _health(epoch: int) -> dict[str, Any]:
    """What is measured of the steps of an epoch besides."""
    is_safer = epoch > 20
    success = [0.3 + 0.3 * (1 - math.exp(-step / 3)) - epoch / 400 for step in range(11)]
    ascent = 21.0 if is_safer else 0.0
    return {
        "validation_loss": 1.5 + 0.0005 * (epoch - 22) ** 2,
        "train_start_accuracy": 0.85 * (1 - math.exp(-epoch / 5)),
        "attack_success": None if epoch == 2 else success,
        "loss_rise": 0.08 - 0.001 * epoch if is_safer else 0.0,
        "gradient_norm": 1.0 + 1 / epoch,
        "gradient_cosine": 0.8 if is_safer else None,
        "stage_ms": {
            "data": 0.4,
            "attack": 120.0,
            "ascent": ascent,
            "descent": 19.0 if is_safer else 44.0,
            "update": 1.2,
        },
        "training_attack_accuracy": 0.5,
        "pgd_20_accuracy": 0.46,
        "catastrophic_overfitting": False,
    }


def _selection(epoch: int, layers: tuple[str, ...], generator: random.Random) -> dict[str, Any]:
    scores = {name: generator.random() ** 3 * (2 if "fc2" in name else 1) for name in layers}
    selected = sorted(layers, key=lambda name: -scores[name])[:3]
    event = {"event": "selection", "epoch": epoch, "step": 100 * epoch, "time_s": 95.0 * epoch}
    return event | {"criterion": "sharpness", "scores": scores, "selected": selected, "cut": 4}


def _evaluation(epoch: int, weights: str, attack: str, accuracy: float) -> dict[str, Any]:
    event = {"event": "evaluation", "epoch": epoch, "step": 100 * epoch, "time_s": 95.0 * epoch}
    epsilon = 0.0 if attack == "clean" else 8 / 255
    event |= {"split": "test", "attack": attack, "epsilon": epsilon, "accuracy": accuracy}
    return event | {"num_images": 10_000, "weights": weights}


class Page(HTMLParser):
    """What a test wants to know of a page: its elements, identifiers, references and text."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.identities: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} has a script in {name}"
            if name == "id":
                self.identities.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def text(self) -> str:
        return " ".join(text for text in self.texts if text)


def add_events(folder: Path, *events: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "vit-small")
    gallery = new_gallery(3)
    facts: dict[str, Any] = {"attack": "pgd-20", "epsilon": 8 / 255, "weights": "last"}
    names = ["cat", "dog", "bird"]
    write_gallery(gallery, folder / GALLERY, class_names=names, split="test", **facts)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report([folder]))


def test_every_figure_is_there_with_a_title_and_a_caption(page: Page) -> None:
    assert page.tags.count("figure") == len(CURVES) + 3
    assert page.tags.count("figcaption") == page.tags.count("figure")
    assert page.tags.count("svg") == len(CURVES) + 3  # one map for each of two selections, and both
    for title in (*CURVES, "Layer map", "Attacked images"):
        assert title in page.text()


def test_a_run_of_earlier_days_has_the_figures_that_it_has_values_for(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run", is_old=True)]))
    text = page.text()
    assert page.tags.count("svg") == 6 + 3
    assert "Training loss" in text
    assert page.source.count("stroke-dasharray: 5.4") == 1  # training of robust accuracy
    assert "Clean accuracy, training" not in text
    assert "Attack and SAM" not in text
    assert "No gallery of attacked images has been written." in text


def test_the_page_asks_for_nothing_from_outside(page: Page) -> None:
    pictures = [one for one in page.references if one.startswith("data:image/png;base64,")]
    assert len(pictures) == page.tags.count("img") == 9
    assert all(one.startswith("#") for one in page.references if one not in pictures)
    assert not {"script", "link", "iframe", "object", "image"} & set(page.tags)
    assert "@import" not in page.source
    assert "url(http" not in page.source


def test_identifiers_are_unique_and_every_reference_has_its_target(page: Page) -> None:
    assert len(page.identities) == len(set(page.identities))
    targets = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert targets <= set(page.identities)
    assert len(targets) > 10


def test_the_same_run_gives_the_same_page(folder: Path, page: Page, tmp_path: Path) -> None:
    output = write_report([folder], tmp_path / "again.html")
    assert output.read_text(encoding="utf-8") == page.source


def test_the_headline_has_a_row_for_each_weights_and_a_column_for_each_attack(page: Page) -> None:
    expected = (
        "weights clean, 10,000 images PGD-20, ε = 8/255 Linf, 10,000 images "
        "start test split 77.1 % 76.3\N{EN DASH}77.9 42.1 % 41.1\N{EN DASH}43.1 "
        "best test split 80.1 % 79.3\N{EN DASH}80.9 45.1 % 44.1\N{EN DASH}46.1 "
        "last test split 79.1 % "
    )
    assert expected in page.text()


def verdict_of(*folders: Path) -> str:
    found = re.search(r'<p class="sentence">(.*?)</p>', write_report(folders).read_text())
    assert found
    return unescape(found[1])


def test_the_verdict_says_what_was_gained_at_which_threat_model_and_how_sure(page: Page) -> None:
    assert "<h1>SAFER</h1>" in page.source
    assert (
        "SAFER gained 3.0 points of robust accuracy: 42.1 % at the start, 45.1 % after it (95 % "
        "interval +1.6 to +4.4, one run), under PGD-20, ε = 8/255 Linf, 10,000 images of the test "
        "split, best weights; clean accuracy +3.0 points."
    ) in page.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accuracy", "images", "words"),
    [
        (0.30, 1000, "lost 12.1 points of robust accuracy: 42.1 % at the start, 30.0 % after it"),
        (0.44, 1000, "that can be told from chance: 42.1 % at the start, 44.0 % after it (+1.9"),
        (0.44, 999, "reached 44.0 % robust accuracy"),
    ],
)
def test_the_verdict_says_no_more_than_the_images_tell(
    accuracy: float, images: int, words: str, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run", epochs=1, is_finished=False)
    assert verdict_of(folder) == (
        "So far: 1 of 40 epochs, and no accuracy under attack has been measured yet."
    )
    add_events(
        folder,
        _evaluation(1, "start", "pgd-20", 0.421) | {"num_images": 1000},
        _evaluation(1, "last", "pgd-20", accuracy) | {"num_images": images},
    )
    assert words in verdict_of(folder)


def test_the_verdict_credits_safer_with_no_weights_of_the_warm_up(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    file = folder / "metrics.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    for event in events:
        if event["event"] == "epoch" and event["epoch"] == 12:
            event["robust_accuracy"] = 0.6  # more than any later one
    write_events(folder, events)
    before = "The best weights are those of epoch 12, before SAFER began in epoch 21."
    text = verdict_of(folder)
    assert "42.1 % at the start, 44.1 % after it (95 % interval" in text
    assert text.endswith(f"last weights; clean accuracy +2.0 points. {before}")
    others = make_run(tmp_path / "other", shift=0.01)
    assert verdict_of(folder, others).endswith(before.replace("weights", "weights of run"))
    events = [event for event in events if event.get("weights") != "last"]
    write_events(folder, events)
    assert f"there is no start to compare with. {before}" in verdict_of(folder)


def test_the_verdicts_gain_is_that_of_the_figures_it_shows(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1, is_finished=False)
    images = {"num_images": 797}
    add_events(folder, _evaluation(1, "start", "pgd-20", 76 / 797) | images)
    add_events(folder, _evaluation(1, "last", "pgd-20", 57 / 797) | images)
    text = verdict_of(folder).replace("\N{MINUS SIGN}", "-")
    assert "9.5 % at the start, 7.2 % after it (-2.3 points" in text


@pytest.mark.slow
def test_the_verdict_on_several_runs_names_the_most_robust(tmp_path: Path) -> None:
    one, other = (make_run(tmp_path / n, shift=s) for n, s in (("weak", 0.0), ("strong", 0.02)))
    assert verdict_of(one, other).startswith(
        "strong is the most robust with 47.1 % robust accuracy (95 % interval 46.1 to 48.1) under "
        "PGD-20, ε = 8/255 Linf, 10,000 images of the test split, best weights: +2.0 points over "
        "weak (95 % interval +0.6 to +3.4"
    )
    add_events(other, _evaluation(40, "best", "pgd-50", 0.4))
    assert "do not compare" in verdict_of(one, other)
    for folder in (one, other):  # data without a test split
        file = folder / "metrics.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()]
        events = [event for event in events if event.get("attack") != "pgd-50"]
        write_events(folder, [e | {"split": "validation"} if "split" in e else e for e in events])
    assert "10,000 images of the validation split, best weights: +2.0" in verdict_of(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ("data: {path: null}\nselection: {criterion: all}\nsam: {rho: 0}", "PGD-AT on digits"),
        ("attack: {name: apgd, steps: 2}\nselection: {criterion: all}\nsam: {rho: 0}", "APGD-AT<"),
        ("data: {path: x/cifar10-train.parquet}\nattack: {steps: 0}", "Clean training on cifar10"),
        (
            "selection: {criterion: all, radius: relative}\nsam: {rho: 0.01, layerwise: true}\n"
            "objective: {name: trades}",
            "AWP with TRADES<",
        ),
        (
            "selection: {criterion: random}\nsam: {rho: 0}",
            "Fine-tuning of random layers without SAM<",
        ),
    ],
)
def test_the_title_names_method_and_data(settings: str, title: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1)
    (folder / "run.yaml").write_text(settings)
    assert f"<h1>{title}" in write_report([folder]).read_text()


def test_columns_and_rows_that_hold_nothing_are_left_out(page: Page, tmp_path: Path) -> None:
    assert "AutoAttack" not in page.text()
    assert "cut" in page.text()
    folder = make_run(tmp_path / "run", epochs=2, selected_at=(2,))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        event.pop("peak_memory_mib", None)
        event |= {"cut": None} if event["event"] == "selection" else {}
    write_events(folder, events)
    text = Page(write_report([folder])).text()
    assert "peak memory" not in text
    assert "epoch criterion selected layers 2 sharpness" in text


def test_captions_are_one_short_sentence_each(page: Page) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.source)
    assert len(captions) == len(CURVES) + 3
    for caption in captions:
        assert caption.endswith(".")
        assert ". " not in caption, caption
        assert len(unescape(caption)) < 220, caption


def test_the_headline_takes_the_strongest_pgd_in_the_ball_of_training(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1, is_finished=False)
    add_events(
        folder,
        _evaluation(1, "last", "pgd-20", 0.5),
        _evaluation(1, "last", "pgd-50", 0.4),
        _evaluation(1, "last", "pgd-50", 0.39) | {"restarts": 5, "norm": "linf"},
        _evaluation(1, "last", "pgd-100", 0.1) | {"epsilon": 16 / 255},
        _evaluation(1, "last", "pgd-100", 0.2) | {"norm": "l2"},
        _evaluation(1, "last", "pgd-100", 0.9) | {"source": "other"},
        _evaluation(1, "last", "autoattack", 0.38) | {"num_images": 500},
        _evaluation(1, "last", "autoattack", 0.8) | {"source": "other"},
    )
    text = Page(write_report([folder])).text()
    headline, _, full = text.partition("All evaluations (8)")
    assert "PGD-50, ε = 8/255 Linf, 5 restarts, 10,000 images" in headline
    assert "AutoAttack, ε = 8/255 Linf, 500 images" in headline
    assert "39.0 %" in headline
    assert "38.0 %" in headline
    assert not [share for share in ("10.0 %", "20.0 %", "90.0 %", "80.0 %") if share in headline]
    for words in ("ε = 16/255 Linf", "ε = 8/255 L2", "images made for other, 10,000 images"):
        assert words in full


def test_figures_that_do_not_compare_say_so_in_their_cells(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1, is_finished=False)
    few = {"num_images": 100}
    add_events(
        folder,
        _evaluation(1, "best", "clean", 0.7) | few,
        _evaluation(1, "last", "clean", 0.75),
        _evaluation(1, "best", "pgd-20", 0.5) | few,
        _evaluation(1, "last", "pgd-50", 0.25) | {"epsilon": 0.1},
    )
    headline = Page(write_report([folder])).text().partition("All evaluations")[0]
    headline = headline[headline.index("weights clean PGD best") :]
    assert "PGD-20, ε = 8/255 Linf, 100 images" in headline
    assert "PGD-50, ε = 0.1 Linf, 10,000 images" in headline
    assert "100 images" in headline[headline.index("70.0 %") : headline.index("50.0 %")]


def test_an_evaluation_that_was_repeated_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1, is_finished=False)
    add_events(folder, *(_evaluation(1, "last", "clean", share) for share in (0.61, 0.62)))
    text = Page(write_report([folder])).text()
    assert "62.0 %" in text
    assert "61.0 %" not in text
    assert "All evaluations (1)" in text


def test_figures_of_two_seeds_are_both_listed_and_the_newest_is_in_the_headline(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path / "run", epochs=1, is_finished=False)
    older, newer = _evaluation(1, "last", "pgd-20", 0.51), _evaluation(1, "last", "pgd-20", 0.52)
    add_events(folder, older, newer | {"seed": 0, "restarts": 1, "norm": "linf", "source": None})
    headline, _, full = Page(write_report([folder])).text().partition("All evaluations (2)")
    assert "PGD-20, ε = 8/255 Linf, 10,000 images last test split" in headline
    assert "52.0 %" in headline
    assert "51.0 %" not in headline
    assert "ε = 8/255 Linf, seed 0, 10,000 images 52.0 %" in full


def test_accuracies_by_class_are_listed_with_the_lowest_marked(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1, is_finished=False)
    (folder / "config.json").write_text('{"safer_fast": {"class_names": ["cat", "dog"]}}')
    shares = [0.75, 0.25, None]
    add_events(folder, _evaluation(1, "last", "pgd-20", 0.5) | {"per_class_accuracy": shares})
    page = Page(write_report([folder]))
    assert "Accuracy by class, the lowest marked class last test pgd-20, ε = 8/255" in page.text()
    assert "images cat 75.0 % dog 25.0 % 2 \N{EN DASH} " in page.text()
    assert '<td class="different">25.0 %' in page.source
    assert page.source.count('class="different"') == 1


@pytest.mark.slow
def test_catastrophic_overfitting_is_told_at_the_top_and_in_its_figure(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / name, epochs=4) for name in ("a", "b"))
    shares = {"training_attack_accuracy": 0.7, "pgd_20_accuracy": 0.05}
    event = _epoch(5, 0.0, random.Random(0)) | shares | {"catastrophic_overfitting": True}
    assert "overfitting in epoch" not in Page(write_report([second])).text()
    add_events(second, event, event | {"epoch": 6, "pgd_20_accuracy": None})
    page = Page(write_report([first, second]))
    warning = "b: catastrophic overfitting in epochs 5, 6. The model withstands"
    assert page.text().index(warning) < page.text().index("Accuracy")
    assert "Red: CATASTROPHIC OVERFITTING in epochs 5, 6 of b." in page.text()
    assert page.source.count("fill: var(--alarm)") == 2
    add_events(second, event | {"epoch": 6})
    alone = Page(write_report([second])).text()
    assert "in epoch 6, 70.0 % of training images under that attack, 5.0 % under PGD-20" in alone
    assert "Warning catastrophic" in alone


@pytest.mark.slow
def test_the_gap_of_the_losses_is_shaded_where_they_are_of_one_kind(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=40)
    assert num_shaded(write_report([folder]), "loss") == 1
    settings = (folder / "run.yaml").read_text()
    for objective in ("{name: trades}", "{name: pgd-at, label_smoothing: 0.1}"):
        (folder / "run.yaml").write_text(f"{settings}objective: {objective}\n")
        page = write_report([folder])
        assert num_shaded(page, "loss") == 0
        assert num_shaded(page, "robust") == 1


def num_shaded(page: Path, identity: str) -> int:
    """The areas that a drawing has between its curves and that are not empty."""
    drawing = page.read_text().partition(f'id="{identity}-')[2].partition("</svg>")[0]
    areas = re.findall(r'id="[^"]*FillBetween[^"]*">(.*?)</g>', drawing, re.DOTALL)
    return sum("<path" in area or "<use" in area for area in areas)


def test_the_rise_of_the_loss_is_drawn_only_where_there_was_sam(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=20, is_finished=False)
    text = Page(write_report([folder])).text()
    assert "Norm of the gradient" in text
    assert "SAM: rise of the loss" not in text
    assert "SAM: cosine" not in text


def test_the_attack_is_drawn_for_first_selected_and_last_epochs(page: Page) -> None:
    legend = page.text().partition("Attack, step by step")[2].partition("Share of")[0]
    assert legend.split()[:8] == ["epoch", "1", "epoch", "21", "epoch", "31", "epoch", "40"]


UNUSABLE: list[dict[str, Any]] = [
    {"validation_loss": "high"},
    {"gradient_cosine": [0.5]},
    {"loss_rise": True},
    {"attack_success": 0.5},
    {"attack_success": [0.5, "a"]},
    {"attack_success": [1.5]},
    {"attack_success": [0.5] * 100_001},
    {"stage_ms": [1.0]},
    {"stage_ms": {"attack": "long"}},
    {"stage_ms": {"attack": -1.0}},
    {"catastrophic_overfitting": "no"},
    {"catastrophic_overfitting": 1},
    {"norm": 2},
    {"source": ["a"]},
    {"attack": {"a": 1}},
    {"weights": 1},
    {"restarts": "5"},
    {"seed": [1]},
    {"loss": {}},
    {"per_class_accuracy": {"cat": 0.5}},
    {"per_class_accuracy": [-0.5]},
    {"per_class_accuracy": [True]},
]


@pytest.mark.parametrize("wrong", UNUSABLE, ids=range(len(UNUSABLE)))
@pytest.mark.parametrize("kind", ["epoch", "evaluation"])
def test_values_that_no_run_writes_are_named(
    tmp_path: Path, wrong: dict[str, Any], kind: str
) -> None:
    folder = make_run(tmp_path / "run", epochs=1)
    add_events(folder, _evaluation(1, "last", "clean", 0.5) | {"event": kind} | wrong)
    with pytest.raises(
        ValueError, match=rf"^{folder}/metrics.jsonl: expected [^\n]*, got [^\n]{{1,60}} as \w+ of "
    ):
        write_report([folder])


UNKNOWN: list[dict[str, Any]] = [
    {"attack_success": [], "stage_ms": {}, "per_class_accuracy": []},
    {"attack_success": [None], "stage_ms": {"attack": None}, "per_class_accuracy": [None]},
    {"attack_success": None, "stage_ms": None, "validation_loss": None, "seed": 10**90},
    {"stage_ms": {f"stage-{number}": 1.0 for number in range(50)}, "num_images": 10**90},
    {"stage_ms": {"<b>\x1b": 1e99, "attack": 10**400}, "loss": 1e99, "restarts": 10**90},
    {"norm": "<b>", "source": "<b>", "epsilon": 1e99, "attack": "pgd-" + "9" * 5000},
    {"attack": "pgd-\u0663", "weights": None, "split": None, "norm": None},
]


@pytest.mark.slow
@pytest.mark.parametrize("values", UNKNOWN, ids=range(len(UNKNOWN)))
def test_values_that_say_nothing_or_too_much_are_no_trouble(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    folders = [make_run(tmp_path / name, epochs=1) for name in "ab"]
    evaluation = _evaluation(1, "last", "pgd-20", 0.5) | values
    epoch = evaluation | _epoch(2, 0.0, random.Random(0)) | values
    for folder in folders:
        add_events(folder, evaluation, epoch)
    for page in (Page(write_report(folders)), Page(write_report(folders[:1]))):
        assert "\x1b" not in page.source
        assert "b" not in set(page.tags)


def test_selections_configuration_and_environment_are_listed(page: Page) -> None:
    text = page.text()
    for words in ("21 sharpness", "selection.fraction 0.05", "versions.timm 1.0.31", "cat, dog"):
        assert words in text
    assert "native kernels: live" in text
    assert "safer_fast.accuracies" not in text


def test_several_runs_share_the_curves_and_stand_in_columns(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "safer"), make_run(tmp_path / "pgd-at", shift=0.02)
    page = Page(write_report([first, second]))
    assert page.tags.count("figure") == len(CURVES) + 3
    assert "2 runs compared" in page.text()
    assert "weights split attack safer pgd-at" in page.text()
    headline = page.text().partition("All evaluations")[0]
    assert "safer last test split 79.1 %" in headline
    assert "pgd-at last test split 81.1 %" in headline
    assert 'class="different"' in page.source
    assert not (first / "report.html").exists()
    assert not (second / "report.html").exists()


@pytest.mark.slow
def test_a_comparison_leaves_the_reports_of_its_runs_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name, epochs=3) for name in ("a", "b")]
    alone = [write_report([run]).read_bytes() for run in runs]
    main([str(run) for run in runs])
    assert capsys.readouterr().out == "wrote comparison.html\n"
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text()
    assert [(run / "report.html").read_bytes() for run in runs] == alone
    main([*(str(run) for run in (*runs, runs[0])), "--output", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == (tmp_path / "comparison.html").read_text()


@pytest.mark.slow
def test_figures_of_other_splits_stand_apart_and_say_so(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    events = (second / "metrics.jsonl").read_text().replace('"test"', '"validation"')
    (second / "metrics.jsonl").write_text(events)
    page = Page(write_report([first, second])).text()
    headline = page.partition("All evaluations")[0]
    assert "split run weights clean" in headline
    splits = re.findall(r"(test|validation) [ab] (?:start|best|last) ", headline)
    assert splits == ["test"] * 3 + ["validation"] * 3
    assert "during training do not compare" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epsilon: 0.03137254901960784", "epsilon: 0.1"),
        ("norm: linf", "norm: l2"),
        ("sam:", "evaluation: {steps: 20}\nsam:"),
        ("sam:", "evaluation: {max_images: 10}\nsam:"),
        ("sam:", "data: {path: other}\nsam:"),
    ],
)
def test_accuracies_under_other_attacks_in_training_are_not_shown_as_comparable(
    tmp_path: Path, old: str, new: str
) -> None:
    runs = [make_run(tmp_path / name, epochs=3) for name in ("a", "b", "c")]
    assert "during training do not compare" not in Page(write_report(runs)).text()
    recipe = (runs[1] / "run.yaml").read_text()
    (runs[1] / "run.yaml").write_text(recipe.replace(old, new))
    assert "Accuracies during training do not compare" in Page(write_report(runs)).text()


def test_names_are_escaped(tmp_path: Path) -> None:
    name = '<script>alert("1")&$x_1$'
    first = make_run(tmp_path / "a" / name, layers=(*LAYERS, f"blocks.0.{name}"))
    (first / "config.json").write_text(json.dumps({"safer_fast": {"classes": [name]}}))
    second = make_run(tmp_path / "b" / "_plain")
    page = Page(write_report([first, second]))
    assert "script" not in page.tags
    assert page.text().count(name) > 5


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / parent / "run", epochs=3) for parent in ("a", "b")]
    text = Page(write_report(folders)).text()
    assert all(str(folder) in text for folder in folders)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1, 12])
def test_an_unfinished_run_is_reported_in_plain_words(tmp_path: Path, epochs: int) -> None:
    folder = make_run(tmp_path / "run", epochs=epochs, is_finished=False)
    (folder / "config.json").unlink()
    text = Page(write_report([folder])).text()
    assert "No final evaluation has been written yet." in text
    assert "No selection of layers has been made yet." in text
    assert f"{epochs} of 40 not finished" in text
    assert ("No epoch has been completed yet" in text) == (epochs == 0)


def test_a_folder_with_nothing_but_an_empty_log_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    text = Page(write_report([tmp_path])).text()
    assert "There is no run.yaml" in text
    assert "recorded nothing about its environment" in text


def test_layers_chosen_by_name_have_a_table_and_no_map(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", layers=())
    page = Page(write_report([folder]))
    assert "chosen without scores" in page.text()
    assert page.tags.count("figure") == len(CURVES)


@pytest.mark.slow
def test_selections_over_time_show_each_layer_that_was_ever_selected(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", selected_at=())
    names = [f"blocks.{block}.mlp.fc1" for block in range(41)]
    chosen = [["head", "blocks.10.mlp.fc1"], ["blocks.9.attn.proj", "blocks.9.attn.qkv"], names]
    for count in (1, 2, 3):
        event = _selection(10 * count, LAYERS, random.Random(0)) | {"selected": chosen[count - 1]}
        add_events(folder, event)
        source = write_report([folder]).read_text()
        drawing = source.partition('id="choices-0-')[2].partition("</svg>")[0]
        rows = re.findall(r">((?:blocks|head)[^<]*)</text>", drawing)
        expected = ["blocks.9.attn.qkv", "blocks.9.attn.proj", "blocks.10.mlp.fc1", "head"]
        assert rows == (expected if count == 2 else [])


def test_swin_and_scores_that_are_not_finite_have_a_map(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", layers=SWIN)
    text = (folder / "metrics.jsonl").read_text().replace('"head.fc": 0', '"head.fc": null, "x": 0')
    (folder / "metrics.jsonl").write_text(text)
    text = Page(write_report([folder])).text()
    assert "↓" in text
    assert "attn.qkv" in text


def test_the_gap_counts_only_from_full_epsilon_on(tmp_path: Path) -> None:
    ramp = make_run(tmp_path / "ramp", epochs=4, is_finished=False)
    full = make_run(tmp_path / "full", epochs=8, is_finished=False)
    text = Page(write_report([ramp, full])).text()
    gaps = text[text.index("robust gap") : text.index("speed")]
    assert gaps.startswith("robust gap \N{EN DASH} ")
    assert "training over validation, epoch 8" in gaps


def test_clean_epochs_are_named_where_training_is_drawn_as_under_attack(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=4, is_finished=False)
    words = "Accuracy under attack, but for training in clean epochs; the shaded gap"
    assert words not in Page(write_report([run])).text()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    write_events(run, [e | ({"epsilon": 0.0} if e.get("epoch") == 1 else {}) for e in events])
    assert words in Page(write_report([run])).text()


def test_an_epoch_that_was_trained_again_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=20)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    epoch = json.loads(lines[15]) | {"clean_accuracy": 0.123, "time_s": 10.0}
    (folder / "metrics.jsonl").write_text("".join([*lines[:18], json.dumps(epoch) + "\n"]))
    text = Page(write_report([folder])).text()
    assert "17 of 40 not finished" in text
    assert "27 min 05 s" in text  # 17 epochs of 95 s, then 10 s


@pytest.mark.slow
def test_many_selections_are_thinned_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", selected_at=tuple(range(1, 41)))
    page = Page(write_report([folder]))
    assert page.tags.count("svg") == len(CURVES) + 12 + 1
    assert "12 of 40 selections are shown." in page.text()
    assert "epoch 1: sharpness" in page.source
    assert "epoch 40: sharpness" in page.source


@pytest.mark.parametrize("what", ["missing", "empty", "damaged", "wrong"])
def test_a_bad_folder_ends_with_one_line_that_names_it(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / what
    if what != "missing":
        folder.mkdir()
    if what == "damaged":
        (folder / "metrics.jsonl").write_text("{}\nnonsense\n")
    if what == "wrong":
        (folder / "metrics.jsonl").touch()
        (folder / "run.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=f"{what}.*expected .*, got ") as error:
        main([str(folder)])
    assert "\n" not in str(error.value)


def test_the_command_says_where_the_page_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    main([str(folder), "--output", str(output)])
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert output.stat().st_size > 10_000


def test_the_command_exits_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "safer_fast.report", str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "expected a run folder with metrics.jsonl" in result.stderr
    assert result.stderr.count("\n") == 1


def test_importing_the_report_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, safer_fast.report; print({'torch', 'matplotlib'} & set(sys.modules))"
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


LOOK = """
<script>
addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify({
  overflow: document.documentElement.scrollWidth - innerWidth,
  width: innerWidth,
  figures: Array.from(document.querySelectorAll("figure"), figure => {
    const box = figure.getBoundingClientRect();
    const drawn = figure.querySelector("svg, img").getBoundingClientRect();
    const caption = figure.querySelector("figcaption").getBoundingClientRect();
    return Math.min(box.width, drawn.width, drawn.height, caption.width, caption.height);
  }),
  pictures: Array.from(document.images, image => image.complete ? image.naturalWidth : 0),
  asked: performance.getEntriesByType("resource").map(entry => entry.name)
    .filter(name => !name.startsWith("data:")),
}), "*"), 100));
</script>
"""
FRAME = """
<script>addEventListener("message", event => { document.body.dataset.seen = event.data; });</script>
<iframe src="page.html" style="width: WIDTHpx; height: 900px; border: 0"></iframe>
"""


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What headless Chromium says of a page; the test is skipped where there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *options]
    words += ["--disable-background-networking", "--enable-logging=stderr"]
    words += [f"--user-data-dir={page.parent / 'browser'}", page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)


def look(page: Path, width: int) -> dict[str, Any]:
    """What a script sees of the page in a window of `width` pixels, without console errors."""
    source = page.read_text(encoding="utf-8").replace("</body>", f"{LOOK}</body>")
    folder = page.parent / "framed"
    folder.mkdir(exist_ok=True)
    (folder / "page.html").write_text(source, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(f"<body>{FRAME.replace('WIDTH', str(width))}</body>")
    result = browse(frame, "--dump-dom", "--virtual-time-budget=4000")
    assert "CONSOLE" not in result.stderr
    seen: dict[str, Any] = json.loads(
        unescape(result.stdout.partition('data-seen="')[2].partition('"')[0])
    )
    assert seen["width"] == width
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("num_runs", [1, 2])
def test_a_browser_shows_every_figure_on_phones_and_desks(
    folder: Path, tmp_path: Path, width: int, num_runs: int
) -> None:
    folders = [folder, *(make_run(tmp_path / (f"a-run-of-{n}" * 3)) for n in range(1, num_runs))]
    seen = look(write_report(folders, tmp_path / "page.html"), width)
    assert len(seen["figures"]) == len(CURVES) + 2 + num_runs
    assert min(seen["figures"]) > 10
    assert len(seen["pictures"]) == 9
    assert min(seen["pictures"]) > 0
    assert seen["overflow"] <= 0
    assert seen["asked"] == []


@pytest.mark.slow
def test_a_browser_shows_the_page_without_errors(folder: Path, tmp_path: Path) -> None:
    result = browse(write_report([folder], tmp_path / "page.html"), "--dump-dom")
    assert "</html>" in result.stdout
    assert "CONSOLE" not in result.stderr


@pytest.mark.slow
def test_a_browser_prints_the_page(folder: Path, tmp_path: Path) -> None:
    page, paper = write_report([folder], tmp_path / "page.html"), tmp_path / "page.pdf"
    browse(page, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    content = paper.read_bytes()
    assert content.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type /Page\b", content)) <= 9
    assert len(re.findall(rb"/Subtype /Image", content)) >= 9
