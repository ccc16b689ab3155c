"""The tables of the docs are those of the committed results, and so are the figures of README."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import accuracy, table, time_to_accuracy
from bench.studies import float8_accuracy, warm_start
from bench.table import committed_rows, newest, with_tables

ROOT = Path(__file__).parents[2]
ORIGIN = {"device": "cpu, 2 threads, AVX512", "torch": "2.15.0", "date": "2026-01-02T03:04:05"}
SPEED = {"p20_ms": 90.0, "p50_ms": 100.0, "p80_ms": 120.0, "images_per_second": 80.0, "mfu": 0.25}


def peers_row(implementation: str, **changes: Any) -> dict[str, Any]:
    row = {
        "what": "peers",
        "implementation": implementation,
        "case": "vit, 32/4",
        "layers": ["blocks.1.mlp.fc1"],
        "dtype": "bf16",
        "compiled": False,
        "speed_of_ours": 1.0,
        **SPEED,
        **ORIGIN,
    }
    return row | changes


def written(name: str, rows: list[dict[str, Any]]) -> str:
    """The text between the marks of this table after it was written."""
    text = f"before\n<!-- table: {name} -->\nold\n<!-- /table -->\nafter\n"
    result = with_tables(text, rows)
    assert result.startswith(f"before\n<!-- table: {name} -->\n")
    assert result.endswith("<!-- /table -->\nafter\n")
    assert with_tables(result, rows) == result
    return result.split("-->", 1)[1].split("<!--")[0]


def test_the_tables_of_the_results_are_those_of_the_committed_rows() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    assert with_tables(text, committed_rows()) == text, "run python -m bench.table"


def test_the_figures_of_readme_are_those_of_the_tables() -> None:
    why = (ROOT / "README.md").read_text().partition("## Why")[2].partition("\n## ")[0]
    results = (ROOT / "docs" / "results.md").read_text()
    times = [
        f"{float(found):.1f}"
        for found in re.findall(
            r"^\| (?:ours, PGD-10|peers \w.*?, PGD-10) \| \d+ \| ([\d.]+)", results, re.M
        )
    ]
    assert len(times) == 3
    late = results.partition("from the late start")[2]
    gained = re.findall(r"^\| SAFER \|.* \| \+([\d.]+) ± [\d.]+ \(p [\d.]+\) \|$", late, re.M)[0]
    lost = re.findall(r"^\| SAFER \| .*? \| .*? \| -([\d.]+) ±", results, re.M)[0]
    named = re.findall(r"\d+\.\d", why)
    assert named[:5] == [*times, gained, lost]


def test_peers_are_lines_and_settings_are_columns_from_the_plainest_to_the_fastest() -> None:
    figures = {
        "peak_memory_mib": 12.3,
        "counted_per_ideal": 0.9,
        "stages_ms": {"attack": 70.0, "rest": 30.0},
    }
    rows = [
        peers_row("ours", compiled=True, captured=True, **figures),
        peers_row("tuned", compiled=True, captured=True, images_per_second=40.0, speed_of_ours=2.0),
        peers_row("ours"),
        peers_row("ours", dtype="off", images_per_second=20.0),
    ]
    lines = written("peers cpu", rows).splitlines()
    assert "| step | fp32 eager | bf16 eager | bf16 compiled captured |" in lines
    assert "| ours | 20.0, 1.00x | 80.0, 1.00x | 80.0, 1.00x |" in lines
    assert "| tuned | - | - | 40.0, 2.00x |" in lines
    assert "bf16 compiled captured in full:" in lines
    full = "| ours | 100 (90 to 120) | 25.0 % | 0.900 | 12 | attack 70.0, rest 30.0 |"
    assert full in lines
    assert "| tuned | 100 (90 to 120) | 25.0 % | - | - | - |" in lines
    assert any("`blocks.1.mlp.fc1` selected" in line for line in lines)
    assert any("2026-01-02" in line for line in lines)


def test_the_newest_of_several_measurements_counts() -> None:
    newer = peers_row("ours", images_per_second=99.0, date="2026-02-01T00:00:00")
    for rows in ([peers_row("ours"), newer], [newer, peers_row("ours")]):
        assert newest(rows) == [newer]
        assert "99.0" in written("peers cpu", rows)
    for other in (peers_row("ours", compiled=True), peers_row("ours", layers=["head"])):
        assert newest([newer, other]) == [newer, other]


def test_every_case_has_its_own_tables() -> None:
    rows = [peers_row("ours"), peers_row("ours", layers=["head"], images_per_second=70.0)]
    body = written("peers cpu", rows)
    assert body.count("| ours | 80.0, 1.00x |") == body.count("| ours | 70.0, 1.00x |") == 1
    assert body.index("`blocks.1.mlp.fc1` selected") < body.index("`head` selected")


def test_rows_of_one_machine_are_not_in_the_table_of_another() -> None:
    on_gpu = peers_row("ours", images_per_second=4321.0, device="NVIDIA H200")
    assert "4321" in written("peers gpu", [on_gpu, peers_row("ours")])
    assert "4321" not in written("peers cpu", [on_gpu, peers_row("ours")])
    assert written("attack gpu", [on_gpu]).strip() == "Not measured yet."


def test_an_iteration_of_the_attack_is_a_line_for_each_mode() -> None:
    facts = {"what": "attack", "case": "vit, 32/4, batch 8", "dtype": "bf16", "compiled": True}
    row = {"implementation": "captured", "captured": True, "peak_memory_mib": None}
    line = "| vit, 32/4, batch 8, bf16 compiled captured | 100.00 (90.00 to 120.00) | 80.0 | 25.0 %"
    assert f"{line} | - |" in written("attack cpu", [facts | row | SPEED | ORIGIN])


def test_operations_are_ours_beside_plain_pytorch_and_a_copy() -> None:
    facts = {"what": "perturb_", "case": "25 M", "dtype": "bf16", "bytes": 100}
    ratios = {"ratio_reference": 13.38, "ratio_copy": 1.25}
    rows = [
        facts | {"implementation": name} | ratios | SPEED | ORIGIN for name in ("native", "copy")
    ]
    body = written("ops cpu", rows)
    assert body.count("| `perturb_` | 25 M | bf16 | 100.00 | 13.4 | 1.25 |") == 1


def test_attention_kernels_stand_side_by_side() -> None:
    facts = {"what": "attention", "case": "ViT-S, batch 4", "dtype": "bfloat16"}
    settings = [("flash", True, 1.5), ("flash", False, 1.25), ("math", True, 2.0)]
    rows = [
        facts | SPEED | ORIGIN | {"implementation": name, "deterministic": same, "p50_ms": time}
        for name, same, time in settings
    ]
    body = written("attention cpu", rows)
    assert "| ViT-S, batch 4, bfloat16, deterministic | 1.50 | 2.00 |" in body
    assert "| ViT-S, batch 4, bfloat16 | 1.25 | - |" in body


def test_loaders_are_lines_and_every_case_has_its_own_table() -> None:
    facts = {"what": "data", "images_per_core_second": 40.0, "ratio_torch": 2.0}
    facts |= {"ratio_torch_per_core": None, "ratio_timm": None} | SPEED | ORIGIN
    rows = [
        facts | {"implementation": "safer_fast dali", "case": case, "num_workers": number}
        for case in ("photos", "small")
        for number in (1, 2)
    ]
    body = written("data cpu", rows)
    assert body.count("| safer_fast dali | 1 | 80 | 40 | 2.00 | - |") == 2
    assert body.count("| safer_fast dali | 2 | 80 | 40 | 2.00 | - |") == 2
    assert body.index("photos; cpu, 2 threads") < body.index("small; cpu, 2 threads")


def test_what_training_waits_for_data_is_told_epoch_by_epoch() -> None:
    row = {"what": "data", "implementation": "safer_fast torch", "case": "vit trained"}
    figures = {"num_workers": 2, "images_per_second": 5.0, "data_wait_fraction": [0.1, 0.012]}
    body = written("data cpu", [row | figures | ORIGIN])
    assert "| safer_fast torch | 2 | 5.0 | 10.00 %, 1.20 % |" in body


def test_a_mark_that_names_no_table_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected a table of peers, .*, got 'peer cpu'"):
        written("peer cpu", [])


@pytest.mark.parametrize("name", table.PAGES)
def test_check_fails_with_one_line_where_a_page_is_out_of_date(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.table", "--check"])
    (tmp_path / "docs").mkdir()
    for page in table.PAGES:
        (tmp_path / page).write_text("nothing")
    page = tmp_path / name
    page.write_text("<!-- table: peers cpu -->\nold\n<!-- /table -->\n")
    with pytest.raises(SystemExit, match=rf"{name}: .*; run python -m bench\.table$"):
        table.main()
    assert "old" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["bench.table"])
    table.main()
    assert "Not measured yet." in page.read_text()
    monkeypatch.setattr(sys, "argv", ["bench.table", "--check"])
    table.main()


def test_a_row_from_before_a_switch_is_older_than_one_with_it_off() -> None:
    rows = [peers_row("ours"), peers_row("ours", captured=False, date="2026-01-03T03:04:05")]
    assert newest(rows) == rows[1:]
    assert len(newest([*rows, peers_row("ours", captured=True)])) == 2


def finished_run(folder: Path, seed: int, accuracy: float, precision: str = "amp") -> Path:
    """A run folder that rows of accuracies are made from, with an evaluation after its end."""
    folder.mkdir()
    (folder / "run.yaml").write_text(
        f"amp: bf16\nseed: {seed}\nepochs: 4\nattack: {{norm: linf, precision: {precision}}}\n"
    )
    about = {"device": "cpu (CPU, 1 threads)", "torch": "2.14", "data": "digits", "model": "vit"}
    events: list[dict[str, Any]] = [{"event": "run", "epoch": 0, "step": 0, "time_s": 0.0, **about}]
    place = {"event": "evaluation", "epoch": 4, "step": 8, "time_s": 9.0, "split": "test"}
    for weights in ("best", "last"):
        for attack, epsilon, loss in (("clean", 0.0, 0.0), ("pgd-20", 0.1, 0.5)):
            facts = {"weights": weights, "attack": attack, "epsilon": epsilon, "num_images": 100}
            events.append({**place, **facts, "accuracy": accuracy - loss})
    end = {"event": "end", "epoch": 4, "step": 8, "time_s": 10.4}
    late = {**events[-1], "attack": "fgsm"}
    lines = [json.dumps(event) + "\n" for event in [*events, end, late]]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_accuracies_of_seeds_are_lines_with_their_mean_and_deviation_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [finished_run(tmp_path / str(seed), seed, 0.9 + seed / 10) for seed in (0, 1)]
    file = tmp_path / "rows.jsonl"
    arguments = [*map(str, runs), "--name", "some run", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
    runpy.run_path(accuracy.__file__, run_name="__main__")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 8
    content = written("accuracy cpu", rows)
    assert content.split("\n\n")[1].startswith("some run: clean / pgd-20 accuracy (linf,")
    assert "| seed | best | last |" in content
    assert "| 1 | 1.000 / 0.500 | 1.000 / 0.500 |" in content
    assert "| mean | 0.950 / 0.450 | 0.950 / 0.450 |" in content
    assert "| deviation | 0.071 / 0.071 | 0.071 / 0.071 |" in content


def test_runs_attacked_in_either_precision_are_compared_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        finished_run(tmp_path / f"{precision}-{seed}", seed, value, precision)
        for seed, precision, value in (
            *((0, "amp", 0.9), (1, "amp", 0.8), (2, "amp", 0.7)),
            *((0, "fp8", 0.91), (1, "fp8", 0.83)),
        )
    ]
    file = tmp_path / "rows.jsonl"
    arguments = [*map(str, runs), "--precisions", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
    runpy.run_path(accuracy.__file__, run_name="__main__")
    content = written("float8 cpu", [json.loads(line) for line in file.read_text().splitlines()])
    assert "| seed | clean, best | pgd-20, best | clean, last | pgd-20, last |" in content
    assert "| 1 | 80.0 / 83.0 | 30.0 / 33.0 | 80.0 / 83.0 | 30.0 / 33.0 |" in content
    assert "| 2 |" not in content
    assert content.count("+2.0 ± 1.4 (p 0.3)") == 4
    assert "bf16 / in FP8 (simulated, every matrix of the blocks)" in " ".join(content.split())


def test_a_run_that_has_not_ended_has_no_accuracies(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", 0, 0.9)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"end"' not in line))
    with pytest.raises(ValueError, match="expected a finished run"):
        accuracy.rows_of(run, "some run")


def test_rows_of_accuracy_are_named_by_their_data_and_a_wrong_folder_gets_one_line(
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert {row["case"] for row in accuracy.rows_of(small_run)} == {"digits"}
    run = shutil.copytree(small_run, tmp_path / "run")
    settings = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(re.sub(r"(?m)^  path: .*$", "  path: data/birds.npz", settings))
    assert {row["case"] for row in accuracy.rows_of(run)} == {"birds"}
    for main, words in (
        (accuracy.main, ["none"]),
        (float8_accuracy.main, ["none"]),
        (warm_start.main, ["--start=none", "--train=digits"]),
        (time_to_accuracy.main, ["--start=none", "--train=digits", "--test=digits"]),
    ):
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        with pytest.raises(SystemExit) as error:
            main()
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert "none" in line
