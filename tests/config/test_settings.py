"""Settings that mean nothing are refused before anything is written, from Python and when typed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, device, nn

from safer_fast import (
    evaluate,
    evaluate_run,
    export,
    load_model,
    register_criterion,
    select,
    train,
    train_model,
)
from safer_fast.config.checks import checked
from safer_fast.config.command_line import parse_config
from safer_fast.config.commands import DoctorConfig, EvaluateConfig, SelectConfig
from safer_fast.config.messages import as_line, shortened, suggested
from safer_fast.config.ranges import find_ranges
from safer_fast.config.schema import (
    AttackConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    Radius,
    RuntimeConfig,
)
from safer_fast.selection import criteria
from tests.support.commands import refused

TINY = [
    "--epochs=1",
    "--selection.warmup_epochs=0",
    "--selection.num_images=16",
    "--attack.clean_epochs=0",
    "--attack.epsilon_warmup_epochs=0",
    "--attack.steps=1",
    "--data.max_images=64",
    "--data.num_workers=0",
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 12, num_heads: 1}",
    "--model.patch_size=4",
    "--evaluation.steps=1",
    "--evaluation.max_images=16",
    "--evaluation.sentinel_images=0",
    "--evaluation.attacks=clean",
    "--runtime.num_threads=1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one small epoch."""
    return train_model(parse_config([*TINY, f"--output={tmp_path_factory.mktemp('r') / 'run'}"]))


