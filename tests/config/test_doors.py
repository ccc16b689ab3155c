"""Messages name arguments and fields where Python asks, flags where a command does."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safer_fast import (
    AttackConfig,
    Config,
    EvaluateConfig,
    build_model,
    evaluate_run,
    load_model,
    pgd,
    rank_layers,
    select_layers,
    train_model,
)
from safer_fast.config.command_line import parse_config, scaled_by_epochs
from safer_fast.runs.exporters import export
from safer_fast.select import select
from tests.support.commands import refused

UNKNOWN: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (Config, {"epohcs": 3}, "Config: unknown setting 'epohcs', did you mean 'epochs'?"),
    (Config, {"lr": 1}, "Config: unknown setting 'lr', did you mean 'optim.learning_rate'?"),
    (Config, {"optimizer": {"name": "sgd"}}, "'optimizer.name', did you mean 'optim.name'?"),
    (Config, {"modl": {"name": "vit"}}, "'modl.name', did you mean 'model.name'?"),
    (Config, {"train": {"epohcs": 3}}, "unknown setting 'train.epohcs', did you mean 'epochs'?"),
    (Config, {"xyzzy": 3}, "Config: unknown setting 'xyzzy'"),
    (AttackConfig, {"eps": 1}, "AttackConfig: unknown setting 'eps', did you mean 'epsilon'?"),
    (EvaluateConfig, {"atacks": ""}, "unknown setting 'atacks', did you mean 'attacks'?"),
    (
        train_model,
        {"confg": 1},
        "train_model(): unknown argument 'confg', did you mean 'config'",
    ),
    (evaluate_run, {"config": "x", "num_imges": 3}, "'num_imges', did you mean 'num_images'?"),
    (load_model, {"run": "x", "wights": 3}, "argument 'wights', did you mean 'weights'?"),
]


@pytest.mark.parametrize(
    ("function", "settings", "message"), UNKNOWN, ids=lambda v: getattr(v, "__name__", str(v)[:40])
)
def test_an_unknown_argument_gets_the_nearest_name(
    function: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(message)) as caught:
        function(**settings)
    assert "\n" not in str(caught.value)


MISTAKES: list[tuple[dict[str, Any], list[str], str]] = [
    ({"epochs": 0}, ["--epochs=0"], "epochs: expected at least 1, got 0"),
    ({"batch_size": "x"}, ["--batch-size=x"], "batch-size: expected a whole number, got x"),
    ({"attack": {"epsilon": 8}}, ["--attack.epsilon=8"], "attack.epsilon: expected 0 to 1, got 8"),
    ({"resume": "auto"}, ["--resume=auto"], "resume: expected --output with the folder of the run"),
    ({"attack": {"epsilon": None}}, ["--attack.epsilon=null"], "attack.epsilon: expected a number"),
    (
        {"resume": "must", "output": "none"},
        ["--resume=must", "--output=none"],
        "resume: expected a run with checkpoints for must, got none",
    ),
    ({"data": {"path": "no"}}, ["--data.path=no"], "data.path: expected a .parquet or .tar file"),
    (
        {"epochs": 4, "selection": {"warmup_epochs": 4}},
        ["--epochs=4", "--selection.warmup_epochs=4"],
        "selection.warmup_epochs: expected less than --epochs 4, got 4; give "
        "--selection.warmup_epochs 3 too",
    ),
    (
        {"model": {"arguments": {"dpth": 2}}},
        ["--model.arguments={dpth: 2}"],
        "model.arguments: expected arguments of vit_",
    ),
]


@pytest.mark.parametrize(("settings", "words", "message"), MISTAKES, ids=lambda v: str(v)[:40])
def test_a_mistake_names_a_field_in_python_and_a_flag_in_a_command(
    settings: dict[str, Any],
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safer_fast.train import main

    monkeypatch.chdir(tmp_path)
    assert refused(main, words, capsys).startswith(f"error: --{message}")
    in_python = re.escape(message.replace("--", "").replace("batch-size", "batch_size"))
    with pytest.raises(ValueError, match=f"^{in_python}") as caught:
        train_model(Config(**settings))
    assert "--" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("group", "value", "setting"),
    [
        ("optim", "muon", "optim.name"),
        ("sam", 0.05, "sam.rho"),
        ("data", "x.npz", "data.path"),
        ("objective", "trades", "objective.name"),
        ("selection", "random", "selection.criterion"),
    ],
)
def test_a_value_in_place_of_a_group_gets_the_setting_that_was_meant(
    group: str, value: Any, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_fast.train import main

    for words in ([f"--{group}", str(value)], [f"--{group}={value}"]):
        line = refused(main, words, capsys)
        expected = "expected names with values such as {name: value}"
        hint = f"did you mean --{setting}?"
        assert line == f"error: --{group}: {expected}, got {str(value)!r}, {hint}\n"
    for call in (
        lambda: train_model(Config(**{group: value})),
        lambda: Config.from_recipe("digits", **{group: value}),
    ):
        message = rf"^{group}: expected \w+ or a dictionary .*, got .*, did you mean {setting}\?$"
        with pytest.raises(ValueError, match=message):
            call()


def test_a_file_in_place_of_a_group_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_fast import doctor, train

    (tmp_path / "data.npz").write_bytes(b"\xa5" * 100)
    for main in (train.main, doctor.main):
        line = refused(main, ["--data", str(tmp_path / "data.npz")], capsys)
        assert line.startswith("error: --data: expected names with values")
        assert line.endswith("did you mean --data.path?\n")


WRONG: list[tuple[Callable[..., Any], Any, str]] = [
    (evaluate_run, None, "config: expected a run folder or EvaluateConfig, got None"),
    (evaluate_run, Config(), "config: expected a run folder or EvaluateConfig, got Config()"),
    (load_model, 3, "run: expected the path of a run folder, got 3"),
    (load_model, "nowhere", "run: expected a run folder, got nowhere, which does not exist"),
    (train_model, "digits", "config: expected Config, got 'digits'"),
    (select_layers, [0.1, 0.2], "scores: expected scores of layers by name, got list"),
    (select, "runs/x", "config: expected settings, got 'runs/x'"),
    (export, "runs/x", "config: expected settings, got 'runs/x'"),
]


@pytest.mark.parametrize(
    ("function", "value", "message"), WRONG, ids=lambda v: getattr(v, "__name__", str(v)[:30])
)
def test_a_first_argument_of_another_kind_is_refused(
    function: Callable[..., Any], value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        function(value, **({"fraction": 0.5} if function is select_layers else {}))
    with pytest.raises(ValueError, match=r"^config: expected ModelConfig, got 'vit'$"):
        build_model("vit", num_classes=2, image_size=8)  # type: ignore[arg-type]


def test_pieces_of_a_loop_refuse_what_is_no_tensor() -> None:
    model, images = torch.nn.Flatten(), torch.zeros(2, 1, 2, 2)
    ball: dict[str, Any] = {"epsilon": 0.1, "step_size": 0.1, "steps": 1}
    with pytest.raises(ValueError, match=r"^images: expected float \[B, C, H, W\], got ndarray$"):
        pgd(model, images.numpy(), torch.tensor([0, 1]), **ball)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^labels: expected int64 \[2\], got list$"):
        pgd(model, images, [0, 1], **ball)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^batches: expected pairs .*, got Tensor$"):
        rank_layers(torch.nn.Linear(2, 2), images)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 3}, "selection.layers: expected names, separated by commas, got 3"),
        ({"candidates": {"a": 1}}, "selection.candidates: expected names, separated by commas"),
    ],
)
def test_names_are_texts_or_lists(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        train_model(Config(selection=settings))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^attacks: expected names, separated by commas, got 3$"):
        evaluate_run("run", attacks=3)


def test_a_run_in_place_of_its_settings_gets_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_fast.train import main

    (tmp_path / "run.yaml").write_text("epochs: 1\n")
    line = refused(main, ["--config", str(tmp_path)], capsys)
    assert line.endswith(f"got {str(tmp_path)!r}, did you mean '{tmp_path}/run.yaml'?\n")


def test_null_is_none_in_python() -> None:
    for settings in ({"epochs": None}, {"attack": {"epsilon": None}}):
        with pytest.raises(ValueError, match=r"^[a-z.]+: expected .*, got None$"):
            train_model(Config(**settings))  # type: ignore[arg-type]


def test_an_argument_that_the_network_lacks_gets_the_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_fast.train import main

    for name, wrong, right in (
        ("vit_tiny_patch16_224", "dpth", "depth"),
        ("swin_tiny_patch4_window7_224", "dephts", "depths"),
        ("convit_tiny", "num_head", "num_heads"),
    ):
        words = [f"--model.name={name}", f"--model.arguments={{{wrong}: 2}}"]
        line = refused(main, [*words, f"--output={tmp_path / 'run'}"], capsys)
        expected = f"expected arguments of {name}, got {wrong!r}, did you mean {right!r}?"
        assert line == f"error: --model.arguments: {expected}\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"epochs: 3\nattack:\n  epsilon: [1\nfoo: }\n", "line 4: expected ',' or ']'"),
        (b"epochs: 3\n\tattack: 2\n", r"line 2: found character '\\t' that cannot start any token"),
        (b"epochs: 3\nseed: \xff\n", "line 2: no UTF-8"),
        (b'epochs: 3\nseed: "\x07"\n', "line 2: unacceptable character"),
        (b"epochs: !!python/name:os.system\n", "line 1: could not determine a constructor"),
    ],
)
def test_broken_yaml_gets_one_line_with_file_line_and_problem(
    text: bytes, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_fast.train import main

    file = tmp_path / "mine.yaml"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=f"^recipe: expected YAML in {file}: {fault}") as caught:
        Config.from_recipe(file)
    assert "\n" not in str(caught.value)
    line = refused(main, ["--config", str(file)], capsys)
    assert line == f"error: --config{str(caught.value).removeprefix('recipe')}\n"


def test_a_recipe_that_there_is_not_gets_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="got 'cifar10-safr', did you mean 'cifar10-safer'"):
        Config.from_recipe("cifar10-safr")


def test_few_epochs_shorten_the_warm_up_of_a_recipe_that_would_take_them_all() -> None:
    def ramps(*words: str) -> tuple[int, int, int, float]:
        config = parse_config(["--config", *words])
        selection, attack = config.selection, config.attack
        epochs = selection.warmup_epochs, attack.clean_epochs, attack.epsilon_warmup_epochs
        return *epochs, config.optim.warmup_epochs

    assert ramps("finetune") == (15, 0, 5, 1)
    assert ramps("finetune", "--epochs=4") == (3, 0, 1, 0.2)
    assert ramps("finetune", "--epochs=16") == (15, 0, 5, 1)
    assert ramps("cifar10-safer", "--epochs", "1") == (0, 0, 0, 0)
    assert ramps("finetune", "--epochs=4", "--selection.warmup-epochs=2") == (2, 0, 5, 1)
    notes = scaled_by_epochs(["--config=finetune", "--epochs=4"])
    why = "as large a share of the epochs as in the recipe finetune"
    assert notes[0] == f"--selection.warmup_epochs 3: {why}"
    assert scaled_by_epochs(["--config=finetune", "--epochs=16"]) == []


@pytest.mark.parametrize(
    ("word", "close"), [("trian", "train"), ("--hepl", "--help"), ("--versoin", "--version")]
)
def test_a_misspelt_command_gets_the_nearest_word(
    word: str, close: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_fast import __main__

    monkeypatch.setattr(sys, "argv", ["safer-fast", word])
    with pytest.raises(SystemExit) as caught:
        __main__.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"got {word}, did you mean {close}?\n")


def test_the_name_of_no_dataset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    from safer_fast.train import main

    for path in ("hf:", "hf::plain"):
        line = refused(main, [f"--data.path={path}"], capsys)
        expected = "expected the name of a dataset, hf:NAME or hf:NAME:CONFIG"
        assert line == f"error: --data.path: {expected}, got {path}\n"


def test_a_command_called_from_python_speaks_flags_and_a_function_after_it_does_not() -> None:
    from safer_fast.evaluate import main

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^--attacks: expected clean"):
            main(["run", "--attacks=cleen"])
        with pytest.raises(ValueError, match=r"^RUN: expected a run folder"):
            main(["run"])
        with pytest.raises(ValueError, match=r"^attacks: expected clean"):
            evaluate_run("run", attacks="cleen")
        with pytest.raises(ValueError, match=r"^run: expected a run folder"):
            evaluate_run("run")
