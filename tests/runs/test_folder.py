"""The folder of a run says what the run did, and damaged weights in it are refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from safer_fast import evaluate, export, select, train
from safer_fast.config.command_line import parse_config
from safer_fast.data import load_data
from safer_fast.models.weights_file import load_tensors, save_weights
from safer_fast.runs.folder import load_run
from safer_fast.runtime import command

FLAGS = [
    "--epochs=1",
    "--selection.warmup_epochs=0",
    "--selection.num_images=8",
    "--batch-size=8",
    "--attack.steps=1",
    "--evaluation.attacks=clean",
    "--evaluation.steps=1",
    "--evaluation.max_images=8",
    "--evaluation.sentinel_images=0",
    "--runtime.device=cpu",
    "--runtime.num_threads=1",
    "--data.num_workers=0",
    "--model.name=vit_tiny_patch16_224.augreg_in21k_ft_in1k",
]
SMALLEST = "--model.arguments={depth: 1, embed_dim: 16, num_heads: 2}"
TRAIN = [*FLAGS, SMALLEST, "--data.max_images=16", "--model.patch_size=4"]
FILES = {"last": "model.safetensors", "best": "best.safetensors"}
OF_THE_RUN = {
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "first_conv",
    "classifier",
}
# edge of the model's images, sizes of the files, mode
SETS: dict[str, tuple[int, list[tuple[int, int]], str]] = {
    "as they are": (32, [(32, 32)], "RGB"),
    "grey, enlarged": (32, [(20, 20), (24, 31)], "L"),
    "a little larger": (96, [(120, 120)], "RGB"),
    "large, of their size": (96, [(96, 96)], "RGB"),
    "photos": (224, [(320, 240), (257, 391), (500, 230), (224, 300)], "RGB"),
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a very small model on digits, which tests only read."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train.main([*TRAIN, f"--output={folder}"])
    return folder


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> Path:
    """A copy of the run, for a test to damage."""
    return shutil.copytree(digits, tmp_path / "run")


def write_images(folder: Path, sizes: list[tuple[int, int]], mode: str) -> Path:
    """Four smooth pictures of each of two classes, for training and for validation."""
    rng = np.random.default_rng(0)
    for number in range(16):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image = coarse.resize(sizes[number % len(sizes)], Image.Resampling.BICUBIC).convert(mode)
        place = folder / ("train", "val")[number % 2] / f"class {number // 8}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.{('png', 'jpg')[number // 4 % 2]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_timm_makes_of_images_what_the_run_was_evaluated_on(name: str, tmp_path: Path) -> None:
    size, sizes, mode = SETS[name]
    folder, run = write_images(tmp_path / "images", sizes, mode), tmp_path / "run"
    flags = [*FLAGS, SMALLEST, f"--data.path={folder}", f"--data.image_size={size}"]
    flags += ["--data.backend=torch", "--model.patch_size=16"]
    train.main([*flags, f"--output={run}"])
    data = load_data(parse_config(flags).data, batch_size=8, seed=0)
    ours = torch.cat([batch.images[: batch.num_images] for batch in data.validation.epoch(1)])

    for form in ("timm", "hub"):
        export.main([str(run), f"--format={form}"])
    said = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    assert said.keys() == OF_THE_RUN
    for where in (run, run / "export-timm", run / "export-hub"):
        written = json.loads((where / "config.json").read_text())["pretrained_cfg"]
        assert written == (said if where == run else said | {"license": "other"})
        config = resolve_model_data_config(timm.create_model(f"local-dir:{where}", pretrained=True))
        assert tuple(config["input_size"]) == (len(config["mean"]), size, size)
        transform = create_transform(**config, is_training=False)
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        files = sorted((folder / "val").glob("*/*"))
        theirs = torch.stack([transform(Image.open(file)) * std + mean for file in files]) * 255
        # the same operations on the same pixels: only the float32 of timm's normalisation differs
        torch.testing.assert_close(ours.float(), theirs, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_what_is_exported_says_how_images_are_brought_to_their_size(tmp_path: Path) -> None:
    folder, run = write_images(tmp_path / "images", [(120, 120)], "RGB"), tmp_path / "run"
    flags = [*FLAGS, SMALLEST, f"--data.path={folder}", "--data.image_size=96"]
    train.main([*flags, "--data.backend=torch", "--model.patch_size=16", f"--output={run}"])
    for form, file in (("hub", "README.md"), ("robustbench", "robust_model.py")):
        export.main([str(run), f"--format={form}"])
        text = " ".join((run / f"export-{form}" / file).read_text().split())
        assert "until their short side has 110 pixels, and the centre of 96x96 is kept" in text
    onnx = pytest.importorskip("onnx")
    export.main([str(run), "--format=onnx"])
    content = onnx.load(str(run / "export-onnx" / "model.onnx"))
    [entry] = [entry for entry in content.metadata_props if entry.key == "preprocessing"]
    said = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    assert json.loads(entry.value).items() <= said.items()


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << place % 8
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("weights", FILES)
def test_a_flipped_bit_is_noticed_wherever_it_matters(weights: str, run: Path) -> None:
    file = run / FILES[weights]
    whole, tensors = file.read_bytes(), load_file(file)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *range(8, header, 53), *np.linspace(header, len(whole) - 1, 40, dtype=int)]
    num_refused = 0
    for place in map(int, places):
        flip(file, place)
        refusal, state = "", {}
        try:
            state = load_run(run, weights, "cpu").model.network.state_dict()
        except ValueError as error:
            refusal = str(error)
        file.write_bytes(whole)
        if refusal:
            assert str(file) in refusal, place
            assert "\n" not in refusal, place
            num_refused += 1
        else:
            assert place < header
            assert all(torch.equal(state[name], tensors[name]) for name in tensors), place
    assert num_refused > 60


def test_a_digest_copied_to_other_weights_is_refused(run: Path, tmp_path: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    with safe_open(run / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors["head.weight"] *= 2
    for index, names in enumerate((sorted(metadata), sorted(metadata, reverse=True))):
        # save_file writes metadata in an order of its own
        header = {"__metadata__": {name: metadata[name] for name in names}}
        offset = 0
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
            place = {"shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
            header[name] = {"dtype": kind, **place}
            offset += size
        opening = json.dumps(header, separators=(",", ":")).encode()
        contents = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
        copy = tmp_path / f"{index}.safetensors"
        copy.write_bytes(len(opening).to_bytes(8, "little") + opening + contents)
        assert load_file(copy).keys() == tensors.keys()
        with pytest.raises(ValueError, match=copy.name):
            load_tensors(copy)


@pytest.mark.parametrize(
    ("main", "arguments", "weights"),
    [
        (evaluate.main, ["RUN", "--attacks=clean"], "last"),
        (evaluate.main, ["RUN", "--attacks=clean", "--weights=best"], "best"),
        (select.main, ["RUN", "--num-images=8"], "last"),
        (select.main, ["RUN", "--num-images=8", "--weights=best"], "best"),
        (export.main, ["RUN", "--output=OUT"], "last"),
        (export.main, ["RUN", "--output=OUT", "--weights=best"], "best"),
        (train.main, [*TRAIN, "--model.checkpoint=RUN", "--output=OUT"], "last"),
        (train.main, [*TRAIN, "--model.checkpoint=RUN/best.safetensors", "--output=OUT"], "best"),
    ],
)
def test_commands_refuse_damaged_weights_in_one_line(
    main: Callable[[list[str]], None],
    arguments: list[str],
    weights: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file, out = run / FILES[weights], run.parent / "out"
    flip(file, file.stat().st_size - 601)
    files = sorted(run.rglob("*"))
    words = [word.replace("RUN", str(run)).replace("OUT", str(out)) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as ending:
        command.run(main)
    assert ending.value.code == 2
    [line] = capfd.readouterr().err.strip().split("\n")
    assert f"{file}: its contents are not those that were written" in line
    assert sorted(run.rglob("*")) == files
    assert not out.exists()


def test_weights_without_a_digest_are_read_as_they_are(run: Path) -> None:
    for weights, name in FILES.items():
        tensors = load_file(run / name)
        save_file(tensors, run / name)
        state = load_run(run, weights, "cpu").model.network.state_dict()
        assert all(torch.equal(state[key], tensors[key]) for key in tensors)


def test_runs_that_wrote_what_the_network_computes_load_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, network = tmp_path / "run", "--model.name=vit_small_patch16_dinov3"
    train.main([*TRAIN, network, f"--output={run}"])
    loaded, file = load_run(run, "last", "cpu").model.network, run / "model.safetensors"
    tensors = load_tensors(file)
    assert "rope.periods" not in tensors
    save_weights(tensors | dict(loaded.named_buffers()), file)
    capsys.readouterr()
    evaluate.main([str(run), "--attacks=clean", "--num-images=8"])
    note = f"weights: {file} also has rope.periods, which the network computes: passed by"
    assert note in capsys.readouterr().out
    export.main([str(run)])
    assert load_file(run / "export-timm" / "model.safetensors").keys() == tensors.keys()
    save_weights(tensors | {"rope.periods": loaded.get_buffer("rope.periods") * 2}, file)
    with pytest.raises(ValueError, match=r"those of another.*has another rope\.periods"):
        evaluate.main([str(run), "--attacks=clean"])
    save_weights(tensors | {"rope.other": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"has \['rope\.other'\] besides"):
        evaluate.main([str(run), "--attacks=clean"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("short_side", 10**400),
        ("short_side", 7),
        ("short_side", True),
        ("image_size", -8),
        ("image_size", 10**400),
        ("num_channels", 0),
    ],
)
def test_sizes_that_no_run_wrote_are_refused(name: str, value: int, run: Path) -> None:
    file = run / "config.json"
    content = json.loads(file.read_text())
    assert content["safer_fast"][name]
    content["safer_fast"][name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"config.json: expected {name} of a run"):
        load_run(run, "last", "cpu")
