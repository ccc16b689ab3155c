"""The tree is the one of the design: imports point one way, names are where users expect them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "safer_fast"
ORDER = [
    {"kernels"},
    {"help_text", "intervals", "whole_file", "answers", "ranges", "masking", "recipe_scale"},
    {"messages", "turns", "streams", "kept_folder"},
    {"config", "command_configs", "validation", "command_line", "distributed", "stopping"},
    {"conversion"},
    {"capture", "moments", "micro_batch", "savings", "cut", "sums", "batch_norms"},
    {"report_drawing", "report_map"},
    {
        "data",
        "checkpoint",
        "checkpoint_file",
        "lock_file",
        "run_lock",
        "metrics",
        "metrics_tensorboard",
        "metrics_wandb",
        "parameters",
        "measured",
    },
    {"network", "checkpoint_folder", "run_log", "gallery", "metrics_mending", "weights_source"},
    {"initial_weights", "same_function"},
    {"model"},
    {"attack_arguments"},
    {"attack", "gradient_watch", "sam", "runtime", "attention", "criteria"},
    {
        "objective",
        "optim",
        "schedule",
        "selection",
        "criticality",
        "layer_runs",
        "flops",
        "float8",
        "sentinel",
    },
    {"attacker", "health", "adapters", "attack_suite", "float8_speed"},
    {"step", "reference", "run_folder", "attack_audit"},
    {"engine", "banner", "probe", "run_state", "training_log"},
    {"resume", "saving", "defaults"},
    {"run_setup"},
    {
        "select_scores",
        "select_table",
        "select_plot",
        "export_card",
        "export_onnx",
        "export_robustbench",
        "doctor_checks",
    },
    {"doctor_machine", "doctor_data"},
    {"report_run", "report_tables", "report_evaluations", "report_gallery"},
    {"report_figures", "report_curves", "report_health"},
    {"evaluation_store", "evaluation_progress", "evaluation_table", "evaluation_log"},
    {
        "evaluate",
        "evaluation_setup",
        "evaluation_run",
        "select",
        "report",
        "doctor",
        "export",
    },
    {"examiner"},
    {"trainer"},
    {"dry_run"},
    {"train"},
]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def level(module: str) -> int | None:
    return next((n for n, names in enumerate(ORDER) if module in names), None)


def test_every_module_has_its_place_in_the_order() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    known = set().union(*ORDER)
    assert modules <= known, modules - known


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path: Path) -> None:
    if path.stem == "__init__":
        return
    own = level(path.stem)
    assert own is not None
    for name in imports(path):
        words = name.split(".")
        if words[0] == "safer_fast" and len(words) > 1 and (other := level(words[1])) is not None:
            assert other <= own, f"{path.stem} imports {words[1]}"


def test_only_their_own_files_know_timm_triton_and_apex() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        names = {name.split(".")[0] for name in imports(path)}
        where = path.relative_to(ROOT).as_posix()
        if "timm" in names:
            assert where in ("safer_fast/model.py", "safer_fast/data/mixing.py"), where
        if "nvidia" in names:
            assert where == "safer_fast/data/dali_pipeline.py", where
        if "triton" in names:
            assert path.name == "cuda.py", where
        assert "apex" not in names, where


def test_kernels_know_nothing_of_training() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.startswith("safer_fast") for name in imports(path)), path


def test_the_method_stays_on_one_page() -> None:
    for name in ("step.py", "train.py"):
        assert len((PACKAGE / name).read_text().splitlines()) <= 150
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 350, path
