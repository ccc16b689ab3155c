"""Times of blocks and steps on a GPU by arithmetic, and measured ones beside them."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import roofline
from bench.roofline import GAP_S, GPUS, SHARES, sizes_of, work_of
from bench.roofline_table import roofline_table
from bench.studies.described_gpu import H100, KNOWN, Kernel
from bench.studies.traffic import block_kernels
from bench.table import with_tables
from safer_fast.config.schema import ModelConfig
from safer_fast.models.build import build_model
from safer_fast.models.flops import ideal_flops

MODEL, BATCH = "vit_tiny_patch16_224", 2
is_known = pytest.mark.skipif(
    not torch.__version__.startswith(KNOWN), reason="another Inductor than the one that is known"
)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.roofline", *words])
    roofline.main()


@pytest.mark.parametrize(
    ("kernel", "at_best_s"),
    [
        (Kernel("copy", 335 * 10**9), 0.1),
        (Kernel("mm", 1, 989 * 10**11, "bf16"), 0.1),
        (Kernel("_scaled_mm", 1, 1979 * 10**11, "fp8"), 0.1),
        (Kernel("attention_backward", 1, 989 * 10**11, "bf16"), 0.1),
        (Kernel("gelu", 1, num_instructions=int(H100.instructions_per_s)), 1.0),
    ],
)
def test_a_kernel_is_bound_by_bytes_operations_or_instructions(
    kernel: Kernel, at_best_s: float
) -> None:
    work = work_of([kernel, kernel], H100)
    assert work.num_kernels == 2
    assert work.at_best_s == pytest.approx(2 * at_best_s)
    names = {"copy": "bytes", "mm": "bf16", "_scaled_mm": "fp8", "gelu": "instructions"}
    share = SHARES[names.get(kernel.name, "attention")]
    assert work.expected_s == pytest.approx(2 * (at_best_s / share + GAP_S))


def test_clocks_of_the_peak_rates_are_those_of_the_data_sheets() -> None:
    clocks = {
        name: gpu.instructions_per_s / 128 / gpu.multi_processor_count / 1e9
        for name, gpu in GPUS.items()
    }
    expected = {"h100": 1.83, "h200": 1.83, "a100": 1.41, "b200": 1.86}
    assert clocks == pytest.approx(expected, abs=0.01)


@is_known
def test_instructions_of_gelu_are_about_those_that_ptxas_writes() -> None:
    forward, _ = block_kernels("bf16", MODEL, 224, BATCH)
    (gelu,) = (kernel for kernel in forward if "gelu" in kernel.name)
    assert 28 < gelu.num_instructions / (BATCH * 197 * 4 * 192) < 40  # 36 for sm_90


@is_known
def test_a_step_has_the_operations_that_the_method_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    layer = "blocks.6.mlp.fc1"
    run(monkeypatch, MODEL, str(BATCH), "--steps=3", "--layer", layer, "--output", str(file))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    by_part = {(row["implementation"], row["part"]): row for row in rows}
    model = build_model(ModelConfig(name=MODEL), num_classes=1000, image_size=224)
    needed = ideal_flops(model, torch.zeros(1, 3, 224, 224), 6, [layer], 3, 2)
    step = by_part["amp", "step"]
    assert step["needed_teraflop"] == pytest.approx(BATCH * sum(needed.values()) / 1e12, rel=0.01)
    assert step["case"] == f"{MODEL}, 224/16, batch 2, PGD-3, rho 0.05"
    attack = by_part["amp", "iteration"]["needed_teraflop"]
    assert attack == pytest.approx(BATCH * needed["attack"] / 3 / 1e12, rel=0.01)
    for row in rows:
        assert 0 < row["at_best_ms"] < row["expected_ms"]


@is_known
def test_fp8_is_left_out_for_a_gpu_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, MODEL, str(BATCH), "--gpu=a100", "--steps=1")
    shown = capsys.readouterr().out
    assert " amp " in shown
    assert "fp8" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("resnet18", "8"), "expected a vision transformer with attention and MLP layers"),
        ((MODEL, "0"), "expected a number above 0, got 0"),
        ((MODEL, "8", "--steps=3,x"), "expected a number above 0, got x"),
        ((MODEL, "8", "--layer=blocks.12.mlp.fc1"), "--layer: expected a layer of vit_tiny"),
        ((MODEL, "8", "--gpu=v100"), "invalid choice: 'v100'"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    assert ended.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_sizes_are_those_of_the_network() -> None:
    network = sizes_of(MODEL, 224, None)
    assert (network.depth, network.width, network.patch_size, network.cut) == (12, 192, 16, 9)
    assert network.matrix == 192 * 768 + 768


def predicted(part: str, **changes: object) -> dict[str, object]:
    row = {"what": "roofline", "part": part, "implementation": "amp", "dtype": "bf16"}
    row |= {"gpu": "NVIDIA H100 SXM", "case": "vit, 224/16, batch 8", "steps": None}
    row |= {"num_kernels": 19, "gigabytes": 5.3, "teraflop": 1.3, "tera_instructions": 0.0124}
    row |= {"at_best_ms": 2.0, "expected_ms": 3.0, "expected_mfu": 0.4, "shares": SHARES}
    row |= {"device": "cpu", "torch": "2.14", "date": "2026-01-02T03:04:05", "layers": ["head"]}
    return row | changes


def test_a_measured_row_stands_beside_the_predicted_one() -> None:
    step_case = "vit, 224/16, batch 8, PGD-3, rho 0.05"
    rows = [predicted("block"), predicted("iteration")]
    rows.append(predicted("step", case=step_case, steps=3, at_best_ms=8.0, expected_ms=1234.0))
    line = "| NVIDIA H100 SXM | vit, 224/16, batch 8 | amp | 19 | 5.3 | 1.3 | 12.4 | 2 / 3 | 2 / 3"
    alone = roofline_table(rows)
    assert f"{line} | 8 / 1234 | 40 % |" in alone
    assert "Arithmetic, nothing of it timed: ms at best / expected, " in alone.replace("\n", " ")
    speed = {"dtype": "bf16", "captured": True, "device": "NVIDIA H100 80GB HBM3"}
    facts = {"torch": "2.14", "date": "2026-01-02T03:04:05", "implementation": "captured"}
    measured = [
        speed | facts | {"what": "attack", "case": "vit, 224/16, batch 8", "p50_ms": 3.5},
        speed | facts | {"what": "step", "case": step_case, "p50_ms": 9.5, "layers": ["head"]},
    ]
    text = "<!-- table: roofline cpu -->\n<!-- /table -->"
    both = with_tables(text, rows + measured)
    assert f"{line} / 3.5 | 8 / 1234 / 9.5 | 40 % |" in both
    for change in ({"device": "NVIDIA A100"}, {"captured": False}, {"case": "another"}):
        assert f"{line} |" in with_tables(text, rows + [row | change for row in measured])
