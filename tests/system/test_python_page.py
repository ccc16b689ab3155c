"""The Python of docs/python.md and of README runs from top to bottom, on little data."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import safer_fast
from safer_fast.config.schema import Config
from safer_fast.data.formats import open_splits
from tests.support import small_runs

ROOT = Path(__file__).parents[2]
LITTLE = {
    "epochs": 2,
    "selection": {"warmup_epochs": 1, "num_images": 16, "every_epochs": 1},
    "attack": {"steps": 1, "clean_epochs": 0, "epsilon_warmup_epochs": 0},
    "model": {
        "name": "vit_tiny_patch16_224",
        "patch_size": 4,
        "arguments": {"depth": 1, "embed_dim": 16, "num_heads": 2},
    },
    "data": {"image_size": 8, "augmentation": "none"},
    "evaluation": {"attacks": "clean,pgd-1", "steps": 1, "sentinel_images": 0},
    "runtime": {"num_threads": 1},
}


class LittleConfig(Config):
    """Recipes of the pages, at a size for tests; what the page changes is checked first."""

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> Config:
        Config.from_recipe(name, **changes)
        return Config.from_recipe("digits", **LITTLE)


def blocks_of(page: str) -> list[str]:
    """The Python of a page, of which there must be some."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    return blocks


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/python.md", "README.md"])
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_runs.run(tmp_path / "runs/x", *small_runs.TINY)
    blocks = blocks_of(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(safer_fast, "Config", LittleConfig, raising=False)
    digits = load_digits()
    pixels = np.round(digits.images[:64] * 255 / 16).astype(np.uint8)
    labels = digits.target[:64].astype(np.int64)
    images = torch.tensor(pixels)[:, None] / 255
    train_set = TensorDataset(images[:48], torch.tensor(labels[:48]))
    test_set = TensorDataset(images[48:], torch.tensor(labels[48:]))
    world = {"images": pixels, "labels": labels, "train_set": train_set, "test_set": test_set}
    for block in blocks:
        if "robust(images)" in block:
            world["images"] = images
        if "loader" in block:
            world["loader"] = DataLoader(train_set, batch_size=16)
            world["model"] = world.get("model") or safer_fast.load_model("runs/x", device="cpu")
        with redirect_stdout(StringIO()):
            exec(compile(block, page, "exec"), world)
    assert isinstance(world.get("run", tmp_path), Path)


class Batches:
    """CIFAR-10 as torchvision has it, of noise."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        generator = np.random.default_rng(int(train))
        self.data = generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        self.targets = [row % 10 for row in range(20)]


def test_batches_of_torchvision_become_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Batches)
    (block,) = blocks_of("docs/recipes.md")
    exec(compile(block, "docs/recipes.md", "exec"), {})
    splits = open_splits("cifar10.npz", "data.path")
    assert {split: len(source) for split, source in splits.items()} == {"train": 20, "test": 20}
    assert np.array_equal(np.asarray(splits["test"].read(3)), Batches("", False, False).data[3])
