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


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/python.md"])
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_runs.run(tmp_path / "runs/x", *small_runs.TINY)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    )
    assert blocks
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
