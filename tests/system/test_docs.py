"""Commands in the docs work: every one is run, on little data."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.run import config_from_args, parse_args

from tests.support.kills import Server
from tests.support.pictures import encode, photo
from tests.support.small_runs import TEST_IMAGES
from tests.support.towers import PROJECTED, SIZES, save_tower

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "safer_fast"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / "bench" / "README.md"]
# lines of a tutorial run one after the other: test_tutorials.py
PAGES = [page for page in PAGES if not page.name.startswith("tutorial-")]
RECIPES = sorted((ROOT / "safer_fast" / "config" / "recipes").glob("*.yaml"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python|torchrun|make|pip|safer-fast) [^`]+)`")
OURS = re.compile(r"(?:\w+=\S+ )*(?:srun )?(?:python|torchrun|make|pip|hf|safer-fast) ")
PROGRAM = re.compile(r"(?<![\w-])safer-fast (?=[a-z])")
LITTLE = [
    "--epochs=2",
    "--batch-size=16",
    "--data.max_images=32",
    "--data.num_workers=0",
    "--attack.steps=1",
    "--attack.clean_epochs=0",
    "--attack.epsilon_warmup_epochs=0",
    "--selection.warmup_epochs=1",
    "--selection.every_epochs=1",
    "--selection.num_images=16",
    "--evaluation.max_images=16",
    "--evaluation.steps=1",
    "--evaluation.sentinel_images=0",
    "--evaluation.attacks=clean",
    "--runtime.num_threads=1",
]
LITTLE_VIT = ["--model.name=vit_tiny_patch16_224", "--model.arguments={depth: 3, embed_dim: 48}"]
LARGE = [*LITTLE_VIT, "--model.patch_size=16", "--data.image_size=32", "--selection.from_block=1"]
LITTLE_OF = {
    "evaluate": ["--num-images=3"],
    "select": ["--num-images=16", "--steps=1"],
    "report": [],
    "export": [],
    "doctor": [],
}


def commands_of(text: str) -> Iterator[str]:
    """Every command in a page, on one line, without the words beside it."""
    blocks = [block for language, block in BLOCK.findall(text) if language in ("", "bash", "sh")]
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(blocks)).splitlines():
        if OURS.match(line):
            command = re.sub(r"(?: {2,}.*| +# .*| &)$", "", line)
            is_begun = "torchrun" in command and "-m " not in command
            yield command + " -m safer_fast.train ..." * is_begun
    for inline in INLINE.findall(BLOCK.sub("", text)):
        if not inline.startswith("torchrun --shutdown-timeout"):  # two words of a command
            yield " ".join(inline.split())


def all_commands() -> list[str]:
    """Commands of all pages and of the headers of the recipes, each once."""
    found = [command for page in PAGES for command in commands_of(page.read_text())]
    for recipe in RECIPES:
        header = re.search(r"^# Command: +(.*?)(?:  +\(.*)?$", recipe.read_text(), re.MULTILINE)
        assert header, recipe
        found.append(header[1])
    return list(dict.fromkeys(PROGRAM.sub("python -m safer_fast.", one) for one in found))


COMMANDS = all_commands()
OF_INSTALLATIONS = [
    "python -m safer_fast",
    "python -m safer_fast.doctor --build-native",
    "pip wheel --no-build-isolation --no-deps .",
]
"""Commands that test_package.py runs, in environments of their own."""
OF_THE_PACKAGE = [
    command
    for command in COMMANDS
    if "-m safer_fast." in command and command not in OF_INSTALLATIONS
]
OF_TORCHRUN = [command for command in OF_THE_PACKAGE if "torchrun" in command]
OF_BENCH = [command for command in COMMANDS if "-m bench." in command or "bench/test_" in command]
OF_SCRIPTS = [command for command in COMMANDS if re.match(r"python \w+\.py", command)]
OF_MAKE = [command for command in COMMANDS if command.startswith("make ")]
OF_PIP = [command for command in COMMANDS if command.startswith("pip install ")]

OF_PRETRAINED = {"finetune", "finetune-dora", "imagenet-apgd", "imagenet-growing"}
FOR_LARGER_IMAGES = OF_PRETRAINED | {"imagenette"}
"""Recipes that start from weights of timm's hub, and those of larger images than the others."""


