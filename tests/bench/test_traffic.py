"""Kernels that torch.compile writes for a block under attack on a GPU, and their bytes."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from bench.studies import traffic
from bench.studies.described_gpu import H100, KNOWN, Kernel, compiled_kernels
from bench.studies.float8_table import traffic_table
from bench.studies.traffic import block_kernels, work

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(KNOWN), reason="another Inductor than the one that is known"
)
MODEL, SIZE, BATCH = "vit_tiny_patch16_224", 224, 2
TOKENS, WIDTH = BATCH * 197, 192


def does(kernels: list[Kernel]) -> list[list[str]]:
    """Operations of each kernel that is no matrix product."""
    return [work(kernel) for kernel in kernels if not kernel.is_product]


def test_quantising_is_joined_to_what_makes_its_rows() -> None:
    forward, backward = block_kernels("fp8", MODEL, SIZE, BATCH, least=0)
    assert does(forward) == [
        ["native_layer_norm", "quantise"],
        ["quantise"],  # attention is a kernel of a library
        ["add", "native_layer_norm", "quantise"],
        ["quantise_gelu"],
        ["add"],
    ]
    assert does(backward) == [
        ["quantise"],  # of what comes from the block above
        ["quantise_gelu_backward"],
        ["add", "native_layer_norm", "native_layer_norm_backward", "quantise"],
        ["stack", "quantise"],
        ["add", "native_layer_norm", "native_layer_norm_backward"],
    ]
    products = [kernel for part in (forward, backward) for kernel in part if kernel.is_product]
    assert sum(kernel.dtype == "fp8" for kernel in products) == 8
    assert sum("attention" in kernel.name for kernel in products) == 2
    assert len(products) == 10  # biases are added by the products


def test_cheaper_attacks_move_less_and_compute_as_much() -> None:
    found = [
        list(itertools.chain(*block_kernels(precision, MODEL, SIZE, BATCH, least=0)))
        for precision in ("amp", "bf16", "fp8")
    ]
    assert all(kernel.dtype != "fp8" for kernels in found[:2] for kernel in kernels)
    operations = [sum(k.num_operations for k in kernels) for kernels in found]
    attention = 14 * 3 * BATCH * 197**2 * 64
    assert operations == [48 * TOKENS * WIDTH**2 + attention] * 3
    amp, bf16, fp8 = (sum(k.num_bytes for k in kernels) for kernels in found)
    saved = TOKENS * WIDTH * 2  # of features and of their gradients, each time
    forward, backward = 1 + 3, 3 + 5 + 3  # norm, sum; cast, and both norms' gradients
    assert amp - bf16 == (forward + backward) * saved
    assert fp8 < 0.9 * bf16


class Stem(nn.Module):
    """What a network computes below its first block, of pixels in patches."""

    def __init__(self) -> None:
        super().__init__()
        self.model = traffic._block_model(MODEL, SIZE)
        self.model.enable_savings(("patch-order",), SIZE)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.prefix(pixels, 0)


def test_normalising_pixels_and_placing_tokens_take_two_passes_each_way() -> None:
    stem = Stem()
    forward, backward = compiled_kernels(stem, torch.zeros(BATCH, 196, 768))
    for kernels in (forward, backward):
        assert [kernel.is_product for kernel in kernels] == [False, True, False]
    pixels = BATCH * 196 * 768
    narrow = 4 * 2 * 768  # mean and deviation of a patch
    assert forward[0].num_bytes == (4 + 2) * pixels + narrow
    assert backward[2].num_bytes == (2 + 4) * pixels + narrow // 2


class Doubled(nn.Module):
    """A module whose kernels can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 256, bias=False).to(torch.bfloat16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x * 2))


def test_bytes_and_operations_are_those_of_the_tensors() -> None:
    x = torch.zeros(128, 64, dtype=torch.bfloat16)
    forward, backward = compiled_kernels(Doubled(), x)
    narrow, wide, weight = 128 * 64 * 2, 128 * 256 * 2, 64 * 256 * 2
    is_positive = 128 * 256  # a byte each
    assert [kernel.num_bytes for kernel in forward] == [
        2 * narrow,
        narrow + weight + wide,
        2 * wide + is_positive,
    ]
    assert [kernel.num_operations for kernel in forward] == [0, 2 * 128 * 64 * 256, 0]
    assert [kernel.num_operations for kernel in backward] == [0, 2 * 128 * 64 * 256, 0]
    product = forward[1]
    assert product.dtype == "bf16"
    assert product.seconds(H100) == pytest.approx((narrow + weight + wide) / 3.35e12)
    assert Kernel("mm", 1, 989 * 10**9, "bf16").seconds(H100) == pytest.approx(1e-3)
    assert Kernel("mm", 1, 1979 * 10**9, "fp8").seconds(H100) == pytest.approx(1e-3)


def test_pytorch_knows_afterwards_what_it_has() -> None:
    def known() -> list[object]:
        return [torch.cuda.is_available(), torch.cuda.device_count(), has_triton()]

    before = known()
    compiled_kernels(Doubled(), torch.zeros(16, 64, dtype=torch.bfloat16))
    assert known() == before
    compiled = torch.compile(Doubled())
    assert compiled(torch.ones(2, 64, dtype=torch.bfloat16)).shape == (2, 256)


def test_rows_of_all_precisions_make_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    words = ["--model", MODEL, "--batch-size", "2", "--from", "0", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench.studies.traffic", *words])
    traffic.main()
    shown = capsys.readouterr().out
    assert "at best" in shown
    assert "quantise_gelu_backward" in shown
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["implementation"] for row in rows] == ["amp", "bf16", "fp8"]
    assert [row["num_float8"] for row in rows] == [0, 0, 8]
    assert len({row["teraflop"] for row in rows}) == 1
    *_, line = traffic_table(rows).strip().splitlines()
    assert line.startswith("| vit_tiny_patch16_224, 224 pixels, batch 2 | fp8 | 20 | 8 |")
