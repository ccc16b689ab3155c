"""The tree is the one of CONTRIBUTING: imports point one way, names are where users expect them."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "safer_fast"
ORDER = [
    "kernels",
    "config",
    "runtime",
    "data",
    "models",
    "attacks",
    "runs",
    "selection",
    "evaluation",
    "training",
]
COMMANDS = {"train", "evaluate", "select", "report", "export", "doctor"}
PROGRAM = "__main__"
"""The six commands as one program, `safer-fast`; it imports them when one is asked for."""
# where a library may be imported; a library that is not named here may be imported anywhere
HOMES = {
    "timm": {"models/build.py", "data/mixing.py"},
    "nvidia": {"data/dali/pipeline.py"},
    "triton": {f"kernels/{family}/cuda.py" for family in ("attack", "float8", "sam")},
    "matplotlib": {
        "runs/figures/canvas.py",
        "runs/figures/curves.py",
        "runs/figures/layer_map.py",
        "selection/comparison_output.py",
    },
    "wandb": {"runs/loggers/wandb.py"},
    "peft": {"models/lora.py"},
    "apex": set(),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, kernels too."""
    files = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    files |= {path.relative_to(ROOT): path for path in (ROOT / "kernels").rglob("*.py")}
    return {
        ".".join(("safer_fast", *name.with_suffix("").parts)).removesuffix(".__init__"): path
        for name, path in files.items()
        if not path.is_symlink() and "safer_fast/kernels/" not in path.as_posix()
    }


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Every module that a file imports: lazily, for types alone or at its top."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return found


def layer(module: str) -> int:
    """Place of a module in the order; the six commands come last."""
    name = module.split(".")[1]
    return ORDER.index(name) if name in ORDER else len(ORDER)


GRAPH = {
    name: {other for other in imports(path) if other in MODULES and other != "safer_fast"}
    for name, path in MODULES.items()
    if name != "safer_fast"
}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_one_way(module: str) -> None:
    wrong = {other for other in GRAPH[module] if layer(other) > layer(module)}
    assert not wrong, f"{module} imports {wrong}"


def test_no_import_comes_back_to_where_it_started() -> None:
    """There is no cycle between files nor, within a layer, between folders."""
    try:
        TopologicalSorter({name: others - {name} for name, others in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_top_holds_the_commands_alone_and_no_folder_is_crowded() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == COMMANDS | {"__init__", PROGRAM}
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert {path.name for path in folders if path.parent == PACKAGE} == set(ORDER[1:])
    for folder in folders:
        files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        assert len(files) <= 20, folder
        assert (folder / "__init__.py").is_file(), folder


def test_the_trainer_is_a_loop_that_others_do_the_work_of() -> None:
    """At most 15 modules of the package imported, and 20 methods."""
    path = PACKAGE / "training" / "trainer.py"
    assert len(GRAPH["safer_fast.training.trainer"]) <= 15
    (trainer,) = (
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    )
    assert sum(isinstance(node, ast.FunctionDef) for node in trainer.body) <= 20


def test_libraries_are_known_in_their_own_files_alone() -> None:
    for path in MODULES.values():
        where = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()
        for library in {name.split(".")[0] for name in imports(path)} & set(HOMES):
            assert where in HOMES[library], f"{where} imports {library}"


def test_settings_and_kernels_stand_below_everything() -> None:
    for name, path in MODULES.items():
        libraries = {found.split(".")[0] for found in imports(path)}
        if name.startswith("safer_fast.config"):
            assert not libraries & {"torch", "torchvision", "timm", "numpy"}, name
        if name.startswith("safer_fast.kernels"):
            assert "safer_fast" not in libraries, name


def test_files_stay_short_and_the_method_on_one_page() -> None:
    for path in MODULES.values():
        assert len(path.read_text().splitlines()) <= 350, path
    assert len((PACKAGE / "training" / "step.py").read_text().splitlines()) <= 150
    for name in (*COMMANDS, PROGRAM):
        assert len((PACKAGE / f"{name}.py").read_text().splitlines()) <= 80, name


def test_no_test_file_imports_another() -> None:
    """Helpers that two of them share lie in tests/support, tools beside the tests that use them."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        wrong = {name for name in imports(path) if name.split(".")[-1].startswith("test_")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_docstrings_begin_with_a_verb_or_the_name_of_a_thing() -> None:
    riddle = re.compile(r"(What|Whether|Those|So|By|How|Which|Where|All that)\b")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            text = None
            if isinstance(node, documented):
                text = ast.get_docstring(node)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                text = node.value.value  # below a constant
            if isinstance(text, str):
                assert not riddle.match(text), f"{name}: {text.splitlines()[0]}"
