"""Command lines: recipes, flags in any order, and one clear line for every mistake."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from safer_fast.config.checks import check_new
from safer_fast.config.command_line import parse_config
from safer_fast.config.recipe_files import RECIPES
from safer_fast.config.schema import Config, ModelConfig
from safer_fast.runs.folder import save_config
from tests.support.commands import refused
from tests.support.kills import Server


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", f"safer_fast.{name}", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment,
    )


def test_without_flags_the_built_in_digits_are_the_job() -> None:
    config = parse_config([])
    assert config.data.path is None
    assert config.model.patch_size == 2
    assert config.selection.warmup_epochs > 0
    selections = (config.epochs - config.selection.warmup_epochs) / config.selection.every_epochs
    assert selections >= 2


def test_data_of_ones_own_start_from_the_plain_defaults() -> None:
    config = parse_config(["--data.path", "somewhere"])
    assert config.model == Config().model
    assert config.attack.epsilon == pytest.approx(8 / 255)


def test_flags_override_the_recipe_wherever_they_stand() -> None:
    for words in (
        ["--batch-size", "8", "--config", "cifar10-safer", "--attack.epsilon", "4/255"],
        ["--attack.epsilon=4/255", "--config=cifar10-safer", "--batch_size=8"],
    ):
        config = parse_config(words)
        assert config.batch_size == 8
        assert config.attack.epsilon == pytest.approx(4 / 255)
        assert config.model.patch_size == 4


def test_a_checkpoint_takes_the_place_of_pretrained_weights() -> None:
    words = ["--config=finetune", "--model.checkpoint=start.safetensors"]
    config = parse_config(words)
    assert (config.model.pretrained, config.model.checkpoint) == (False, "start.safetensors")
    with pytest.raises(ValueError, match=r"^--model\.pretrained: expected false with"):
        check_new(parse_config([*words, "--model.pretrained=true"]))
    for model in ({"checkpoint": "start.safetensors"}, ModelConfig(checkpoint="start.safetensors")):
        check_new(Config.from_recipe("finetune", model=model))
    assert Config.from_recipe("finetune", model={"checkpoint": None}).model.pretrained


def test_another_model_drops_the_arguments_of_the_recipes_model() -> None:
    config = parse_config(["--model.name", "deit_tiny_patch16_224"])
    assert config.model.arguments == {}
    assert config.model.patch_size == 2
    kept = parse_config(["--model.name", "deit_tiny_patch16_224", "--model.arguments.depth", "3"])
    assert kept.model.arguments == {"depth": 3}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_valid_and_says_what_it_is(recipe: str) -> None:
    parse_config(["--config", recipe, "--data.path", "somewhere"])
    header = (RECIPES / f"{recipe}.yaml").read_text().split("\n")
    comments = "\n".join(line for line in header if line.startswith("#"))
    for word in ("Command:", "Hardware:", "Time:", "Accuracy:"):
        assert word in comments, word


def test_the_recipes_of_the_contract_are_there() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    expected = {"cifar10-pgd-at", "cifar10-sam-at", "cifar10-safer", "cifar10-safer-blocks"}
    assert names >= {"digits", "imagenet-vit-large", *expected}


def test_a_saved_configuration_repeats_the_run(tmp_path: Path) -> None:
    config = parse_config(["--attack.norm", "l2", "--selection.layers", "head,blocks.*"])
    save_config(config, tmp_path)
    again = parse_config(["--config", str(tmp_path / "run.yaml")])
    assert again == config
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["attack"]["norm"] == "l2"


MISTAKES: list[tuple[list[str], str]] = [
    (["--foo", "1"], "unknown flag --foo"),
    (["--attack.epsilonn", "1"], "unknown flag --attack.epsilonn, did you mean --attack.epsilon?"),
    (["--optim.nam", "sgd"], "unknown flag --optim.nam, did you mean --optim.name?"),
    (["--attack.eps", "8"], "unknown flag --attack.eps, did you mean --attack.epsilon?"),
    (["--threads", "8"], "unknown flag --threads, did you mean --runtime.num_threads?"),
    (["--dry-runn"], "unknown flag --dry-runn, did you mean --dry-run?"),
    (["digits", "--epochs=3"], "flags with their values, got digits, did you mean --config digits"),
    (["--evaluation.attacks", "clean", "pgd-3"], "--evaluation.attacks are separated by commas"),
    (["/", "--epochs=3"], "flags with their values, got /, did you mean --data.path /?"),
    (["--model.arguments", "{depth:", "4}"], "--model.arguments: expected names with values"),
    (["--model", "x"], "--model: expected names with values such as {name: value}, got 'x'"),
    (["--help", "atack"], "log, all, got atack, did you mean attack?"),
    (["--amp", "fp3"], "--amp: expected one of off, bf16, got fp3"),
    (["--epochs", "1.5"], "--epochs: expected a whole number, got 1.5"),
    (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
    (["--batch-size", "x"], "--batch-size: expected a whole number, got x"),
    (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
    (["--attack.epsilon", "abc"], "--attack.epsilon: expected a number or a fraction such as"),
    (["--attack.epsilon", "8/0"], "--attack.epsilon: expected a number or a fraction such as"),
    (["--attack.epsilon", "nan"], "--attack.epsilon: expected a radius"),
    (["--attack.epsilon", "8"], "--attack.epsilon: expected 0 to 1, got 8: did you mean 8/255?"),
    (["--attack.norm"], "--attack.norm: expected one argument"),
    (["--attack.norm", "l1"], "--attack.norm: expected one of linf, l2, got l1"),
    (["--sam.adaptive", "maybe"], "--sam.adaptive: expected true or false, got maybe"),
    (["--optim.clip_norm", "x"], "--optim.clip_norm: expected a number, got x"),
    (["--optim.betas", "[0.9,2]"], "--optim.betas: expected two shares in [0, 1)"),
    (["--model.arguments", "3"], "--model.arguments: expected names with values"),
    (["--selection.fraction", "0"], "--selection.fraction: expected a share above 0"),
    (["--selection.warmup_epochs", "1000"], "--selection.warmup_epochs: expected less than"),
    (["--evaluation.attacks", "pgd"], "--evaluation.attacks: expected clean, fgsm, pgd-K"),
    (["--config", "nope"], "--config: expected a YAML file or one of the recipes"),
    (["--data.path", "nowhere"], "data.path: expected"),
    (["--model.name", "resnet18"], "model.name: expected a vision transformer"),
    (["--model.name", "vit_tinny"], "model.name: expected a model of timm, got 'vit_tinny'"),
    (["--model.arguments.hight", "3"], "--model.arguments: expected arguments of vit_tiny"),
    (["--model.checkpoint", "none.safetensors"], "model.checkpoint: expected a run folder"),
    (["--selection.layers", "block.*"], "selection.layers: expected names or patterns"),
    (["--selection.from_block", "4"], "selection.from_block: expected less than the 4 blocks"),
    (["--selection.candidates", "block.*"], "selection.candidates: expected names or patterns"),
    (["--selection.layers", ""], "--selection.layers: expected at least one name"),
    (["--selection.candidates", ""], "--selection.candidates: expected at least one name"),
    (["--evaluation.attacks", ""], "--evaluation.attacks: expected at least one attack"),
    (["--optim.milestones", "[0.9,0.5]"], "--optim.milestones: expected rising shares in (0, 1)"),
    (["--optim.min_learning_rate", "1"], "--optim.min_learning_rate: expected at most 0.002"),
    (["--runtime.device", "cuda"], "--runtime.device: expected cpu or auto"),
    (["--optim.name", "apex-adam"], "optim.name: apex-adam needs"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda v: " ".join(v)[:40])
def test_a_mistake_gets_one_line_and_touches_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    from safer_fast.train import main

    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("this machine has a CUDA device")
    monkeypatch.chdir(tmp_path)
    assert message in refused(main, [*arguments, "--output", "run"], capsys)
    assert list(tmp_path.iterdir()) == []


def write_image(file: Path, size: int = 8) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), "red").save(file)


def write_data(folder: Path, kind: str) -> None:
    """A folder of images for two classes with one thing wrong."""
    import numpy as np

    folder.mkdir()
    if kind == "empty":
        return
    if kind == "labels":
        labels = np.array([0, 1, -1, 0])
        np.savez(folder / "data.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels)
        return
    for name in ("cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"):
        write_image(folder / "train" / name)
    if kind == "corrupt":
        (folder / "train/cat/1.png").write_bytes(b"no image")
    if kind == "zero bytes":
        (folder / "train/dog/4.png").write_bytes(b"")
    if kind == "mixed":
        write_image(folder / "train/dog/4.png", size=9)
    if kind == "empty class":
        (folder / "train/bird").mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "data.path: expected"),
        ("labels", "label"),
        ("corrupt", "cat/1.png"),
        ("zero bytes", "dog/4.png"),
        ("mixed", "data.image_size: expected one size for all images"),
        ("empty class", "bird"),
    ],
)
def test_bad_data_gets_one_line_and_touches_nothing(
    kind: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safer_fast.train import main

    folder = tmp_path / "data"
    write_data(folder, kind)
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(tmp_path)
    path = folder / "data.npz" if kind == "labels" else folder
    flags = ["--data.path", str(path), "--batch-size", "1"]
    flags += ["--model.name", "vit_tiny_patch16_224", "--model.patch_size", "4"]
    flags += ["--data.validation_fraction", "0.25", "--output", "run"]
    assert message in refused(main, flags, capsys)
    assert sorted(folder.rglob("*")) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("attack: {epsilonn: 1}", "unknown setting 'attack.epsilonn', did you mean"),
        ("epoch: 3", "unknown setting 'epoch', did you mean 'epochs'?"),
        ("attack: {norm: l1}", "--attack.norm: expected one of linf, l2, got l1"),
        ("attack: [1", "--config: expected YAML in"),
        ("", "--config: expected names with values in"),
        ("just words", "--config: expected names with values in"),
    ],
)
def test_a_wrong_yaml_file_gets_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_fast.train import main

    file = tmp_path / "mine.yaml"
    file.write_text(content)
    assert message in refused(main, ["--config", str(file)], capsys)


def test_a_run_folder_in_use_is_refused_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_fast.train import main

    (tmp_path / "mine.txt").write_text("precious")
    assert "which is not empty" in refused(main, ["--output", str(tmp_path)], capsys)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    file = str(tmp_path / "mine.txt")
    assert f"got {file}, a file" in refused(main, ["--output", file], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "select", "report", "export"])
def test_commands_refuse_what_is_no_run(name: str, server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    ending = server.command(name, folder)
    assert (ending.status, ending.errors.count("\n")) == (2, 1), ending.errors
    assert "expected a run folder" in ending.errors
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["train", "evaluate", "select", "report", "export", "doctor"])
def test_help_answers_quickly_and_explains_every_flag(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = command(name, "--help", "all")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # seconds of work, not of waiting for other processes of a busy machine
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert result.returncode == 0, result.stderr
    assert f"python -m safer_fast.{name}" in result.stdout
    if name == "train":
        assert "Radius of the ball; pixels are in [0, 1]" in " ".join(result.stdout.split())
        for line in ("--attack.epsilon", "--sam.rho", "--selection.every_epochs", "--batch-size"):
            assert line in result.stdout
    shown = " ".join(result.stdout.split())
    assert shown.startswith(f"usage: python -m safer_fast.{name} ")
    for word in ("<class", "Literal[", "Union[", "Path to a configuration file", "type: int"):
        assert word not in shown


def shown_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help", *words])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_explains_ten_flags_and_names_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_help(capsys)
    explained = re.findall(r"^  (--\S+)", shown, re.MULTILINE)
    assert len(explained) == 10
    assert {"--config", "--data.path", "--attack.epsilon", "--output", "--dry-run"} <= {*explained}
    assert "default: 8/255" in shown
    index = shown[shown.index("more flags") :]
    groups = Config().to_dict()
    for name, values in groups.items():
        if isinstance(values, dict):
            assert f"\n  {name} " in index
        for setting in values if isinstance(values, dict) else ():
            assert f"--{name}.{setting}" in explained or setting in index
        if not isinstance(values, dict):
            flag = "--" + name.replace("_", "-")
            assert flag in explained or flag in index
    assert len(shown.splitlines()) < 100


def test_help_of_a_group_explains_it_alone(capsys: pytest.CaptureFixture[str]) -> None:
    explained = re.findall(r"^  (--\S+)", shown_help(capsys, "attack"), re.MULTILINE)
    assert explained == [f"--attack.{name}" for name in Config().to_dict()["attack"]]
    everything = shown_help(capsys, "all")
    assert all(flag in everything for flag in explained)
    assert "--seed" in shown_help(capsys, "run")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("int | null", "whole number or null"),
        ("<class 'safer_fast.config.schema.Names'>", "names, separated by commas"),
        ("Union[int, Literal['auto']]", "whole number or auto"),
        ("Optional[Literal['linf', 'l2']]", "linf or l2 or null"),
        ("Radius | null", "number or fraction such as 8/255 or null"),
        ("tuple[float, ...]", "numbers such as [0.9, 0.95]"),
        ("dict[str, Any]", "names with values such as {depth: 4}"),
    ],
)
def test_help_says_in_words_what_a_flag_takes(kind: str, words: str) -> None:
    from safer_fast.config.help_text import in_words

    assert in_words(kind) == words
