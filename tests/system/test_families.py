"""Every family of networks goes through all commands on a run folder that training made."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import load_file

from safer_fast import evaluate, export, report, select, train
from safer_fast.data import Batch
from safer_fast.runs.folder import load_run
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.training.trainer import Trainer
from tests.support.networks import FAMILIES, UNCUTTABLE

OTHERS: dict[str, dict[str, object]] = {
    UNCUTTABLE: {"depth": 1, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2},
    # takes images of any size, and no argument that names one
    "pvt_v2_b0": {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16], "num_heads": [1, 2, 2, 2]},
    # takes no rate of dropping paths either
    "efficientvit_b0": {
        "widths": [8, 8, 16, 16, 16],
        "depths": [1, 1, 1, 1, 1],
        "head_dim": 8,
        "head_widths": [16, 16],
    },
}
NETWORKS = FAMILIES | OTHERS
# before, timm tries to unpickle a .safetensors file, or fails on a folder with two of them
READS_FOLDERS = Version(timm.__version__) >= Version("1.0.29")
FLAGS = [
    "--batch-size=8",
    "--epochs=2",
    "--selection.warmup_epochs=1",
    "--selection.num_images=8",
    "--attack.steps=1",
    "--optim.ema_decay=0.8",
    "--optim.learning_rate=0.01",
    "--evaluation.attacks=clean",
    "--evaluation.steps=1",
    "--evaluation.sentinel_images=0",
    "--checkpoint.every_steps=1",
    "--runtime.device=cpu",
    "--runtime.num_threads=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a few noisy images of two classes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(count) % 2)
    paths = {"path": "train", "validation_path": "validation", "test_path": "test"}
    return [f"--data.{flag}={folder / split}.npz" for flag, split in paths.items()]


def flags_of(name: str, folder: Path) -> list[str]:
    size = {"swin_tiny_patch4_window7_224": ["--model.patch_size=2"]}
    patched = [] if name in OTHERS else ["--model.patch_size=8"]
    arguments = json.dumps(NETWORKS[name])
    network = [f"--model.name={name}", f"--model.arguments={arguments}", *size.get(name, patched)]
    return [*FLAGS, *network, "--output", str(folder)]


def train_with_a_stop(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a signal before the last step but one, and resume from there."""
    take_step = Trainer.take_step

    def take(self: Trainer, epoch: int, index: int, num_batches: int, batch: Batch) -> float:
        if (epoch, index) == (2, 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, epoch, index, num_batches, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", take)
        with pytest.raises(SystemExit) as stop:
            train.main(flags)
        assert stop.value.code == 128 + signal.SIGTERM
    train.main([*flags, "--resume=must"])


def logits_of_ours(run: Path, weights: str, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_run(run, weights, "cpu").model(images)


def logits_of_timm(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """Logits of the model that timm makes of the folder; its names are those in the file."""
    config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    if READS_FOLDERS:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        name, arguments = config["architecture"], config["model_args"]
        model = timm.create_model(name, checkpoint_path=str(file), **arguments)
    assert model.state_dict().keys() == load_file(file).keys()
    said = config["pretrained_cfg"]
    mean, std = (torch.tensor(said[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()((images - mean) / std)
    return logits


def logits_of_robustbench(folder: Path, images: torch.Tensor) -> torch.Tensor:
    space: dict[str, Any] = {"__file__": str(folder / "robust_model.py"), "__name__": "alone"}
    exec((folder / "robust_model.py").read_text(), space)
    with torch.no_grad():
        logits: torch.Tensor = space["load"]()(images)
    return logits


def logits_of_onnx(folder: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    [logits] = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_is_resumed_evaluated_selected_from_reported_and_exported(
    name: str, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, twin = tmp_path / "run", tmp_path / "twin"
    train_with_a_stop([*flags_of(name, run), *data], monkeypatch)
    train.main([*flags_of(name, twin), *data])
    for file in ("model.safetensors", "best.safetensors"):
        tensors, others = load_file(run / file), load_file(twin / file)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)

    for weights in ("last", "best"):
        evaluate.main([str(run), "--attacks=clean,pgd-1", f"--weights={weights}"])
    attacks = [e["attack"] for e in read_metrics(run / "metrics.jsonl") if "attack" in e]
    assert attacks[-4:] == ["clean", "pgd-1"] * 2
    select.main([str(run), "--num-images=8", "--device=cpu"])
    assert not (run / "report.html").exists()
    report.main([str(run)])
    assert (run / "report.html").is_file()

    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits_of_timm(run, images), logits_of_ours(run, "last", images))
    expected = logits_of_ours(run, "best", images)
    for form in ("timm", "hub", "robustbench", "onnx"):
        export.main([str(run), "--weights=best", f"--format={form}"])
    for form in ("timm", "hub"):
        assert torch.equal(logits_of_timm(run / f"export-{form}", images), expected)
    assert torch.equal(logits_of_robustbench(run / "export-robustbench", images), expected)
    torch.testing.assert_close(
        logits_of_onnx(run / "export-onnx", images), expected, atol=1e-4, rtol=1e-4
    )


def test_parameters_that_the_network_never_reads_are_named_once(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # all blocks of ConViT are local here, and none of them reads the class token
    arguments = "--model.arguments={depth: 2, embed_dim: 16, num_heads: 2}"
    train.main([*flags_of("convit_tiny", tmp_path / "run"), arguments, *data])
    said = [line for line in capsys.readouterr().out.splitlines() if "never reads" in line]
    assert said == ["not trained, the network never reads them: cls_token"]
    assert (tmp_path / "run" / "model.safetensors").is_file()
