"""Defaults without a recipe suit the data and new weights, and a line names each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safer_fast.config.command_line import find_open_flags, parse_config, scaled_by_epochs
from safer_fast.train import main
from safer_fast.training.defaults import choose_defaults, patch_size_for

SMALL = [
    "--model.arguments={depth: 1, embed_dim: 16, num_heads: 2}",
    "--batch-size=24",
    "--attack.steps=1",
    "--selection.num_images=8",
    "--evaluation.steps=1",
    "--evaluation.attacks=clean",
    "--evaluation.sentinel_images=0",
    "--runtime.attention=math",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "set.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.savez(file, images=images, labels=np.arange(60) % 3)
    return file


def chosen(*words: str) -> tuple[dict[str, Any], list[str]]:
    config, notes = choose_defaults(parse_config(words), find_open_flags(words))
    values = {
        "patch_size": config.model.patch_size,
        "warmup": config.selection.warmup_epochs,
        "clean": config.attack.clean_epochs,
        "ramp": config.attack.epsilon_warmup_epochs,
    }
    return values, notes


def test_a_patch_divides_the_image_and_leaves_enough_of_them() -> None:
    sizes = {2: 2, 8: 2, 16: 2, 28: 4, 30: 3, 31: 4, 32: 4, 48: 6, 64: 8, 96: 12, 128: 16, 224: 16}
    assert {size: patch_size_for(size) for size in sizes} == sizes


def test_what_is_not_given_suits_the_data_and_what_is_given_stays(data: Path) -> None:
    path = f"--data.path={data}"
    values, notes = chosen(path)
    assert values == {"patch_size": 4, "warmup": 30, "clean": 5, "ramp": 10}
    assert notes[0] == "--model.patch_size 4: images have 32 pixels an edge"
    assert [note.split()[0] for note in notes[1:]] == [
        "--selection.warmup_epochs",
        "--attack.clean_epochs",
        "--attack.epsilon_warmup_epochs",
    ]
    plain = {"patch_size": None, "warmup": 0, "clean": 0, "ramp": 0}
    ramp = {"clean": 5, "ramp": 10}
    everything = {"warmup": 30, **ramp}
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["--model.patch_size=8"], {"patch_size": 8, **everything}),
        (["--model.patch-size", "8"], {"patch_size": 8, **everything}),
        (["--model.name=vit_small_patch16_224"], everything),
        (["--model.arguments={patch_size: 8}"], everything),
        (["--data.image_size=224"], everything),
        (["--model.checkpoint=somewhere"], {}),
        (["--model.pretrained=true"], {}),
        (["--selection.warmup_epochs=12"], {"patch_size": 4, "warmup": 12, "clean": 2, "ramp": 4}),
        (["--selection.warmup_epochs=0"], {"patch_size": 4, **ramp}),
        (["--selection.criterion=all"], {"patch_size": 4, **ramp}),
        (["--attack.clean_epochs=0"], {"patch_size": 4, "warmup": 30, "ramp": 10}),
        (["--attack.steps=0"], {"patch_size": 4, "warmup": 30}),
        (["--epochs=1"], {"patch_size": 4}),
        (["--epochs=4"], {"patch_size": 4, "warmup": 3, "ramp": 1}),
    ]
    for words, expected in cases:
        assert chosen(path, *words)[0] == plain | expected, words


def test_recipes_and_files_are_taken_as_they_are(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("epochs: 40\n")
    for words in ([], [f"--config={file}", f"--data.path={data}"], ["--config", "digits"]):
        config = parse_config(words)
        assert choose_defaults(config, find_open_flags(words)) == (config, [])


def test_the_default_recipe_keeps_its_shares_of_other_epochs() -> None:
    def ramps(*words: str) -> list[float]:
        config = parse_config(words)
        selection, attack = config.selection, config.attack
        ramp = attack.clean_epochs, attack.epsilon_warmup_epochs
        return [selection.warmup_epochs, *ramp, config.optim.warmup_epochs]

    plain = [60, 10, 20, 5]
    assert ramps() == ramps("--epochs=80") == ramps("--config=digits") == plain
    assert ramps("--epochs", "8") == ramps("--epochs=8") == [6, 1, 2, 0.5]
    assert ramps("--epochs=8", "--attack.clean-epochs=3") == [6, 3, 2, 0.5]
    assert ramps("--epochs=90", "--selection.warmup_epochs=7") == [7, *plain[1:]]
    assert [line.partition(":")[0] for line in scaled_by_epochs(["--epochs=8"])] == [
        "--selection.warmup_epochs 6",
        "--attack.clean_epochs 1",
        "--attack.epsilon_warmup_epochs 2",
        "--optim.warmup_epochs 0.5",
    ]
    for words in ([], ["--epochs=80"], ["--epochs=70", "--config=digits"]):
        assert scaled_by_epochs(words) == []


def test_a_patch_size_among_the_arguments_replaces_that_of_the_recipe() -> None:
    config = parse_config(["--model.arguments={patch_size: 4}"])
    assert (config.model.patch_size, config.model.arguments["patch_size"]) == (None, 4)
    assert parse_config(["--model.arguments={depth: 2}"]).model.patch_size == 2


@pytest.mark.slow
def test_a_run_says_what_it_chose_writes_it_down_and_resumes_with_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    words = [*SMALL, f"--data.path={data}", f"--output={output}", "--epochs=4"]
    main(words)
    said = capsys.readouterr().out
    assert "note:       --model.patch_size 4: images have 32 pixels an edge" in said
    assert "note:       --selection.warmup_epochs 3: of 4 epochs" in said
    written = yaml.safe_load((output / "run.yaml").read_text())
    assert written["model"]["patch_size"] == 4
    assert written["selection"]["warmup_epochs"] == 3
    # another version may choose otherwise
    monkeypatch.setattr("safer_fast.training.defaults.LEAST_PATCHES", 4)
    main([*words, "--resume=auto"])
    assert "finished already" in capsys.readouterr().out
    main(["--config", str(output / "run.yaml"), f"--output={tmp_path / 'again'}"])
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (output, tmp_path / "again")
    ]
    assert weights[0] == weights[1]
