"""Where shared memory has no room, batches come from worker processes all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.kills import Server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is one of Linux")

FLAGS = [
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 1, embed_dim: 16, num_heads: 1}",
    "--model.patch_size=48",
    "--batch-size=32",
    "--epochs=1",
    "--attack.steps=1",
    "--selection.num_images=8",
    "--evaluation.attacks=clean",
    "--evaluation.steps=1",
    "--evaluation.sentinel_images=0",
    "--data.backend=torch",
    "--data.augmentation=none",
    "--runtime.attention=math",
    "--runtime.num_threads=1",
]
LIMITED = """
import resource, sys
from safer_fast.runtime.command import run
from safer_fast.train import main
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))  # of a batch, too
run(main)
"""
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
FULL = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "set.npz"
    images = np.random.default_rng(0).integers(0, 256, (80, 96, 96, 3), dtype=np.uint8)
    np.savez(file, images=images, labels=np.arange(80) % 4)
    return file


@pytest.fixture(scope="module")
def expected(server: Server, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run without worker processes."""
    output = tmp_path_factory.mktemp("alone") / "run"
    flags = [*FLAGS, f"--data.path={data}", f"--output={output}", "--data.num_workers=0"]
    # a process of its own like those it is compared with: what ran before in one may change bits
    server.run("-m", "safer_fast.train", *flags, env=ONE_THREAD).check_returncode()
    return (output / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["limited", "full"])
def test_a_run_goes_on_without_shared_memory_and_says_so_once(
    way: str, server: Server, data: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = [*FLAGS, f"--data.path={data}", f"--output={output}", "--data.num_workers=1"]
    if way == "limited":
        done = server.run("-c", LIMITED, *words, env=ONE_THREAD)
    else:
        command = ["unshare", "-m", "bash", "-c", FULL, "-", sys.executable]
        if subprocess.run([*command, "-c", "0"], capture_output=True).returncode:
            pytest.skip("no file systems may be mounted")
        command += ["-m", "safer_fast.train", *words]
        done = subprocess.run(
            command, env=ONE_THREAD, capture_output=True, text=True, timeout=200, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if "/dev/shm" in line]
    assert len(lines) == 1
    assert "--shm-size" in lines[0]
    assert (output / "model.safetensors").read_bytes() == expected
