"""Flags and settings that messages, pages and recipes name exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from safer_fast.config.schema import Config
from tests.system.hostile import COMMANDS, flags_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]
PAGES += [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("safer_fast/config/recipes/*.yaml")),
]
MODULES = [*sorted((ROOT / "safer_fast").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
BENCHMARKS = [*sorted((ROOT / "bench").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
GROUPS = {name: value for name, value in Config().to_dict().items() if isinstance(value, dict)}
SETTING = re.compile(rf"(?<![\w./-])({'|'.join(GROUPS)})\.([a-z_]+)(?![\w(/]|\.\w)")
OF_OTHERS = {
    "torchrun": "master-addr master-port max-restarts nnodes node-rank nproc-per-node rdzv-backend "
    "rdzv-endpoint rdzv-id shutdown-timeout",
    "sbatch": "cpus-per-task gpus-per-node nodes ntasks-per-node open-mode requeue signal",
    "git": "porcelain short untracked-files",
    "pip": "no-build-isolation no-deps",
    "cmake": "build fresh parallel",
    "docker": "shm-size",
    "nvidia-smi": "query-gpu",
    "tensorboard": "logdir",
    "examples": "flag group.its_name data help",
}
ENDINGS = {"py", "md", "json", "svg", "onnx", "pt", "pth", "bin", "safetensors"}
ATTRIBUTES = {"attack.audited", "model.arrange", "runtime.keep_memory"}
"""Words of the code that look like settings."""


def texts() -> Iterator[tuple[str, str]]:
    """Every page, and every text in the code, with the name of its file."""
    for page in PAGES:
        yield page.name, page.read_text()
    for module in MODULES:
        if module.name == "canvas.py":  # colours of a style sheet
            continue
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield module.name, node.value


def known_flags() -> set[str]:
    known = {flag for command in COMMANDS for flag in flags_of(command)}
    for file in BENCHMARKS:
        known.update(re.findall(r'add_argument\(\s*"(--[\w-]+)"', file.read_text()))
    known.update(f"--{name}" for names in OF_OTHERS.values() for name in names.split())
    return {flag.replace("-", "_") for flag in known}


def unknown_flags(found: Iterator[tuple[str, str]], known: set[str]) -> set[str]:
    return {
        f"{flag} in {name}"
        for name, text in found
        for flag in FLAG.findall(text)
        if flag.replace("-", "_") not in known
    }


def test_every_flag_that_is_named_exists() -> None:
    known = known_flags()
    assert unknown_flags(texts(), known) == set()
    wrong = iter([("a message", "write fewer (--checkpoint.minutes)")])
    assert unknown_flags(wrong, known) == {"--checkpoint.minutes in a message"}


def test_every_setting_that_is_named_exists() -> None:
    unknown = {
        f"{group}.{name} in {file}"
        for file, text in texts()
        for group, name in SETTING.findall(text)
        if name not in GROUPS[group] and name not in ENDINGS
        if f"{group}.{name}" not in ATTRIBUTES
    }
    assert unknown == set()
