"""Runs that start from weights: of our own runs, of other trainers, of the Hugging Face hub."""

import json
import os
import pickle
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed

from safer_fast import evaluate, train
from safer_fast.config.schema import ModelConfig
from safer_fast.models.build import build_model
from safer_fast.runtime import command

SMALL = [
    "--epochs=1",
    "--attack.steps=1",
    "--batch-size=16",
    "--selection.num_images=16",
    "--evaluation.steps=1",
    "--evaluation.attacks=clean",
    "--evaluation.sentinel_images=0",
    "--runtime.num_threads=1",
]
VIT = {"depth": 1, "embed_dim": 32, "num_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"patch_size": 4, "arguments": VIT},
    "swin_tiny_patch4_window7_224": {
        "patch_size": 2,
        "arguments": {"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 2], "window_size": 4},
    },
    "convit_tiny": {
        "patch_size": 4,
        "arguments": {"depth": 2, "embed_dim": 16, "num_heads": 2, "local_up_to_layer": 1},
    },
    "eva02_tiny_patch14_224": {
        "patch_size": 4,
        "arguments": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    },
}
MEAN, STD = [0.4, 0.45, 0.5], [0.2, 0.25, 0.3]


def write_images(folder: Path, num_classes: int, size: int, num_channels: int = 3) -> Path:
    """An .npz file of noise, 32 images."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (32, size, size, num_channels), dtype=np.uint8)
    file = folder / f"{num_classes}-{size}-{num_channels}.npz"
    np.savez(file, images=images.squeeze(), labels=np.arange(32) % num_classes)
    return file


def train_on(data: Path, output: Path, *flags: str) -> Path:
    train.main([*SMALL, "--data.path", str(data), "--output", str(output), *flags])
    return output


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a command of the user's ends, before anything is written."""
    output = next(Path(w) for flag, w in pairwise(words) if flag == "--output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *SMALL, *words])
        with pytest.raises(SystemExit) as caught:
            command.run(train.main)
    assert caught.value.code == 2
    assert not output.exists()
    line = capsys.readouterr().err
    assert line.startswith("error: --model.checkpoint: ")
    assert line.count("\n") == 1
    return line


def model_of(run: Path) -> dict[str, Any]:
    """The model's settings as the run was trained with them."""
    return dict(yaml.safe_load((run / "run.yaml").read_text())["model"])


def notes_of(run: Path) -> str:
    """Notes that a run printed at its start."""
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return "\n".join(first["notes"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"), 4, 16)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of other classes, size and channels."""
    return write_images(tmp_path_factory.mktemp("data"), 3, 24)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """A small run of each family, with a normalisation that is no default of timm."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    for name, settings in FAMILIES.items():
        flags = [f"--model.arguments={json.dumps(settings['arguments'])}"]
        flags += [f"--model.name={name}", f"--model.patch_size={settings['patch_size']}"]
        made[name] = train_on(data, root / name, *flags)
        config = json.loads((made[name] / "config.json").read_text())
        config["pretrained_cfg"] |= {"mean": MEAN, "std": STD}
        (made[name] / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def vit(runs: dict[str, Path]) -> Path:
    return runs["vit_tiny_patch16_224"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_is_fine_tuned_on_other_classes_and_a_larger_size(
    runs: dict[str, Path], name: str, other_data: Path, tmp_path: Path
) -> None:
    run = train_on(other_data, tmp_path / "run", f"--model.checkpoint={runs[name]}")
    model, trained = model_of(run), model_of(runs[name])
    assert (model["name"], model["patch_size"]) == (name, trained["patch_size"])
    assert trained["arguments"].items() <= model["arguments"].items()
    notes = notes_of(run)
    assert "(4 classes) left out, head" in notes
    assert "for 3 classes" in notes
    assert ("pos_embed" in notes) == ("pos_embed" in load_file(run / "model.safetensors"))
    described = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    assert described["mean"] == pytest.approx(MEAN)
    assert described["std"] == pytest.approx(STD)
    evaluate.main([str(run), "--attacks=clean", "--num-images=2"])
    timm.create_model(f"local-dir:{run}", pretrained=True)


def test_the_body_is_that_of_the_run_and_positions_are_resampled_as_timm_does(vit: Path) -> None:
    given = load_file(vit / "model.safetensors")
    config = ModelConfig(patch_size=4, checkpoint=str(vit), name="vit_tiny_patch16_224")
    config.arguments = dict(VIT)
    model = build_model(config, num_classes=3, image_size=24, num_channels=1)
    got = model.network.state_dict()
    changed = {"head.weight", "head.bias", "pos_embed", "patch_embed.proj.weight"}
    assert all(torch.equal(got[name], given[name]) for name in given.keys() - changed)
    expected = resample_abs_pos_embed(given["pos_embed"], [6, 6], num_prefix_tokens=1)
    assert torch.equal(got["pos_embed"], expected)
    kernel = given["patch_embed.proj.weight"]
    assert torch.equal(got["patch_embed.proj.weight"], kernel.sum(1, keepdim=True))
    assert model.mean.flatten().tolist() == pytest.approx([0.45])


def test_tables_of_relative_positions_are_resampled(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    start = runs["swin_tiny_patch4_window7_224"]
    flags = [f"--model.checkpoint={start}", "--model.arguments.window_size=2"]
    notes = notes_of(train_on(data, tmp_path / "run", *flags))
    assert "attn.relative_position_bias_table [49, 1] to [9, 1]" in notes
    assert "model.arguments.window_size: 2, where the checkpoint has 4" in notes
    assert "left out" not in notes


def test_flags_override_the_run_and_the_run_overrides_the_recipe(
    vit: Path, data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: deit_small_patch16_224, patch_size: 2, arguments: {depth: 3}}")
    flags = ["--config", str(recipe), f"--model.checkpoint={vit}", "--model.patch_size=8"]
    run = train_on(data, tmp_path / "run", *flags, "--model.arguments.proj_drop_rate=0.1")
    model = model_of(run)
    assert (model["name"], model["patch_size"]) == ("vit_tiny_patch16_224", 8)
    assert model["arguments"].items() >= {**VIT, "proj_drop_rate": 0.1}.items()
    notes = notes_of(run)
    assert "model.patch_size: 8, where the checkpoint has 4" in notes
    assert "model.arguments.proj_drop_rate: 0.1, where the checkpoint has the model's own" in notes
    assert notes.count("where the checkpoint has") == 2


def test_a_value_that_is_a_default_is_an_override_where_it_is_typed(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    words = ["--data.path", str(data), "--output", str(tmp_path / "run")]
    words += ["--model.checkpoint", str(vit)]
    line = refusal(capsys, *words, "--model.arguments={}")
    assert "num_heads" in line or "blocks.1" in line
    assert (
        "give --model.name vit_tiny_patch16_224 --model.patch_size 4 --model.arguments '{" in line
    )
    line = refusal(capsys, *words, f"--model.name={ModelConfig().name}")
    assert "give --model.name vit_tiny_patch16_224" in line


def test_the_run_is_repeated_from_its_own_run_yaml(vit: Path, data: Path, tmp_path: Path) -> None:
    first = train_on(data, tmp_path / "a", f"--model.checkpoint={vit}", "--model.patch_size=8")
    train.main(["--config", str(first / "run.yaml"), "--output", str(tmp_path / "b")])
    again = load_file(tmp_path / "b" / "model.safetensors")
    for name, tensor in load_file(first / "model.safetensors").items():
        assert torch.equal(again[name], tensor)


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"num_heads": 4}, "num_heads of blocks.0.attn is 4, not 2"),
        ({"act_layer": "quick_gelu"}, "blocks.0.mlp.act is QuickGELU, not GELU"),
        ({"depth": 2}, "blocks.1 is there"),
    ],
)
@pytest.mark.parametrize("file", ["", "best.safetensors"])
def test_weights_of_another_function_are_refused(
    vit: Path,
    data: Path,
    tmp_path: Path,
    arguments: dict[str, Any],
    difference: str,
    file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [
        f"--model.arguments={json.dumps(VIT | arguments)}",
        "--model.checkpoint",
        str(vit / file),
    ]
    line = refusal(capsys, "--data.path", str(data), "--output", str(tmp_path / "run"), *flags)
    assert difference in line
    assert '--model.arguments \'{"depth": 1, "embed_dim": 32, "num_heads": 2' in line


def test_a_run_whose_settings_were_changed_is_not_evaluated_as_another_network(
    vit: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(vit, run)
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace("num_heads: 2", "num_heads: 4"))
    with pytest.raises(ValueError, match=r"num_heads of blocks\.0\.attn is 4, not 2"):
        evaluate.main([str(run), "--attacks=clean", "--num-images=2"])


def test_a_resumed_run_needs_its_first_weights_no_more(
    vit: Path, data: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(vit, start)
    flags = [f"--model.checkpoint={start}", "--epochs=2", "--checkpoint.every_steps=1"]
    whole = train_on(data, tmp_path / "whole", *flags)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    events = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in events if json.loads(line)["event"] != "end"]
    (cut / "metrics.jsonl").write_text("".join(kept))
    shutil.rmtree(start)
    resumed = train_on(data, cut, *flags, "--resume=must")
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(resumed / "model.safetensors")[name], tensor)
    described = json.loads((resumed / "config.json").read_text())["pretrained_cfg"]
    assert described["mean"] == pytest.approx(MEAN)


def test_a_head_for_other_classes_is_trained_with_what_is_selected(
    vit: Path, other_data: Path, tmp_path: Path
) -> None:
    flags = ["--model.checkpoint", str(vit), "--selection.warmup_epochs=0", "--sam.rho=0"]
    named = train_on(other_data, tmp_path / "named", *flags, "--selection.layers=blocks.0.attn.qkv")
    assert "head is new, and stays as drawn unless named" in notes_of(named)
    assert not load_file(named / "model.safetensors")["head.bias"].any()

    flags += ["--selection.candidates=blocks.*", "--epochs=2", "--selection.every_epochs=1"]
    flags += ["--checkpoint.every_steps=1", "--checkpoint.keep=20"]
    whole = train_on(other_data, tmp_path / "whole", *flags)
    assert "head is new and trained along with the selected layers" in notes_of(whole)
    assert [names[1:] for names in selected_in(whole)] == [["head"], ["head"]]
    weights = load_file(whole / "model.safetensors")
    assert weights["head.bias"].all()

    # so does a resumed run
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    first, *later = sorted((cut / "checkpoints").glob("step-*"))
    for file in later:
        file.unlink()
    events = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in events if json.loads(line)["event"] != "end"]
    (cut / "metrics.jsonl").write_text("".join(kept))
    resumed = load_file(train_on(other_data, cut, *flags, "--resume=must") / "model.safetensors")
    assert first.is_file()
    assert selected_in(cut) == selected_in(whole)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def selected_in(run: Path) -> list[list[str]]:
    """The layers of each selection of a run."""
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event["selected"] for event in events if event["event"] == "selection"]


def wrapped(weights: dict[str, torch.Tensor], how: str) -> Any:
    """The weights as other trainers save them."""
    if how == "lightning":
        prefixed = {f"model.{name}": tensor for name, tensor in weights.items()}
        return {"state_dict": prefixed | {"loss.weight": torch.ones(3)}, "epoch": 3}
    if how == "timm":
        from argparse import Namespace

        zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        return {"state_dict": zeros, "state_dict_ema": weights, "args": Namespace(lr=0.1)}
    prefix = {"parallel": "module.", "compiled": "module._orig_mod."}.get(how, "")
    renamed = {prefix + name: tensor for name, tensor in weights.items()}
    return {"model": renamed} if how == "deit" else renamed


@pytest.mark.parametrize("how", ["plain", "deit", "parallel", "compiled", "lightning", "timm"])
@pytest.mark.parametrize("ending", ["pth", "bin", "safetensors"])
def test_weights_of_other_trainers_are_recognised(
    vit: Path, tmp_path: Path, how: str, ending: str
) -> None:
    given = load_file(vit / "model.safetensors")
    content, file = wrapped(given, how), tmp_path / f"weights.{ending}"
    if ending != "safetensors":
        torch.save(content, file)
    elif how in ("plain", "parallel", "compiled"):
        save_file(content, file)
    else:
        pytest.skip("a file of tensors holds nothing else")
    config = ModelConfig("vit_tiny_patch16_224", patch_size=4, checkpoint=str(file))
    config.arguments = dict(VIT)
    model = build_model(config, num_classes=4, image_size=16)
    assert all(torch.equal(model.network.state_dict()[name], given[name]) for name in given)
    said = "\n".join(model.notes)
    assert "assumed, no config.json" in said
    assert "names and shapes were compared" in said
    assert ("left out of weights" in said) == (how == "lightning")
    assert ("state_dict_ema" in said) == (how == "timm")


class Planted:
    """Code that a pickle runs when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("ending", ["pth", "pt", "bin"])
@pytest.mark.parametrize("is_old", [False, True])
def test_code_in_a_file_is_refused_and_not_run(
    data: Path, tmp_path: Path, ending: str, is_old: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file, mark = tmp_path / f"weights.{ending}", tmp_path / "mark"
    content = {"state_dict": {"head.weight": torch.zeros(1)}, "extra": Planted(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=not is_old)
    words = ["--data.path", str(data), "--output", str(tmp_path / "run")]
    line = refusal(capsys, *words, "--model.checkpoint", str(file))
    assert f"expected tensors alone, got {file}" in line
    assert is_old or "mkdir, which is not run" in line
    file.write_bytes(pickle.dumps(content["extra"]))
    assert "expected tensors alone" in refusal(capsys, *words, "--model.checkpoint", str(file))
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", None, [1, 2], {"model": {}}])
def test_files_without_weights_are_refused(
    data: Path, tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    words = ["--data.path", str(data), "--output", str(tmp_path / "run")]
    assert str(file) in refusal(capsys, *words, "--model.checkpoint", str(file))


def test_towers_load_by_the_names_that_timm_gives_them(tmp_path: Path) -> None:
    towers = {
        "vit_small_patch14_dinov2": {"img_size": 28, "num_classes": 0},
        "vit_base_patch32_clip_quickgelu_224": {"img_size": 32, "num_classes": 16},
        "vit_base_patch16_siglip_224": {"img_size": 32, "num_classes": 0},
        "deit_tiny_distilled_patch16_224": {"img_size": 32, "num_classes": 7},
    }
    for name, sizes in towers.items():
        network = timm.create_model(name, **sizes, **VIT)  # type: ignore[arg-type]
        file = tmp_path / f"{name}.safetensors"
        save_file(network.state_dict(), file)
        patch = 2 * network.patch_embed.patch_size[0]
        config = ModelConfig(name, checkpoint=str(file), arguments=dict(VIT))
        built = build_model(config, num_classes=5, image_size=2 * patch)
        got, said = built.network.state_dict(), "\n".join(built.notes)
        for key, tensor in network.state_dict().items():
            is_body = not key.startswith(("head", "pos_embed"))
            assert not is_body or torch.equal(got[key], tensor), (name, key)
        assert "pos_embed" in said
        assert "head is new, for 5 classes" in said
        assert ("head_dist is new" in said) == ("distilled" in name)


def test_the_tower_of_an_openclip_model_is_taken_and_the_rest_said(tmp_path: Path) -> None:
    network = timm.create_model("vit_base_patch16_siglip_224", img_size=32, num_classes=0, **VIT)
    both = {f"visual.trunk.{name}": tensor for name, tensor in network.state_dict().items()}
    both |= {"text.transformer.weight": torch.ones(2), "logit_scale": torch.ones(1)}
    save_file(both, tmp_path / "open_clip.safetensors")
    config = ModelConfig("vit_base_patch16_siglip_224", arguments=dict(VIT))
    config.checkpoint = str(tmp_path / "open_clip.safetensors")
    model = build_model(config, num_classes=5, image_size=32)
    built = model.network.state_dict()
    assert torch.equal(built["blocks.0.attn.qkv.weight"], network.blocks[0].attn.qkv.weight)
    assert "left out: logit_scale, text.transformer.weight" in "\n".join(model.notes)


def hub_folder(vit: Path, folder: Path, file: str = "model.safetensors") -> Path:
    """A model's folder at the hub, with a configuration of timm's older kind."""
    folder.mkdir(parents=True)
    weights = load_file(vit / "model.safetensors")
    if file.endswith(".safetensors"):
        save_file(weights, folder / file)
    else:
        torch.save(weights, folder / file)
    shutil.copy(vit / "config.json", folder / "config.json")
    return folder


@pytest.mark.parametrize(
    ("file", "prefix"), [("model.safetensors", "local-dir:"), ("pytorch_model.bin", "")]
)
def test_folders_of_the_hub_are_taken(
    vit: Path, data: Path, tmp_path: Path, file: str, prefix: str
) -> None:
    folder = hub_folder(vit, tmp_path / "hub", file)
    run = train_on(data, tmp_path / "run", f"--model.checkpoint={prefix}{folder}")
    assert f"weights of {folder / file}, normalised by mean {MEAN}" in notes_of(run)
    assert model_of(run)["patch_size"] == 4


def test_names_of_the_hub_are_fetched_or_refused_in_one_line(
    vit: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revision, model = "0" * 40, tmp_path / "cache" / "models--someone--vit"
    hub_folder(vit, model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    run = train_on(data, tmp_path / "run", "--model.checkpoint=hf-hub:someone/vit")
    assert model_of(run)["arguments"].items() >= VIT.items()
    assert f"normalised by mean {MEAN}" in notes_of(run)
    for name in ("someone/other", "someone/vit@v2", "", "a/b/c"):
        words = ["--data.path", str(data), "--output", str(tmp_path / "no")]
        line = refusal(capsys, *words, "--model.checkpoint", f"hf-hub:{name}")
        assert f"hf-hub:{name} could not be fetched from the Hugging Face hub" in line


def test_a_file_without_a_configuration_says_what_it_looks_like(
    vit: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(vit / "model.safetensors", tmp_path / "a.safetensors")
    words = ["--data.path", str(data), "--output", str(tmp_path / "run")]
    line = refusal(capsys, *words, "--model.checkpoint", str(tmp_path / "a.safetensors"))
    assert "give --model.name, or --model.arguments '{depth: 1, embed_dim: 32}'" in line