@pytest.fixture(scope="module")
def place(once: Any, small_run: Path) -> Path:
    """A folder with all that commands name: data, and two finished runs."""
    return Path(once("docs", partial(make_place, small_run)))


def make_place(small_run: Path, folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    pictures = [encode(photo(32, 32, seed), "png") for seed in range(48)]
    column = pa.array([{"bytes": each, "path": None} for each in pictures])
    table = pa.table({"image": column, "label": [index % 10 for index in range(48)]})
    for name in ("cifar10-train.parquet", "cifar10-test.parquet"):
        pq.write_table(table, folder / name)
    for index, picture in enumerate(pictures):
        split = "train" if index % 3 else "val"
        file = folder / "DIR" / split / f"class-{index // 3 % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture)
    for name in ("RUN", "OTHER"):
        shutil.copytree(small_run, folder / name)
    save_tower(folder, "clip")
    texts = {"embeddings": torch.randn(2, PROJECTED, generator=torch.Generator().manual_seed(0))}
    save_file(texts, folder / "imagenet.safetensors")
    np.savez(
        folder / "other.npz",
        images=generator.integers(0, 256, (8, 8, 8), dtype=np.uint8),
        labels=np.arange(8),
    )
    made = generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "1m.npz", images=made, labels=np.arange(20) % 10)


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place that commands are typed in; runs that they change are copies."""
    files = ("clip.safetensors", "imagenet.safetensors", "other.npz", "1m.npz")
    for name in ("DIR", "cifar10-train.parquet", "cifar10-test.parquet", *files):
        (tmp_path / name).symlink_to(place / name)
    for name in ("RUN", "OTHER"):
        shutil.copytree(place / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def variants(command: str) -> list[list[str]]:
    """The words of a command, once for each of `a|b` that it leaves open; what may be left out is.

    Names that stand for something are put in their place: HOST, JOB, folders that all machines see.
    """
    command = re.sub(r"\[[^]]*(?:\.\.\.|--output DIR)[^]]*\]", "", command)
    command = command.replace("[", "").replace("]", "").replace(" ...", "")
    command = command.replace("/shared/imagenet", "DIR").replace("/shared/large", "large")
    command = command.replace("other.parquet", "other.npz").replace("$first", "HOST")
    command = command.replace("HOST", "localhost").replace("$SLURM_NNODES", "1")
    command = command.replace("--config NAME", "--config digits")
    words = shlex.split(command.removeprefix("srun "))
    open_words = [word for word in words if "|" in word]
    if not open_words:
        return [words]
    first = open_words[0]
    rest = [[w.split("|")[0] if w in open_words[1:] else w for w in words]]
    return [[alternative if w == first else w for w in rest[0]] for alternative in first.split("|")]


def little(module: str, words: list[str]) -> list[str]:
    """Flags that make a command of the package quick, after those that it has."""
    if module != "train":
        return [*words, *LITTLE_OF[module]]
    size: list[str] = []
    if "--config" in words:
        size = LARGE if "imagenet-vit-large" in words else LITTLE_VIT
        if FOR_LARGER_IMAGES & set(words):
            size = [*LITTLE_VIT, "--model.patch_size=16", "--data.image_size=32"]
        if "imagenet-growing" in words:
            size.append("--data.resolution_schedule=16@0.5,32")
        if "clip-fare" in words or "clip-tecoa" in words:
            size = ["--model.name=vit_base_patch16_clip_224", "--model.checkpoint=clip.safetensors"]
            size += ["--model.patch_size=16", "--data.image_size=32"]
            size += [f"--model.arguments={json.dumps(SIZES)}"]
        named = {word.partition("=")[0] for word in [*words, *size]}
        if OF_PRETRAINED & set(words) and not named & {"--model.pretrained", "--model.checkpoint"}:
            size.append("--model.pretrained=false")
    if "--model.pretrained" in words:  # there is no network to fetch weights from
        place = words.index("--model.pretrained")
        assert words.pop(place + 1) == "true"
        words.pop(place)
        size = LARGE
    output = [] if "--output" in words else ["--output=new"]
    # RUN is finished: it cannot be resumed, but others start from its weights
    if "--model.checkpoint" not in words:
        words = ["BEGUN" if word == "RUN" else word for word in words]
    return [*words, *LITTLE, *size, *output]


@pytest.mark.parametrize("command", [c for c in OF_THE_PACKAGE if "torchrun" not in c])
def test_a_command_of_the_package_does_what_it_says(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in variants(command):
        module = words[2].removeprefix("safer_fast.")
        main: Callable[[list[str]], None] = import_module(words[2]).main
        arguments = words[3:]
        if module == "export" and "RUN" in arguments:
            arguments = [*arguments, "--output", f"exported-{arguments[2]}"]
        if "RUN" not in arguments and module in ("evaluate", "select", "report", "export"):
            arguments = ["RUN", *arguments]
        main(little(module, arguments))
    assert capsys.readouterr().out


def parts_of(command: str) -> tuple[list[str], str, list[str]]:
    """Arguments of torchrun, for one machine with one process; the module; its arguments."""
    (words,) = variants(re.sub(r"^(?:\w+=\S+ )+", "", command))
    place = words.index("-m")
    starting = re.sub(r"--nproc-per-node \d+", "--nproc-per-node 1", " ".join(words[1:place]))
    starting = re.sub(r"--nnodes \d+(?::\d+)?", "--nnodes 1", starting)
    starting = re.sub(r"--max-restarts \d+", "--max-restarts 0", starting)
    starting = starting.replace(":29500", ":0").replace("--master-port 29500", "--master-port 0")
    module = words[place + 1].removeprefix("safer_fast.")
    return starting.split(), module, little(module, words[place + 2 :])


@pytest.mark.parametrize("command", OF_TORCHRUN)
def test_torchrun_takes_what_the_docs_tell_it_and_so_do_we(command: str, here: Path) -> None:
    starting, module, arguments = parts_of(command)
    name = f"safer_fast.{module}"
    parsed = parse_args([*starting, "-m", name, *arguments])
    config_from_args(parsed)
    assert (parsed.training_script, parsed.training_script_args) == (name, arguments)
    import_module(name).main(arguments)


# those with a meeting point: it is found at once
@pytest.mark.parametrize("command", [c for c in OF_TORCHRUN if "rdzv" in c and "srun" not in c])
def test_a_command_on_several_machines_runs_with_one_process_on_one(
    command: str, here: Path
) -> None:
    starting, module, arguments = parts_of(command)
    words = [*starting, "-m", f"safer_fast.{module}", *arguments]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]


def scripts() -> dict[str, str]:
    """The programs that docs/extending.md shows, by the names they give themselves."""
    found = {}
    for language, block in BLOCK.findall((ROOT / "docs" / "extending.md").read_text()):
        if language == "python":
            found[block.removeprefix('"""').partition(":")[0]] = block
    return found


