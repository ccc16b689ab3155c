"""Benchmarks of cheaper attacks: amp, bf16, FP8 in turn; a layer, an iteration, a step."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.studies import float8, float8_accuracy
from bench.studies.float8_table import float8_tables
from tests.support.small_runs import run


def test_every_part_has_rows_with_all_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    words = [
        *("--model", "vit_tiny_patch16_224", "--image-size", "32", "--batch-sizes", "2"),
        *("--layers", "blocks.9.mlp.fc1", "--from", "0", "--repeats", "2", "--steps", "1"),
        *("--output", str(file)),
    ]
    monkeypatch.setattr(sys, "argv", ["bench.studies.float8", *words])
    float8.main()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["part"] for row in rows] == [*["layer"] * 4, "iteration", "step"]
    assert {row["layer"] for row in rows[:4]} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    for row in rows:
        for name in ("fp8",) if row["part"] == "layer" else ("bf16", "fp8"):
            assert row[f"{name}_ms"]["p50_ms"] > 0
            ratio = row["amp_ms"]["p50_ms"] / row[f"{name}_ms"]["p50_ms"]
            assert row[f"{name}_speed"] == pytest.approx(ratio, abs=1e-3)
    (iteration,) = (row for row in rows if row["part"] == "iteration")
    assert iteration["num_layers"] == 44  # the last block computes class tokens alone
    alike = [iteration[f"{name}_attack_sign_agreement"] for name in ("fp8", "bf16")]
    assert 0.5 < alike[0] < alike[1] < 1
    assert all(0.5 < iteration[f"{name}_attack_loss_ratio"] < 2 for name in ("fp8", "bf16"))
    assert "times as fast" in capsys.readouterr().out
    assert "| step |" in float8_tables([{**row, "device": "NVIDIA H200"} for row in rows])


def test_both_attacks_are_judged_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", "--amp=bf16", "--epochs=3", "--evaluation.attacks=clean")
    file = tmp_path / "rows.jsonl"
    words = [str(folder), "--steps=3", "--num-images=50", f"--output={file}"]
    monkeypatch.setattr("safer_fast.attacks.float8_layers.BACKWARD", torch.float8_e4m3fn)
    for name in ("e4m3", "e5m2"):
        argv = ["bench.studies.float8_accuracy", *words, f"--backward={name}"]
        monkeypatch.setattr(sys, "argv", argv)
        float8_accuracy.main()
    monkeypatch.setattr(sys, "argv", ["bench.studies.float8_accuracy", *words, "--precision=bf16"])
    float8_accuracy.main()
    row, other, narrow = (json.loads(line) for line in file.read_text().splitlines())
    # two bits of mantissa in place of three; and seven
    assert 0.5 < other["sign_agreement"] < row["sign_agreement"] < narrow["sign_agreement"] < 1
    assert other["amp_accuracy"] == row["amp_accuracy"] == narrow["amp_accuracy"]
    shown = float8_tables([row, other, narrow])
    assert "| FP8, gradients e4m3 | 50 |" in shown
    assert "| FP8, gradients e5m2 | 50 |" in shown
    assert "| features in bf16 | 50 |" in shown
    assert row["num_images"] == 50
    assert row["num_layers"] > 0
    assert row["simulated"]
    difference = row["only_amp_fools"] - row["only_own_fools"]
    assert row["own_accuracy"] - row["amp_accuracy"] == pytest.approx(difference / 50, abs=1e-4)
    assert 0 < row["p"] <= 1
    assert "50 images" in capsys.readouterr().out
