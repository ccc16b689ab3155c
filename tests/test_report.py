"""The report: complete, self-contained, escaped, and calm about what is not there yet."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safer_fast.report import main, write_report

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
CURVES = ("Robust accuracy", "Clean accuracy", "Training loss", "Learning rate", "Epsilon", "Speed")


def make_run(
    folder: Path,
    *,
    epochs: int = 40,
    selected_at: tuple[int, ...] = (21, 31),
    layers: tuple[str, ...] = LAYERS,
    shift: float = 0.0,
    is_finished: bool = True,
) -> Path:
    """A run folder as a training of 20 warm-up epochs and SAFER leaves it, without weights."""
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "vit-small")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report([folder]))


def test_every_figure_is_there_with_a_title_and_a_caption(page: Page) -> None:
    assert page.tags.count("figure") == len(CURVES) + 1
    assert page.tags.count("figcaption") == page.tags.count("figure")
    assert page.tags.count("svg") == len(CURVES) + 2  # one map for each of two selections
    for title in (*CURVES, "Layer map"):
        assert title in page.text()


def test_the_page_asks_for_nothing_from_outside(page: Page) -> None:
    assert all(reference.startswith("#") for reference in page.references)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    assert "@import" not in page.source
    assert "url(http" not in page.source


def test_identifiers_are_unique_and_every_reference_has_its_target(page: Page) -> None:
    assert len(page.identities) == len(set(page.identities))
    assert {reference[1:] for reference in page.references} <= set(page.identities)


def test_the_same_run_gives_the_same_page(folder: Path, page: Page, tmp_path: Path) -> None:
    output = write_report([folder], tmp_path / "again.html")
    assert output.read_text(encoding="utf-8") == page.source


def test_accuracies_stand_in_rows_of_weights_split_and_attack(page: Page) -> None:
    text = page.text()
    expected = ["start test clean 77.1 %", "best test pgd-20 ε = 8/255 45.1 %"]
    expected += ["last test clean 79.1 %", "10,000 images"]
    assert [words for words in expected if words not in text] == []
    assert text.index("start test clean") < text.index("best test clean")
    assert text.index("best test clean") < text.index("best test pgd-20")
    assert text.index("best test pgd-20") < text.index("last test clean")


def test_selections_configuration_and_environment_are_listed(page: Page) -> None:
    text = page.text()
    for words in ("21 sharpness", "selection.fraction 0.05", "versions.timm 1.0.31", "cat, dog"):
        assert words in text
    assert "native kernels: live" in text
    assert "safer_fast.accuracies" not in text


def test_several_runs_share_the_curves_and_stand_in_columns(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "safer"), make_run(tmp_path / "pgd-at", shift=0.02)
    page = Page(write_report([first, second]))
    assert page.tags.count("figure") == len(CURVES) + 2
    assert "2 runs compared" in page.text()
    assert "weights split attack safer pgd-at" in page.text()
    assert 'class="different"' in page.source
    assert (first / "report.html").exists()
    assert not (second / "report.html").exists()


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


def test_an_epoch_that_was_trained_again_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=20)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    epoch = json.loads(lines[15]) | {"clean_accuracy": 0.123, "time_s": 10.0}
    (folder / "metrics.jsonl").write_text("".join([*lines[:18], json.dumps(epoch) + "\n"]))
    text = Page(write_report([folder])).text()
    assert "17 of 40 not finished" in text
    assert "27 min 05 s" in text  # 17 epochs of 95 s, then 10 s


def test_many_selections_are_thinned_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", selected_at=tuple(range(1, 41)))
    page = Page(write_report([folder]))
    assert page.tags.count("svg") == len(CURVES) + 12
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


def test_a_browser_shows_the_page_without_errors(folder: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    page = write_report([folder], tmp_path / "page.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    options += ["--disable-background-networking", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'browser'}", page.as_uri()]
    result = subprocess.run(
        [browser, *options], capture_output=True, text=True, check=True, timeout=60
    )
    assert "</html>" in result.stdout
    assert "CONSOLE" not in result.stderr