@pytest.mark.parametrize("command", OF_SCRIPTS)
def test_an_extension_is_short_and_trains(command: str, server: Server, here: Path) -> None:
    _, name, *flags = shlex.split(command)
    program = scripts()[name]
    assert len(program.splitlines()) < 30
    Path(name).write_text(program)
    words = [name, *LITTLE, f"--data.test_path={TEST_IMAGES}", "--output=new", *flags]
    process = server.run(*words)
    assert process.returncode == 0, process.stderr[-2000:]
    assert (here / "new" / "report.html").is_file()


def test_every_program_of_the_page_on_extending_is_run() -> None:
    assert set(scripts()) == {shlex.split(command)[1] for command in OF_SCRIPTS}


@cache
def benchmarks_of_tests() -> set[str]:
    """Names that test files import from bench, and its modules that they import from."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    return {
        alias.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench")
        for alias in [*node.names, ast.alias((node.module or "").removeprefix("bench."))]
    }


@pytest.mark.parametrize("command", OF_BENCH)
def test_a_benchmark_that_is_named_has_a_test_that_runs_it(command: str) -> None:
    if "bench/test_" in command:
        files = [word for word in command.split() if word.startswith("bench/")]
        assert all((ROOT / file).is_file() for file in files)
        return
    (module,) = re.findall(r"bench\.(\w+)", command)
    assert module in benchmarks_of_tests()


@pytest.mark.parametrize("command", OF_MAKE)
def test_a_target_of_make_exists(command: str) -> None:
    target = command.split()[1]
    result = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", OF_PIP)
def test_what_pip_is_told_to_install_is_among_our_extras(command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = " ".join(
        [*project["dependencies"], *(item for name in extras for item in extras[name])]
    )
    for name in [word for word in shlex.split(command)[2:] if not word.startswith("-")]:
        if name.startswith("safer_fast["):
            assert name[len("safer_fast[") : -1] in extras
        else:
            assert re.search(rf"\b{re.escape(name)}\b", known), name


def test_the_commands_of_the_docs_are_found() -> None:
    assert "python -m safer_fast.train --amp bf16" in COMMANDS
    assert sum("torchrun" in command for command in OF_THE_PACKAGE) >= 5
    known = (OF_THE_PACKAGE, OF_INSTALLATIONS, OF_BENCH, OF_SCRIPTS, OF_MAKE, OF_PIP)
    rest = [c for c in COMMANDS if not any(c in kind for kind in known)]
    assert [c for c in rest if not c.startswith(("hf ", "pip download "))] == []


def test_every_name_on_the_page_on_architecture_is_in_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = {f.relative_to(PACKAGE).as_posix(): f for f in PACKAGE.rglob("*.*")}
    defined = {
        name
        for path in files.values()
        if path.suffix == ".py"
        for name in names_defined_in(ast.parse(path.read_text()))
    }
    code = [text for text in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page)) if text[0] != "-"]
    drawn = [part for text in re.findall(r"\"([^\"]+)\"", page) for part in text.split("<br>")]
    assert len(code) > 40
    for name in code:
        is_path = (PACKAGE / name).exists() or (ROOT / name).exists()
        assert is_path or name in defined, name
    for name in drawn:
        for path in re.findall(r"[a-z_/0-9]+\.py|[a-z_]+/", name):
            assert any(f"/{path}" in f"/{file}" for file in files), path
        for word in re.findall(r"\b[A-Z]\w+\.[a-z_]+|\b[a-z]+_[a-z_]+\b(?!\.py)", name):
            is_setting = word in {"log_every_steps"}
            assert word in defined or is_setting or (PACKAGE / word).exists(), word


def test_every_table_of_parts_is_where_the_page_on_extending_says() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    rows = re.findall(r"^\| [a-z ]+ \| `(\w+)` in `([\w/.]+)` \|", page, re.MULTILINE)
    assert len(rows) == 7
    for name, file in rows:
        tree = ast.parse((PACKAGE / file).read_text())
        assert name in names_assigned_in(tree) | set(names_defined_in(tree)), (name, file)


def names_assigned_in(tree: ast.Module) -> set[str]:
    """Constants of a module."""
    targets = [
        node.targets if isinstance(node, ast.Assign) else [node.target]
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    return {target.id for each in targets for target in each if isinstance(target, ast.Name)}


def names_defined_in(tree: ast.Module) -> Iterator[str]:
    """Functions, classes, and methods as Class.method."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}.{item.name}"
                for item in node.body
                if isinstance(item, ast.FunctionDef)
            )