WRONG: list[tuple[Config, str]] = [
    (Config(attack=AttackConfig(epsilon="8")), "attack.epsilon: .* got 8: did you mean 8/255"),  # type: ignore[arg-type]
    (Config(attack=AttackConfig(epsilon="x")), "attack.epsilon: expected a number or a fraction"),  # type: ignore[arg-type]
    (Config(attack=3), "attack: expected AttackConfig or a dictionary of settings, got 3$"),  # type: ignore[arg-type]
    (Config(attack={"eps": 1}), "unknown setting 'attack.eps', did you mean 'attack.epsilon'"),  # type: ignore[arg-type]
    (Config(epochs=None), "epochs: expected a whole number, got None"),  # type: ignore[arg-type]
    (Config(epochs=1.5), "epochs: expected a whole number, got 1.5"),  # type: ignore[arg-type]
    (Config(epochs=10**30), "epochs: expected at most 1,000,000, got 10{30}"),
    (Config(optim=OptimConfig(betas=(1,))), "optim.betas: expected a tuple with 2 elements"),  # type: ignore[arg-type]
    (
        Config(optim=OptimConfig(learning_rate=float("nan"))),
        "optim.learning_rate: expected above",
    ),
    (
        Config(model=ModelConfig(arguments={"norm_layer": nn.LayerNorm})),
        "model.arguments: .*LayerN",
    ),
    (Config(model=ModelConfig(arguments={"depth:4": None})), "a space follows each colon"),
    (Config(model=ModelConfig(checkpoint="x", pretrained=True)), "model.pretrained: exp.* false"),
    (Config(evaluation=EvaluationConfig(attacks="pgd")), "evaluation.attacks: expected clean"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_setting_from_python_is_refused_before_anything_is_written(
    config: Config, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.output = str(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train_model(config)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_settings_that_are_no_configuration_are_refused() -> None:
    with pytest.raises(ValueError, match=r"config: expected Config, got \{'epochs': 1\}"):
        train_model({"epochs": 1})  # type: ignore[arg-type]


def test_an_attribute_that_came_past_the_refusal_is_named_when_it_is_used() -> None:
    config = Config()
    vars(config.attack)["epsilonn"] = 1
    with pytest.raises(ValueError, match="AttackConfig: unknown setting 'epsilonn'"):
        checked(config)


def test_settings_from_python_may_be_written_as_they_are_typed(tmp_path: Path) -> None:
    config = parse_config(TINY)
    config.attack = AttackConfig(epsilon="8/255", steps="1", step_size=np.float32(0.03))  # type: ignore[arg-type]
    config.data = {"path": "digits", "max_images": "64", "num_workers": 0}  # type: ignore[assignment]
    config.selection.layers = "head"  # type: ignore[assignment]
    config.output = tmp_path / "run"  # type: ignore[assignment]
    folder = train_model(config)
    again = parse_config(["--config", str(folder / "run.yaml")])
    assert again.attack.epsilon == pytest.approx(8 / 255)
    assert again.data == DataConfig(path="digits", max_images=64, num_workers=0)
    assert again.selection.layers == ["head"]


def test_checking_a_sound_configuration_changes_nothing() -> None:
    config = parse_config(["--attack.norm=l2", "--selection.layers=head,blocks.*"])
    assert checked(config) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.arguments", "{img_size: 64}"], "--model.arguments: expected no img_size"),
        (
            ["--model.arguments", "{patch_size: 4}", "--model.patch_size", "2"],
            "--model.arguments: expected patch_size 2 as --model.patch_size, got 4",
        ),
    ],
    ids=lambda value: str(value),
)
def test_sizes_that_contradict_each_other_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(train.main, [*words, f"--output={tmp_path / 'run'}"], capsys)
    assert list(tmp_path.iterdir()) == []


RADII: list[tuple[list[str], str]] = [
    (["--attack.step_size", "2"], "--attack.step_size: expected at most"),
    (["--attack.step_size", "inf"], "--attack.step_size: expected a radius"),
    (["--attack.epsilon", "8"], "--attack.epsilon: expected 0 to 1, got 8: did you mean 8/255?"),
    (["--attack.norm", "l2", "--attack.epsilon", "128"], "a radius for l2 of at most 8, "),
    (["--attack.norm", "l2", "--attack.epsilon", "1e308"], "--attack.epsilon: expected a radius"),
    (
        ["--attack.norm=l2", "--attack.epsilon=128", "--data.path=x", "--data.image_size=32"],
        "a radius for l2 of at most 64,",
    ),
]


@pytest.mark.parametrize(("words", "message"), RADII, ids=lambda value: str(value))
def test_radii_in_255ths_are_refused_when_training(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(train.main, [*TINY, *words, "--output", str(tmp_path / "run")], capsys)
    assert message in line
    assert "/255" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("main", [evaluate.main, select.main], ids=["evaluate", "select"])
@pytest.mark.parametrize(
    "words", [["8"], ["1e308"], ["inf"], ["100", "--norm=l2"], ["1e308", "--norm=l2"]], ids=str
)
def test_radii_in_255ths_are_refused_of_a_run(
    main: Any, words: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if main is select.main:
        words = words[:1]
    line = refused(main, [str(run), "--epsilon", *words], capsys)
    assert line.startswith(
        ("error: --epsilon: expected a radius", "error: --epsilon: expected 0 to 1")
    )
    assert f"{words[0]}/255" in line or "such as 8/255" in line


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [("candidates", "wombat", "names or patterns"), ("from_block", "9", "less than the 1 blocks")],
)
def test_select_names_its_own_settings(
    setting: str, value: str, expected: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--{setting.replace('_', '-')}"
    assert refused(select.main, [str(run), flag, value], capsys).startswith(
        f"error: {flag}: expected {expected}"
    )
    with pytest.raises(ValueError, match=f"^{setting}: expected {expected}"):
        select.select(SelectConfig(str(run), **{setting: value}))  # type: ignore[arg-type]


def test_files_of_a_run_are_no_setting_of_the_command_that_reads_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    text = (run / "run.yaml").read_text()
    (copy / "run.yaml").write_text(text.replace("name: vit_tiny", "name: vit_tinny"))
    for main in (evaluate.main, export.main):
        line = refused(main, [str(copy)], capsys)
        assert line.startswith(f"error: {copy}/run.yaml: model.name: expected a model of timm")
    (copy / "run.yaml").write_text(text)
    (copy / "model.safetensors").write_bytes(b"x" * 100)
    for main in (evaluate.main, select.main, export.main):
        line = refused(main, [str(copy)], capsys)
        assert line.startswith(f"error: RUN: expected safetensors, got {copy}/model.safetensors")
    with pytest.raises(ValueError, match=r"^run: expected safetensors"):
        load_model(copy)


def write_images(folder: Path, size: int) -> Path:
    images = np.zeros((40, size, size, 3), np.uint8)
    folder.mkdir()
    np.savez(folder / "data.npz", images=images, labels=np.arange(40) % 4)
    return folder / "data.npz"


@pytest.mark.parametrize(
    ("size", "patch", "message"),
    [
        (30, "4", "got 4, which leaves 2 rows unread; give one of 1, 2, 3, 5, 6, 10, 15, 30, or "),
        (8, "16", "expected a divisor of 8, the pixels of an edge, got 16"),
        (8, "null", "expected a divisor of 8, the pixels of an edge, got 16"),
    ],
)
def test_patches_that_do_not_cover_the_images_are_refused(
    size: int, patch: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, f"--data.path={write_images(tmp_path / 'data', size)}", "--batch-size=8"]
    words += [f"--model.patch_size={patch}", f"--output={tmp_path / 'run'}"]
    line = refused(train.main, words, capsys)
    assert line.startswith("error: --model.patch_size: ")
    assert message in line
    assert f"--data.image_size {'28 or 32' if size == 30 else '16'}" in line.replace(
        "16 or 32", "16"
    )
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safer_fast import report

    for main in (select.main, report.main):
        for path in (tmp_path, tmp_path / "none" / "file"):
            line = refused(main, [str(run), f"--output={path}"], capsys)
            assert line.startswith("error: --output: expected a file in a folder that exists")


def test_autoattack_with_too_few_classes_names_what_to_use() -> None:
    from safer_fast.attacks.autoattack import check_suits

    with pytest.raises(
        ValueError, match=r"got 3; in its place: --attacks apgd-ce,apgd-dlr,square$"
    ):
        check_suits("autoattack", "linf", 3, 32)
    with pytest.raises(ValueError, match=r"got 2; in its place: --attacks apgd-ce,square$"):
        check_suits("apgd-dlr", "linf", 2, 32)


def test_settings_of_other_commands_are_checked_from_python_too(run: Path) -> None:
    with pytest.raises(ValueError, match=r"^steps: expected at most 10,000, got 2147483648"):
        select.select(SelectConfig(str(run), steps=2**31))
    with pytest.raises(ValueError, match=r"^epsilon: expected a number or a fraction"):
        evaluate_run(EvaluateConfig(str(run), epsilon="8/x"))  # type: ignore[arg-type]


def test_criteria_of_ones_own_are_known_to_select(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_place(
        model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]
    ) -> Mapping[str, float]:
        return {name: float(place) for place, name in enumerate(names)}

    monkeypatch.setattr(criteria, "CRITERIA", dict(criteria.CRITERIA))
    output = tmp_path / "selection.json"
    little = [str(run), "--num-images=4", f"--output={output}"]
    assert "least-sharp, got 'by-place'" in refused(
        select.main, [*little, "--criterion=by-place"], capsys
    )
    register_criterion("by-place", by_place)
    select.main([*little, "--criterion=by-place", "--criteria=gradient-norm"])
    assert "by-place selects 1 of" in capsys.readouterr().out
    select.main([*little, "--criteria=by-place"])
    assert "by-place would select head" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config",
    [Config(), EvaluateConfig("run"), SelectConfig("run"), DoctorConfig()],
    ids=lambda config: type(config).__name__,
)
def test_every_number_among_the_settings_has_its_range(config: Any) -> None:
    numbers = set()
    for item in fields(config):
        group = item.default_factory
        prefix = f"{item.name}." if is_dataclass(group) else ""
        hints = (
            get_type_hints(group)
            if prefix
            else {item.name: get_type_hints(type(config))[item.name]}
        )
        for name, kind in hints.items():
            if {int, float, Radius} & {kind, *get_args(kind)} and get_origin(kind) is not tuple:
                numbers.add(prefix + name)
    assert numbers == set(find_ranges(config))


def test_usual_names_of_other_projects_lead_to_ours() -> None:
    known = [*find_ranges(Config()), "output", "data.path", "amp", "model.name"]
    expected = {
        "optim.lr": "optim.learning_rate",
        "wd": "optim.weight_decay",
        "bs": "batch_size",
        "eps": "attack.epsilon",
        "attack.learning_rate": "optim.learning_rate",
        "epsilon": "attack.epsilon",
        "attack.stepsize": "attack.step_size",
        "output_dir": "output",
    }
    assert {name: suggested(name, known) for name in expected} == expected
    assert suggested("wombat", known) is None


def test_long_values_are_cut_and_long_names_of_files_are_not() -> None:
    assert len(shortened("x" * 5000)) == 80
    assert shortened(repr(np.zeros((2, 2)))) == "array([[0., 0.], [0., 0.]])"
    path = "/".join(["folder"] * 30)
    assert as_line(f"data.path: expected a file, got {path}").endswith(path)
    assert len(as_line("y" * 5000)) == 80
    assert len(as_line("z " * 5000)) == 1200
    assert as_line("a\x1b[2Jb") == "a?[2Jb"


def test_a_device_of_torch_is_its_name() -> None:
    for name in ("cpu", "cuda"):
        groups: list[Any] = [{"device": device(name)}, RuntimeConfig(device=device(name))]  # type: ignore[arg-type]
        for group in groups:
            assert checked(Config(runtime=group)).runtime.device == name
    message = "^runtime.device: expected .*, got cuda:1: CUDA_VISIBLE_DEVICES=1 chooses the GPU$"
    for given in (device("cuda:1"), "cuda:1"):
        with pytest.raises(ValueError, match=message):
            train_model(Config(runtime={"device": given}))  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_commands_name_their_own_flag_for_a_gpu_that_there_is_not(run: Path) -> None:
    for command in (evaluate.main, select.main):
        with pytest.raises(ValueError, match=r"^--device: expected cpu or auto on a machine"):
            command([str(run), "--device=cuda"])
