"""The benchmark of FP8: bf16 and FP8 in turn, layer by layer, an iteration, a step."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import float8, float8_accuracy
from bench.float8_table import float8_tables

from .test_train import run


def test_every_part_has_rows_with_both_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    words = [
        *("--model", "vit_tiny_patch16_224", "--image-size", "32", "--batch-sizes", "2"),
        *("--layers", "blocks.9.mlp.fc1", "--from", "0", "--repeats", "2", "--steps", "1"),
        *("--output", str(file)),
    ]
    monkeypatch.setattr(sys, "argv", ["bench.float8", *words])
    float8.main()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["part"] for row in rows] == [*["layer"] * 4, "iteration", "step"]
    assert {row["layer"] for row in rows[:4]} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    for row in rows:
        assert row["bf16_ms"]["p50_ms"] > 0
        ratio = row["bf16_ms"]["p50_ms"] / row["fp8_ms"]["p50_ms"]
        assert row["fp8_speed"] == pytest.approx(ratio, abs=1e-3)
    (iteration,) = (row for row in rows if row["part"] == "iteration")
    assert iteration["num_layers"] == 44  # the last block computes class tokens alone
    assert 0.5 < iteration["attack_sign_agreement"] <= 1
    assert 0.5 < iteration["attack_loss_ratio"] < 2
    assert "times as fast" in capsys.readouterr().out


def test_both_attacks_are_judged_on_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", "--amp=bf16", "--epochs=3", "--evaluation.attacks=clean")
    file = tmp_path / "rows.jsonl"
    words = [str(folder), "--steps=3", "--num-images=50", "--batch-size=16", f"--output={file}"]
    monkeypatch.setattr("safer_fast.float8.BACKWARD", torch.float8_e4m3fn)
    for name in ("e4m3", "e5m2"):
        argv = ["bench.float8_accuracy", *words, f"--backward={name}"]
        monkeypatch.setattr(sys, "argv", argv)
        float8_accuracy.main()
    row, other = (json.loads(line) for line in file.read_text().splitlines())
    # two bits of mantissa in place of three
    assert 0.5 < other["sign_agreement"] < row["sign_agreement"] < 1
    assert other["bf16_accuracy"] == row["bf16_accuracy"]
    shown = float8_tables([row, other])
    assert "| e4m3 | 50 |" in shown
    assert "| e5m2 | 50 |" in shown
    assert row["num_images"] == 50
    assert row["num_layers"] > 0
    assert row["simulated"]
    difference = row["only_bf16_fools"] - row["only_fp8_fools"]
    assert row["fp8_accuracy"] - row["bf16_accuracy"] == pytest.approx(difference / 50, abs=1e-4)
    assert 0 < row["p"] <= 1
    assert "50 images" in capsys.readouterr().out
