"""Runs of a few small epochs on the built-in digits."""

from __future__ import annotations

from pathlib import Path

from safer_fast import train_model
from safer_fast.config.command_line import parse_config

NUM_TEST_IMAGES = 80
TEST_IMAGES = Path(__file__).with_name("digits-test-80.npz")
"""The first of the 797 test images of the digits, more than a validation looks at."""
SMALL = [
    "--epochs=4",
    "--selection.warmup_epochs=2",
    "--selection.every_epochs=1",
    "--selection.num_images=64",
    "--attack.clean_epochs=1",
    "--attack.epsilon_warmup_epochs=1",
    "--attack.steps=2",
    "--data.max_images=192",
    f"--data.test_path={TEST_IMAGES}",
    "--evaluation.every_epochs=1",
    "--evaluation.steps=2",
    "--evaluation.max_images=64",
    "--evaluation.sentinel_images=32",
    "--evaluation.attacks=clean,pgd-2",
    "--runtime.log_every_steps=2",
    "--runtime.num_threads=1",
]


def run(folder: Path, *flags: str) -> Path:
    """The folder of a run with the flags SMALL, and these."""
    return train_model(parse_config([*SMALL, "--output", str(folder), *flags]))


TINY = [
    "--model.name=vit_tiny_patch16_224",
    "--model.patch_size=4",
    "--model.arguments={depth: 1, embed_dim: 16, num_heads: 2}",
    "--epochs=1",
    "--selection.warmup_epochs=0",
    "--selection.num_images=8",
    "--attack.steps=1",
    "--evaluation.steps=1",
    "--evaluation.attacks=clean,pgd-1",
    "--runtime.device=cpu",
    "--runtime.num_threads=1",
]
FEW_IMAGES = [
    "--epochs=2",
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 16, num_heads: 1}",
    "--model.patch_size=4",
    "--batch-size=4",
    "--attack.steps=1",
    "--evaluation.attacks=clean",
    "--evaluation.sentinel_images=0",
    "--selection.warmup_epochs=1",
    "--selection.num_images=8",
    "--runtime.num_threads=1",
]
"""Flags of a run of two epochs on twenty images of eight pixels, or so."""
