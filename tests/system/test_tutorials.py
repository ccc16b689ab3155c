"""Every line of the tutorials runs, in order, on little data."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import timm
from safetensors.torch import save_file

from tests.support import small_runs
from tests.support.pictures import encode, photo
from tests.support.reports import with_reports

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLOWERS = ("daisy", "poppy", "rose", "tulip")
NETWORK = {"depth": 1, "embed_dim": 16, "num_heads": 2}


def play(page: str, little: Mapping[str, list[str]], changes: Mapping[str, str]) -> dict[str, Any]:
    """Run commands and cells of a page, one after the other, and return what the cells define.

    little: flags that make a command quick; changes: texts that are put in the place of others,
    all of which must be there.
    """
    text = (DOCS / f"{page}.md").read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    world: dict[str, Any] = {}
    for language, block in BLOCK.findall(text):
        if language == "python":
            with with_reports():
                exec(compile(block, page, "exec"), world)
        elif language == "bash":
            for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
                run(shlex.split(line), little)
        else:
            assert language == "text", language
    return world


def run(words: list[str], little: Mapping[str, list[str]]) -> None:
    if words[0] == "tensorboard":  # it serves until it is ended
        return
    assert words[:2] == ["python", "-m"], words
    main: Callable[[list[str]], None] = import_module(words[2]).main
    with with_reports():
        main([*words[3:], *little.get(words[2].removeprefix("safer_fast."), [])])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; figures need no screen, and what is imported is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    mpl.use("agg")
    yield tmp_path
    sys.modules.pop("robust_model", None)


@pytest.mark.slow
def test_your_own_images_from_the_folder_to_the_exported_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(FLOWERS):
        for split, count in {"train": 12, "test": 2}.items():
            folder = here / "pictures" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                picture = photo(40, 36, 100 * number + index)
                (folder / f"{index}.jpg").write_bytes(encode(picture, "jpeg"))
    network = timm.create_model("vit_small_patch16_224", img_size=32, patch_size=16, **NETWORK)
    save_file(network.state_dict(), here / "start.safetensors")
    size = ["--model.patch_size=16", f"--model.arguments={NETWORK}".replace("'", '"')]
    train = [*size, "--data.num_workers=0", "--data.backend=torch", "--runtime.num_threads=1"]
    train += ["--selection.num_images=8", "--evaluation.steps=2", "--attack.max_steps=2"]
    little = {
        "train": train,
        "evaluate": ["--num-images=8"],
        "select": ["--num-images=8", "--steps=1"],
    }
    changes = {
        # nothing can be fetched here
        " --model.pretrained true --amp": " --model.checkpoint start.safetensors --amp",
        "--data.image_size 224": "--data.image_size 32",
        "--epochs 20": "--epochs 2",
        "warmup_epochs 15": "warmup_epochs 1",
        "epsilon_warmup_epochs 5": "epsilon_warmup_epochs 0",
        " --num-images 1000": "",
    }
    world = play("tutorial-images", little, changes)
    assert world["names"] == list(FLOWERS)
    assert capsys.readouterr().out.splitlines()[-1] in FLOWERS
    assert "autoattack" in (here / "flowers-hub" / "README.md").read_text().lower()
    for file in ("flowers/report.html", "flowers-onnx/model.onnx"):
        assert (here / file).is_file(), file


def test_a_notebook_cell_by_cell(here: Path) -> None:
    changes = {
        "epochs=20": "epochs=2, model={'name': 'vit_tiny_patch16_224', 'arguments': "
        f"{NETWORK}, 'patch_size': 4}}, runtime={{'num_threads': 1}}",
        "warmup_epochs = 15": "warmup_epochs = 1",
        "config.attack.epsilon_warmup_epochs = 2, 4": "config.attack.epsilon_warmup_epochs = 0, 0",
        "images[:1000], digits.target[:1000]": "images[:64], digits.target[:64]",
        "images[1000:], digits.target[1000:]": "images[1000:1100], digits.target[1000:1100]",
    }
    world = play("tutorial-notebook", {}, changes)
    assert 0 <= world["attacked"].accuracy <= world["clean"].accuracy <= 1
    moved = (world["adversarial"] - world["pixels"]).abs().max()
    assert 0 < moved <= world["epsilon"] + 1e-6
    assert (here / "attacked.png").is_file()
    assert (here / "runs/notebook/report.html").is_file()


@pytest.mark.slow
def test_from_an_old_run_to_a_papers_table(here: Path) -> None:
    for name, seed in {"safer": 1, "baseline": 2}.items():
        flags = [*small_runs.TINY, f"--seed={seed}", f"--data.test_path={small_runs.TEST_IMAGES}"]
        small_runs.run(here / "runs" / name, *flags)
    play("tutorial-paper", {"evaluate": ["--num-images=12"]}, {})
    table = (here / "table.tex").read_text().splitlines()
    assert [line.partition(" ")[0] for line in table[2:4]] == ["baseline", "safer"]
    assert all(re.fullmatch(r"\w+( & \d+\.\d){3} \\\\", line) for line in table[2:4])
    assert (here / "comparison.html").is_file()
    assert "autoattack" in (here / "safer-hub" / "README.md").read_text().lower()
