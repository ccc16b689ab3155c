"""Files from strangers: none is executed, none leads elsewhere, and a bad one ends in one line."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from safer_fast import evaluate, report, select, train
from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import DataConfig
from safer_fast.config.untrusted import load_yaml
from safer_fast.data import load_data
from safer_fast.data.formats import arrays
from safer_fast.data.formats.folder import FolderSource
from safer_fast.data.formats.skipped import SkippedFiles
from safer_fast.models.build import build_model, timm_config
from safer_fast.models.weights_file import load_tensors, save_weights
from safer_fast.runs.checkpoints.file import read_checkpoint
from safer_fast.runs.folder import load_run, save_config
from safer_fast.runs.report.page import write_report
from safer_fast.runs.report.reading import read_runs
from safer_fast.runtime import attention
from safer_fast.runtime.command import fail
from safer_fast.runtime.timing_cache import remembered
from tests.support.commands import last_line
from tests.support.pictures import ONE_LINE, encode

ROOT = Path(__file__).parents[2]
RED = encode(Image.new("RGB", (8, 8), "red"), "png")
NUM_IMAGES = 10
LABELS = np.arange(NUM_IMAGES) % 2
Member = tuple[str, bytes]
Make = Callable[[Path, bytes], Path]
Main = Callable[[Sequence[str]], None]


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that a trap leaves behind; the test fails if it is there in the end."""
    file = tmp_path_factory.mktemp("mark") / "sprung"
    yield file
    assert not file.exists()


@pytest.fixture
def trap(mark: Path) -> bytes:
    """A pickle that leaves the mark."""
    return pickle.dumps(Trap(mark))


def torch_file(mark: Path, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"head.weight": Trap(mark)}, buffer, **settings)
    return buffer.getvalue()


TRAPS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda mark: pickle.dumps(Trap(mark)),
    "zip of torch": torch_file,
    "old file of torch": lambda mark: torch_file(mark, _use_new_zipfile_serialization=False),
}
every_trap = pytest.mark.parametrize("make", TRAPS.values(), ids=TRAPS.keys())


def test_a_trap_that_is_unpickled_leaves_its_mark(tmp_path: Path) -> None:
    for number, make in enumerate(TRAPS.values()):
        file = tmp_path / str(number)
        torch_or_pickle = io.BytesIO(make(file))
        if number:
            torch.load(torch_or_pickle, weights_only=False)
        else:
            pickle.load(torch_or_pickle)
        assert file.exists()


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process grow by 1 GiB at most."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_all(path: Path, **settings: Any) -> list[int]:
    """The labels of all images that are trained or validated on, which have been decoded."""
    defaults: dict[str, Any] = {"num_workers": 0, "backend": "torch", "image_size": 8}
    data = load_data(DataConfig(path=str(path), **(defaults | settings)), batch_size=1, seed=0)
    batches = [*data.train.epoch(1), *data.validation.epoch(1)]
    return sorted(label for batch in batches for label in batch.labels.tolist())


def refuse(path: Path, **settings: Any) -> str:
    """The one line that reading ends with, which names the file."""
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        read_all(path, **settings)
    assert str(path) in str(caught.value)
    return str(caught.value)


def write_bytes(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def write_folder(folder: Path, extra: Mapping[str, bytes] | None = None) -> Path:
    """Write a folder of images of classes a and b, in turn."""
    files = {f"{'ab'[number % 2]}/{number}.png": RED for number in range(NUM_IMAGES)}
    for name, content in (files | dict(extra or {})).items():
        write_bytes(folder / name, content)
    return folder


def samples(count: int = NUM_IMAGES) -> list[Member]:
    names = [f"{number:03}" for number in range(count)]
    return [
        member
        for number, name in enumerate(names)
        for member in ((f"{name}.png", RED), (f"{name}.cls", b"%d" % (number % 2)))
    ]


def write_tar(file: Path, members: Sequence[Member | tarfile.TarInfo]) -> Path:
    with tarfile.open(file, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return file


SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.int64())])


def write_parquet(file: Path, schema: pa.Schema | None = None, last: bytes = RED) -> Path:
    images = pa.array([RED] * (NUM_IMAGES - 1) + [last], pa.binary())
    table = pa.table({"image": images, "label": pa.array(LABELS)})
    pq.write_table(table if schema is None else table.cast(schema), file)
    return file


def npy(shape: str, content: bytes = b"", kind: str = "|u1") -> bytes:
    """An array in numpy's format, with any shape in its header."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


IMAGES_NPY = npy(f"({NUM_IMAGES}, 8, 8)", bytes(NUM_IMAGES * 64))
LABELS_NPY = npy(f"({NUM_IMAGES},)", LABELS.astype("<i8").tobytes(), "<i8")


def write_npz(file: Path, images: bytes = IMAGES_NPY, more: Sequence[Member] = ()) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (("images.npy", images), ("labels.npy", LABELS_NPY), *more):
            archive.writestr(name, content)
    return file


IN_PLACE_OF_DATA: dict[str, Make] = {
    "npz": lambda path, trap: write_bytes(path / "a.npz", trap),
    "array in an npz": lambda path, trap: write_npz(path / "a.npz", trap),
    "objects in an npz": lambda path, trap: write_npz(path / "a.npz", npy("(10,)", trap, "|O")),
    "parquet": lambda path, trap: write_bytes(path / "a.parquet", trap),
    "image in parquet": lambda path, trap: write_parquet(path / "a.parquet", last=trap),
    "tar": lambda path, trap: write_bytes(path / "a.tar", trap),
    "image in a tar": lambda path, trap: write_tar(
        path / "a.tar", [*samples(), ("x.png", trap), ("x.cls", b"0")]
    ),
    "cls in a tar": lambda path, trap: write_tar(
        path / "a.tar", [*samples(), ("x.png", RED), ("x.cls", trap)]
    ),
    "json in a tar": lambda path, trap: write_tar(
        path / "a.tar", [*samples(), ("x.png", RED), ("x.json", trap)]
    ),
    "image in a folder": lambda path, trap: write_folder(path / "a", {"a/x.png": trap}),
}


@pytest.mark.parametrize("make", IN_PLACE_OF_DATA.values(), ids=IN_PLACE_OF_DATA.keys())
def test_a_pickle_in_place_of_data_is_refused(make: Make, tmp_path: Path, trap: bytes) -> None:
    refuse(make(tmp_path, trap))


def test_an_array_of_objects_is_refused(tmp_path: Path, mark: Path) -> None:
    objects = np.array([Trap(mark)] * NUM_IMAGES, dtype=object)
    np.savez(tmp_path / "a.npz", images=objects, labels=LABELS)
    assert "without Python objects, got images in" in refuse(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros((10, 8, 8), np.uint8), y=objects)
    assert "without Python objects, got y in" in refuse(tmp_path / "b.npz")


def write_extension_types(file: Path, trap: bytes) -> Path:
    """Columns of the type that pyarrow unpickled before version 14.0.1 (CVE-2023-47248)."""
    name = "ARROW:extension:name", "ARROW:extension:metadata"
    metadata = dict(zip(name, (b"arrow.py_extension_type", trap), strict=True))
    return write_parquet(file, pa.schema([field.with_metadata(metadata) for field in SCHEMA]))


def write_metadata(file: Path, trap: bytes) -> Path:
    return write_parquet(file, SCHEMA.with_metadata({"pandas": trap, "huggingface": trap}))


BESIDE_DATA: dict[str, Make] = {
    "extension types": lambda path, trap: write_extension_types(path / "a.parquet", trap),
    "metadata of a schema": lambda path, trap: write_metadata(path / "a.parquet", trap),
    "other arrays": lambda path, trap: write_npz(
        path / "a.npz", more=[("x.npy", trap), ("y.pkl", trap)]
    ),
    "other members": lambda path, trap: write_tar(
        path / "a.tar", [*samples(), *((f"009.{name}", trap) for name in ("pkl", "pyd", "pth"))]
    ),
    "other files": lambda path, trap: write_folder(
        path / "a", {"a/x.pkl": trap, "a/x.pyd": trap, "b/x.pth": trap, "x.pickle": trap}
    ),
}


@pytest.mark.parametrize("make", BESIDE_DATA.values(), ids=BESIDE_DATA.keys())
def test_a_pickle_beside_data_is_left_alone(make: Make, tmp_path: Path, trap: bytes) -> None:
    assert read_all(make(tmp_path, trap)) == sorted(LABELS.tolist())


@pytest.mark.parametrize("backend", ["torch", "device", "dali"])
def test_an_image_is_never_a_program(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    # what PIL would take for Ghostscript
    write_bytes(tmp_path / "bin/gs", f"#!/bin/sh\ntouch {mark}\n".encode()).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    folder = write_folder(tmp_path / "a", {"a/x.png": postscript})
    assert "expected an image, got an unreadable one" in refuse(folder, backend=backend)


@every_trap
def test_a_pickle_in_place_of_a_checkpoint_is_refused(
    tmp_path: Path, mark: Path, make: Callable[[Path], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_bytes(tmp_path / "a.safetensors", make(mark))
    words = ["--model.checkpoint", str(file), "--output", str(tmp_path / "run")]
    line = last_line(capsys, train.main, *words)
    assert f"model.checkpoint: expected safetensors, got {file}" in line
    assert not (tmp_path / "run").exists()


EPOCH: dict[str, Any] = {
    "event": "epoch",
    "epoch": 1,
    "step": 1,
    "time_s": 1.0,
    "train_loss": 2.0,
    "train_robust_accuracy": 0.3,
    "clean_accuracy": 0.5,
    "robust_accuracy": 0.4,
    "learning_rate": 0.1,
    "epsilon": 0.1,
    "images_per_second": 100.0,
    "peak_memory_mib": 10.0,
    "skipped_steps": 0,
}
SELECTION = {
    "event": "selection",
    "epoch": 1,
    "step": 0,
    "time_s": 0.5,
    "criterion": "sharpness",
} | {
    "scores": {"blocks.0.attn.qkv": 1.0, "head": 0.5},
    "selected": ["head"],
    "cut": 0,
}
EVALUATION = {"event": "evaluation", "epoch": 1, "step": 1, "split": "test", "attack": "pgd-2"} | {
    "epsilon": 0.1,
    "accuracy": 0.4,
    "num_images": 100,
    "weights": "last",
}


def write_events(folder: Path, *events: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a very small model, as other commands read it."""
    folder = write_events(tmp_path_factory.mktemp("runs") / "run", EPOCH, SELECTION, EVALUATION)
    config = parse_config(["--model.arguments", "{depth: 1, embed_dim: 16, num_heads: 2}"])
    model = build_model(config.model, num_classes=10, image_size=8, num_channels=1)
    names = [str(number) for number in range(10)]
    save_config(config, folder)
    for file in ("model.safetensors", "best.safetensors"):
        save_weights(model.network.state_dict(), folder / file)
    content = timm_config(model, 8, 8, names)
    content["safer_fast"] = {"class_names": names, "num_channels": 1, "image_size": 8}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, for a test to write to."""
    return shutil.copytree(finished, tmp_path / "run")


def test_the_run_folder_of_these_tests_is_one(run: Path) -> None:
    assert load_run(run, device="cpu").image_size == load_run(run, "best", "cpu").image_size == 8
    assert write_report([run]) == run / "report.html"


@every_trap
@pytest.mark.parametrize("name", ["model.safetensors", "best.safetensors", "config.json"])
def test_a_pickle_in_a_run_folder_is_refused(
    run: Path, mark: Path, name: str, make: Callable[[Path], bytes]
) -> None:
    (run / name).write_bytes(make(mark))
    with pytest.raises(ValueError, match=rf"{run / name}.*") as caught:
        load_run(run, "best" if name.startswith("best") else "last", "cpu")
    assert "expected" in str(caught.value)


@every_trap
@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl", "config.json"])
def test_a_pickle_in_a_run_folder_is_not_reported(
    run: Path, mark: Path, name: str, make: Callable[[Path], bytes]
) -> None:
    (run / name).write_bytes(make(mark))
    with pytest.raises(ValueError, match=rf"^{run / name}\b.*: expected [^\n]*, got [^\n]*$"):
        write_report([run])


@pytest.mark.parametrize(
    ("main", "name"),
    [
        (evaluate.main, "model.safetensors"),
        (evaluate.main, "run.yaml"),
        (select.main, "model.safetensors"),
        (select.main, "config.json"),
        (report.main, "metrics.jsonl"),
    ],
)
def test_commands_refuse_a_pickle_in_one_line(
    run: Path, trap: bytes, main: Main, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_bytes(trap)
    assert str(run / name) in last_line(capsys, main, str(run))


@every_trap
def test_a_pickle_is_no_checkpoint_to_resume_from(
    tmp_path: Path, mark: Path, make: Callable[[Path], bytes]
) -> None:
    file = write_bytes(tmp_path / "step-00000001.safetensors", make(mark))
    with pytest.raises(ValueError, match=str(file)):
        read_checkpoint(file)


def test_other_files_in_a_run_folder_are_left_alone(run: Path, trap: bytes) -> None:
    for name in ("selection.json", "data.pkl", "pytorch_model.bin", "events.out.tfevents.1.a.1"):
        (run / name).write_bytes(trap)
    load_run(run, device="cpu")
    write_report([run])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@every_trap
def test_a_checkpoint_that_timm_would_read_is_not_executed(
    run: Path, mark: Path, make: Callable[[Path], bytes]
) -> None:
    file = write_bytes(run / "a.pth", make(mark))
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace("depth: 1", f"checkpoint_path: {file}"))
    with pytest.raises(ValueError, match=r"run.yaml: model.arguments: .*, got checkpoint_path"):
        load_run(run, device="cpu")


NO_RUNS: list[dict[str, Any]] = [
    {"safer_fast": None},
    {"safer_fast": [1]},
    {"safer_fast": {}},
    {"safer_fast": {"class_names": 10, "num_channels": 1, "image_size": 8}},
    {"safer_fast": {"class_names": ["a"], "num_channels": "1", "image_size": 8}},
    {"safer_fast": {"class_names": ["a"], "num_channels": 1, "image_size": [8, 8]}},
    {"pretrained_cfg": None},
    {"pretrained_cfg": {}},
    {"pretrained_cfg": {"mean": 1, "std": 1}},
    {"pretrained_cfg": {"mean": "abc", "std": "abc"}},
    {"pretrained_cfg": {"mean": [[0.5]], "std": [0.5]}},
    {"pretrained_cfg": {"mean": [0.5], "std": [0]}},
    {"pretrained_cfg": {"mean": [], "std": []}},
]


@pytest.mark.parametrize("wrong", NO_RUNS, ids=str)
def test_a_config_that_is_not_of_a_run_is_named(run: Path, wrong: dict[str, Any]) -> None:
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises(ValueError, match=rf"{file}\b.*, got"):
        load_run(run, device="cpu")


@pytest.mark.parametrize("text", ["[" * 100_000, f'{{"a": {"9" * 10_000}}}', "{}"])
def test_json_that_no_run_writes_is_named(run: Path, text: str) -> None:
    (run / "config.json").write_text(text)
    with pytest.raises(ValueError, match=str(run / "config.json")):
        load_run(run, device="cpu")
    (run / "metrics.jsonl").write_text(f"{text}\n" if text != "{}" else "[]\n")
    with pytest.raises(
        ValueError, match=f"{run / 'metrics.jsonl'}, line 1: expected a JSON object"
    ):
        write_report([run])


@pytest.mark.parametrize(
    "arguments",
    ["act_layer: os.system", "norm_layer: os.system", "depth: -1", "mlp_ratio: 10000000000"],
)
def test_networks_that_cannot_be_built_are_named(run: Path, arguments: str) -> None:
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(re.sub("depth: 1\n", f"{arguments}\n", text))
    with little_memory(), pytest.raises(ValueError, match=r"^model: vit_tiny_patch16_224 "):
        load_run(run, device="cpu")


def test_what_attention_remembers_may_be_nonsense(tmp_path: Path) -> None:
    file = write_bytes(tmp_path / "attention.json", b"[" * 100_000)
    assert remembered(file, attention.KernelTimings.parse) == {}


def test_a_pickle_in_place_of_what_attention_remembers_is_measured_anew(
    tmp_path: Path, trap: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SECONDS", 0)
    file = write_bytes(tmp_path / "attention.json", trap)
    shape = attention.Shape(windows=1, heads=1, tokens=4, width=8)
    attention.pin_attention("auto", shape, 1, torch.float32, torch.device("cpu"), file)
    assert len(json.loads(file.read_text())) == 1


@pytest.fixture
def stranger(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module where Python finds it, which leaves the mark when it is imported."""
    leave_mark = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (tmp_path / "stranger.py").write_text(leave_mark + "class Gadget: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)


GADGET = "{class_path: stranger.Gadget, init_args: {}}"
PROGRAMS = [
    "epochs: !!python/object/apply:os.system ['touch MARK']",
    "epochs: !!python/object/new:stranger.Gadget []",
    "model: {arguments: {depth: !!python/name:stranger.Gadget }}",
    "model: {arguments: {depth: !!python/module:stranger }}",
    "model: {name: \"!!python/object/apply:os.system ['touch MARK']\"}",
    f"model: {{arguments: {{depth: {GADGET}}}}}",
    f"model: {{arguments: {{depth: [{GADGET}]}}}}",
    f"model: {{arguments: {{depth: '{GADGET}'}}}}",
    f"model: {GADGET}",
    f"optim: {{betas: {GADGET}}}",
    f"selection: {{layers: {GADGET}}}",
    GADGET,
]


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize("text", PROGRAMS)
def test_a_configuration_is_never_a_program(run: Path, mark: Path, text: str) -> None:
    text = text.replace("MARK", str(mark))
    (run / "run.yaml").write_text(f"{text}\n")
    reads: list[Callable[[], object]] = [
        lambda: parse_config(["--config", str(run / "run.yaml")]),
        lambda: load_run(run, device="cpu"),
        lambda: read_runs([run]),
    ]
    for read in reads:
        with suppress(ValueError):  # to some of them it is a text like any other
            read()


def test_a_configuration_names_no_other_file(tmp_path: Path) -> None:
    other = write_bytes(tmp_path / "other.yaml", b"name: vit_small_patch16_224\nepochs: 1\n")
    file = tmp_path / "a.yaml"
    for text in ("config: {}", "model: {}", "config: [{}]", "model: [{}]"):
        file.write_text(text.format(other))
        with pytest.raises(ValueError, match=r"^--config: (unknown setting|expected names with)"):
            parse_config(["--config", str(file)])


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.hub.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
}
FORBIDDEN_METHODS = {"extract", "extractall", "unpack_archive"}
FORBIDDEN_FLAGS = {"allow_pickle", "shell", "trust_remote_code"}


def dangers(source: str) -> list[str]:
    """Call in a source that execute what they read, or write where a file says, or could."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _is_dangerous(node):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [start + alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
            found += [name for name in names if name in FORBIDDEN_CALLS]
    return found


def _is_dangerous(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    flags = {word.arg: ast.unparse(word.value) for word in call.keywords}
    return (
        name in FORBIDDEN_CALLS
        or name.split(".")[-1] in FORBIDDEN_METHODS
        or (name == "torch.load" and "weights_only" not in flags)
        or (name in ("np.load", "numpy.load") and "allow_pickle" not in flags)
        or any(flags.get(flag, "False") != "False" for flag in FORBIDDEN_FLAGS)
        or flags.get("weights_only", "True") != "True"
    )


FOLDERS = [ROOT / name for name in ("safer_fast", "kernels", "bench")]
SOURCES = sorted(file for folder in FOLDERS for file in folder.rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_of_ours_executes_what_it_reads(file: Path) -> None:
    assert dangers(file.read_text()) == []


def test_our_sources_are_looked_at() -> None:
    assert {"attack.py", "tar_index.py", "cuda.py", "table.py"} <= {file.name for file in SOURCES}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from os import system",
        "from yaml import unsafe_load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=is_safe)",
        "load_checkpoint(model, file, weights_only=False)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "numpy.load(file, mmap_mode='r')",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.full_load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(words, shell=True)",
        "subprocess.run(words, shell=is_shell)",
        "os.system(words)",
        "archive.extractall(folder)",
        "tarfile.open(file).extract(member, folder)",
        "shutil.unpack_archive(file)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_what_is_dangerous_is_found(source: str) -> None:
    assert dangers(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(text)",
        "torch.compile(model)",
        "yaml.safe_load(text)",
        "np.load(file, allow_pickle=False)",
        "torch.load(file, weights_only=True)",
    ],
)
def test_what_is_safe_is_left_alone(source: str) -> None:
    assert dangers(source) == []


def tree(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for data; the test fails if anything is written elsewhere around it."""
    folder = tmp_path / "home/work/data"
    folder.mkdir(parents=True)
    write_bytes(tmp_path / "secret.png", RED)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder.parent)
    before = tree(tmp_path)
    yield folder
    assert {name for name in tree(tmp_path) if not name.startswith(str(folder))} < before


@pytest.mark.parametrize(
    "place", ["../../../outside", "ROOT/outside", "~/outside", "a/../../outside", "./outside"]
)
def test_names_in_an_archive_lead_nowhere(inside: Path, place: str) -> None:
    name = place.replace("ROOT", str(inside.parents[2]))
    write_tar(inside / "a.tar", [*samples(9), (f"{name}.png", RED), (f"{name}.cls", b"1")])
    write_npz(inside / "a.npz", more=[(f"{name}.npy", IMAGES_NPY), (f"{name}.png", RED)])
    for file in (inside / "a.tar", inside / "a.npz"):
        assert read_all(file) == sorted(LABELS.tolist())
    assert tree(inside) == {str(inside / "a.tar"), str(inside / "a.npz")}


KINDS = {
    "symbolic link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "pipe": tarfile.FIFOTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "folder": tarfile.DIRTYPE,
}


def header(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_what_is_no_file_in_a_tar_is_no_image(inside: Path, kind: bytes) -> None:
    file = inside / "a.tar"
    secret = str(inside.parents[2] / "secret.png")
    for target in (secret, "../../../secret.png", "/dev/zero", "x.png"):
        write_tar(file, [*samples(), header("x.png", kind, target), ("x.cls", b"0")])
        assert "expected one image in each sample, got none: sample x of" in refuse(file)
        assert len(read_all(file, bad_images="skip", backend="device")) == NUM_IMAGES


def test_links_to_images_and_folders_are_followed(tmp_path: Path) -> None:
    folder, elsewhere = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    (folder / "a/link.png").symlink_to(elsewhere / "a/0.png")
    (folder / "a/more").symlink_to(elsewhere / "a")
    (folder / "c").symlink_to(elsewhere / "b")
    assert read_all(folder) == [0] * 11 + [1] * 5 + [2] * 5
    (tmp_path / "link").symlink_to(folder)
    assert len(read_all(tmp_path / "link")) == 21


def test_classes_and_files_are_those_of_torchvision(tmp_path: Path) -> None:
    names = [
        "a b/c/1.JPG",
        "a b/c-d/2.jpeg",
        "a b/c/e/3.webp",
        "a b/10.png",
        "a b/9.png",
        "A/x.tif",
    ]
    names += ["\u00e9/x.y.Png", "b/note.txt", "b/z.pgm"]
    folder = write_folder(tmp_path / "a", dict.fromkeys(names, RED))
    (folder / "b/link.png").symlink_to(folder / "A/x.tif")
    (folder / "b/c").symlink_to(folder / "a b/c")
    (folder / "c").symlink_to(folder / "b")
    expected, source = ImageFolder(str(folder)), FolderSource(folder, "data.path", SkippedFiles())
    found = [source.describe(row) for row in range(len(source))]
    assert list(zip(found, source.labels.tolist(), strict=True)) == expected.samples
    assert source.class_names == expected.classes
    assert source.labels.dtype == np.int64
    # where torchvision sees images in what systems hide, and none without an ending
    write_folder(folder, dict.fromkeys(["b/.png", "b/.hidden/1.bmp", ".d/1.png", "b/png"], RED))
    again = FolderSource(folder, "data.path", SkippedFiles())
    assert set(map(again.describe, range(len(again)))) - set(found) == {
        str(folder / "b/png"),
        str(folder / "c/png"),
    }


@pytest.mark.timeout(30)
def test_links_in_circles_are_followed_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    for number in range(4):
        (folder / f"a/circle{number}").symlink_to(folder / "a")
        (folder / f"a/circle{number + 4}").symlink_to(".")
    assert len(read_all(folder)) == NUM_IMAGES
    for number in range(4):
        (folder / f"b/up{number}").symlink_to("..")
    assert read_all(folder) == [0] * 5 + [1] * 10


@pytest.mark.parametrize("target", ["gone.png", "x.png", "/nowhere/x.png"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str) -> None:
    folder = write_folder(tmp_path / "a")
    (folder / "a/x.png").symlink_to(target)
    assert f"{folder}/a/x.png" in refuse(folder)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name", ["a/a/x.png", "a.tar", "a.parquet", "a.npz", "shards/a.tar", "shards/a.parquet"]
)
def test_pipes_and_devices_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    write_folder(tmp_path / "a")
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    path = tmp_path / name.split("/")[0]
    assert str(file) in refuse(path)


@pytest.mark.timeout(30)
def test_class_names_come_from_a_file_only(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", samples())
    (tmp_path / "classnames.txt").symlink_to("/dev/zero")
    assert len(read_all(file)) == NUM_IMAGES


def png(width: int, height: int, content: bytes) -> bytes:
    """A PNG with any size in its head."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_png_of_these_tests_is_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {"a/x.png": png(8, 8, bytes(8 * 25))})
    assert len(read_all(folder)) == NUM_IMAGES + 1


@pytest.mark.parametrize("backend", ["torch", "device", "dali"])
@pytest.mark.parametrize("edge", [2**31 - 1, 100_000, 13_000])
def test_an_image_that_claims_to_be_gigantic_is_refused(
    tmp_path: Path, edge: int, backend: str
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    folder = write_folder(tmp_path / "a", {"a/x.png": png(edge, edge, bytes(10_000))})
    with little_memory():
        assert "a/x.png" in refuse(folder, backend=backend)


ARRAYS = {
    "more than any memory": npy(f"({2**40}, 8, 8)", bytes(640)),
    "more than this memory": npy(f"({2**26}, 8, 8)", bytes(640)),
    "more than 64 bits": npy(f"({2**70}, 8, 8)", bytes(640)),
    "64 bits of it zeros": npy(f"({2**32}, {2**32}, 8)", bytes(640)),
    "negative": npy("(-10, 8, 8)", bytes(640)),
    "true": npy("(True, 8, 8)", bytes(640)),
    "text": npy("('10', 8, 8)", bytes(640)),
    "no end": npy('(10, 8, """)', bytes(640)),
    "no array": b"images",
    "nothing": b"",
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
def test_an_array_that_claims_another_size_is_refused(tmp_path: Path, array: bytes) -> None:
    file = write_npz(tmp_path / "a.npz", array)
    with little_memory():
        assert "expected a readable array without Python objects, got images in" in refuse(file)


def test_arrays_beyond_the_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_npz(tmp_path / "a.npz", npy("(10, 1024, 1024)", bytes(10 * 2**20)))
    other = write_npz(tmp_path / "b.npz", more=[("other.npy", bytes(20 * 2**20))])
    assert file.stat().st_size < 2**17
    monkeypatch.setattr(arrays, "physical_memory", lambda: 9 * 2**20)
    assert "expected arrays that fit in memory (0.0 GiB), got 0.0 GiB in" in refuse(file)
    assert len(read_all(other)) == NUM_IMAGES
    monkeypatch.setattr(arrays, "physical_memory", lambda: 11 * 2**20)
    assert len(read_all(file)) == NUM_IMAGES


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [10**9, 2**62, 2**70, -512])
def test_a_member_that_claims_another_size_is_refused(
    tmp_path: Path, size: int, kind: bytes
) -> None:
    file = write_tar(tmp_path / "a.tar", samples())
    head = header("x.png", kind, size=size).tobuf(tarfile.GNU_FORMAT)
    file.write_bytes(head + file.read_bytes())
    with little_memory():
        refuse(file)


def safetensors(length: int, head: bytes) -> bytes:
    return struct.pack("<Q", length) + head


GIGANTIC = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'
HEADS = {
    "beyond 63 bits": safetensors(2**63, b"{}"),
    "beyond the file": safetensors(2**40, b"{}"),
    "as long as is allowed": safetensors(99_999_999, b"{}"),
    "none": b"",
    "deep": safetensors(200_000, b"[" * 200_000),
    "of a gigantic tensor": safetensors(len(GIGANTIC), GIGANTIC + bytes(4)),
}


@pytest.mark.parametrize("content", HEADS.values(), ids=HEADS.keys())
def test_weights_with_an_absurd_header_are_refused(tmp_path: Path, content: bytes) -> None:
    file = write_bytes(tmp_path / "a.safetensors", content)
    with little_memory(), pytest.raises(ValueError, match=f"expected safetensors, got {file}"):
        load_tensors(file)


@pytest.mark.parametrize("length", [0, 1, 2**16, 2**31, 2**32 - 1])
def test_parquet_with_a_footer_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    file = write_parquet(tmp_path / "a.parquet")
    file.write_bytes(file.read_bytes()[:-8] + struct.pack("<I", length) + b"PAR1")
    with little_memory():
        assert "expected a readable parquet file" in refuse(file)


@pytest.mark.parametrize(("write", "count"), [(write_npz, 150), (write_parquet, 60)])
def test_a_file_with_other_bytes_here_and_there_is_read_or_refused(
    tmp_path: Path, write: Callable[[Path], Path], count: int
) -> None:
    file, rng = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}"), random.Random(0)
    whole = file.read_bytes()
    for _ in range(count):
        content = bytearray(whole)
        for at in rng.sample(range(len(whole)), rng.randint(1, 5)):
            content[at] = rng.randrange(256)
        file.write_bytes(content)
        message = None
        with little_memory():
            try:
                read_all(file)
            except ValueError as error:
                message = str(error)
        assert message is None or re.match(ONE_LINE, message), message


def test_deep_metadata_of_parquet_names_no_classes(tmp_path: Path) -> None:
    deep = SCHEMA.with_metadata({"huggingface": "[" * 100_000})
    assert len(read_all(write_parquet(tmp_path / "a.parquet", deep))) == NUM_IMAGES


def laughs() -> str:
    """A list of 9^11 words: every element stands for nine times the one before."""
    lists = [f"&a{level} [{','.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    return f"[{','.join(['&a0 [laugh]', *lists])}]"


ENDLESS_YAML = {
    "list": laughs(),
    "unknown setting": f"x: {laughs()}",
    "number": f"epochs: {laughs()}",
    "argument": f"model: {{arguments: {{depth: {laughs()}}}}}",
    "text": f"epochs: '{laughs()}'",
    "text of a group": f"model: '{{arguments: {laughs()}}}'",
    "text of an argument": f"model: {{arguments: {{depth: '{laughs()}'}}}}",
    "circle": "model: {arguments: &a {depth: *a}}",
    "deep": f"epochs: {'[' * 100_000}",
    "deep text": f"epochs: '{'[' * 100_000}'",
    "fairly deep": f"model: {{arguments: {{depth: {'[' * 300}{']' * 300}}}}}",
    "many digits": f"epochs: {'9' * 10_000}",
    "no number": "epochs: !!int ''",
    "no time": "epochs: !!timestamp x",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("text", ENDLESS_YAML.values(), ids=ENDLESS_YAML.keys())
def test_yaml_that_stands_for_more_than_it_says_is_refused(
    run: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_bytes(run / "run.yaml", text.encode())
    with little_memory():
        assert f"--config: expected YAML in {file}" in last_line(
            capsys, train.main, "--config", str(file)
        )
        for main in (evaluate.main, report.main):
            assert str(file) in last_line(capsys, main, str(run))


def test_yaml_as_people_write_it_is_read(tmp_path: Path) -> None:
    text = "# mine\nselection:\n  layers: '*.attn.*'\nmodel: {arguments: {depth: 2}}\nseed: 3\n"
    config = parse_config(["--config", str(write_bytes(tmp_path / "a.yaml", text.encode()))])
    assert (config.selection.layers, config.seed) == (["*.attn.*"], 3)
    assert config.model.arguments == load_yaml(text)["model"]["arguments"] == {"depth": 2}


def test_a_page_is_written_in_place_of_a_link(run: Path, tmp_path: Path) -> None:
    precious = write_bytes(tmp_path / "precious", b"mine")
    (run / "report.html").symlink_to(precious)
    page = write_report([run])
    assert precious.read_bytes() == b"mine"
    assert not page.is_symlink()


SCRIPT = "document.documentElement.id='sprung'"
TEXTS = {
    "script": f"<script>{SCRIPT}</script>",
    "end of script": f"</script><script>{SCRIPT}</script>",
    "attribute": f'"><img src=x onerror="{SCRIPT}">',
    "single quotes": f"'><img src=x onerror='{SCRIPT}'>",
    "end of title": f"</title></style></svg><svg onload={SCRIPT}>",
    "end of comment": f"--><svg onload={SCRIPT}>",
    "end of CDATA": f"]]><script>{SCRIPT}</script>",
    "address": f"javascript:{SCRIPT}",
    "template": "{{ 7 * 191 }}{% for x in y %}",
    "formula": r"$\frac{$ \q \1 \g<0> %s {0} &lt;",
    "reversed": "\u202egnp.exe \u2066\u2067\u200f\u061c",
    "terminal": "\x1b[2J\x07\x9b31m\x7f",
    "half a letter": "\ud800",
    "letters that few fonts have": "\U0001f642 \u4e2d\u6587",
}
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def write_run_of(text: str, folder: Path) -> Path:
    """A run folder with the text wherever there is room for one."""
    scores = {text: 1.0, f"blocks.0.{text}": 0.5, f"x.1.{text}": 0.2}
    facts = {"name": text, text: {text: [text, f"{text} {text}"]}}
    choice = {"criterion": text, "scores": scores, "selected": list(scores), "cut": text}
    write_events(
        folder,
        {"event": "run", "epoch": 0, "step": 0, "time_s": 0} | facts,
        EPOCH,
        SELECTION | choice,
        EVALUATION | {"weights": text, "split": text, "attack": text},
    )
    settings = {name: {text: text, "criterion": text} for name in ("optim", "selection", text)}
    settings["attack"] = dict.fromkeys(("norm", "epsilon", "steps"), text)
    (folder / "run.yaml").write_text(json.dumps({"model": facts, "epochs": text} | settings))
    (folder / "config.json").write_text(json.dumps({"architecture": text, "safer_fast": facts}))
    return folder


def folder_name(text: str) -> str:
    """The text as far as it can name a folder."""
    return os.fsdecode(text.replace("/", "|").encode("utf-8", "replace"))


class Page(HTMLParser):
    """A page as a browser parses it: elements, their attributes, and texts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: set[tuple[str, str]] = set()
        self.texts: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements |= {(tag, "")} | {(tag, name) for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def plain_elements(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """The elements of the page about two runs without such texts."""
    folders = [write_run_of("plain", tmp_path_factory.mktemp(name) / "plain") for name in "ab"]
    page = write_report(folders, folders[0] / "page.html")
    return Page(page.read_text()).elements


MARKUP = " ".join(text for text in TEXTS.values() if SCRIPT in text)
TOGETHER = {"markup": MARKUP} | {name: text for name, text in TEXTS.items() if SCRIPT not in text}


@pytest.mark.parametrize("text", TOGETHER.values(), ids=TOGETHER.keys())
def test_texts_of_a_run_are_texts_on_its_page(
    tmp_path: Path, text: str, plain_elements: set[tuple[str, str]]
) -> None:
    name = folder_name(text)[:80]
    folders = [write_run_of(text, tmp_path / own) for own in (name, "b")]
    source = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.elements == plain_elements
    assert HIDDEN.search(source) is None
    if text.isprintable():
        assert "".join(page.texts).count(text) > 20
        assert "".join(page.texts).count(name) > 10


def test_a_browser_runs_nothing_of_a_run(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    folder = write_run_of(MARKUP, tmp_path / "run" / folder_name(TEXTS["attribute"]))
    page = write_report([folder], tmp_path / "page.html")
    assert "sprung" not in first_tags(browser, page, tmp_path)
    source = page.read_text(encoding="utf-8").replace("&lt;", "<").replace("&gt;", ">")
    page.write_text(source.replace("&#34;", '"'), encoding="utf-8")
    assert "sprung" in first_tags(browser, page, tmp_path)


def first_tags(browser: str, page: Path, folder: Path) -> str:
    """The tags before the head of the page in a browser, after its scripts have run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    options += ["--disable-background-networking", f"--user-data-dir={folder / 'browser'}"]
    words = [browser, *options, page.as_uri()]
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    return result.stdout.split("<head>")[0]


UNUSABLE_EVENTS: list[dict[str, Any]] = [
    {"event": "epoch"},
    {"event": "selection"},
    EPOCH | {"epoch": "1"},
    EPOCH | {"epoch": [1]},
    EPOCH | {"epoch": 10**30},
    EPOCH | {"train_loss": "high"},
    EPOCH | {"robust_accuracy": [0.5]},
    EPOCH | {"epsilon": {"a": 1}},
    EPOCH | {"images_per_second": True},
    EPOCH | {"time_s": "1"},
    SELECTION | {"scores": ["head"]},
    SELECTION | {"scores": {"head": "high"}},
    SELECTION | {"selected": "head"},
    SELECTION | {"selected": [["head"]]},
    EVALUATION | {"accuracy": "high"},
    EVALUATION | {"accuracy": -1},
    EVALUATION | {"num_images": "many"},
    {"event": "run", "deep": json.loads("[" * 30 + "]" * 30)},
]


@pytest.mark.parametrize("event", UNUSABLE_EVENTS, ids=range(len(UNUSABLE_EVENTS)))
def test_events_that_no_run_writes_are_named(tmp_path: Path, event: dict[str, Any]) -> None:
    write_events(tmp_path, EPOCH, event)
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/metrics.jsonl: expected [^\n]*, got [^\n]*$"
    ):
        write_report([tmp_path])


@pytest.mark.parametrize("number", ["1e999", "9" * 400, "1e300"])
def test_numbers_beyond_all_measure_are_not_drawn(tmp_path: Path, number: str) -> None:
    for event in (EPOCH, SELECTION, EVALUATION):
        write_events(tmp_path, EPOCH, event)
        log = tmp_path / "metrics.jsonl"
        log.write_text(re.sub(r"0\.[0-9]+", number, log.read_text()))
        assert "</html>" in write_report([tmp_path]).read_text()


@pytest.mark.parametrize(
    "text",
    [
        "attack: {epsilon: far, steps: 3}",
        "attack: {epsilon: [1], steps: [2]}",
        "attack: {epsilon: .nan, steps: .inf}",
        "attack: 3",
        "selection: {criterion: [a], fraction: some}\nsam: {rho: {a: b}}",
        "selection: [a]\nepochs: {a: b}\n3: 4\n",
    ],
)
def test_settings_that_no_run_has_are_shown_as_they_are(tmp_path: Path, text: str) -> None:
    write_events(tmp_path, {"event": "epoch", "epoch": 1, "epsilon": 0.1}, EVALUATION)
    (tmp_path / "run.yaml").write_text(text)
    assert "</html>" in write_report([tmp_path]).read_text()


NASTY = "\x1b[2J\x1b]0;title\x07\n\r\x9b31m\u202e\u2066"


def test_an_error_is_one_line_without_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(f"a: expected b, got {NASTY}c d\u00e9\u4e2d\U0001f642 \udcff")
    line = capsys.readouterr().err
    assert line == "error: a: expected b, got ?[2J?]0;title? ?31m??c d\u00e9\u4e2d\U0001f642 ?\n"


@pytest.mark.parametrize("where", ["file", "folder", "setting", "member", "column"])
def test_names_in_errors_do_not_steer_the_terminal(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty, words = f"x{NASTY}y", ["--model.patch_size", "4", "--output", str(tmp_path / "run")]
    path = write_folder(tmp_path / "a")
    if where == "file":
        write_bytes(path / "a" / f"{nasty}.png", b"no image")
    elif where == "folder":
        write_bytes(path / nasty / "x.png", RED)
    elif where == "member":
        path = write_tar(tmp_path / "a.tar", [*samples(), (f"{nasty}.cls", b"0")])
    elif where == "column":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({nasty: [1]}), path)
    else:
        file = write_bytes(tmp_path / "a.yaml", json.dumps({nasty: nasty}).encode())
        words += ["--config", str(file)]
    line = last_line(capsys, train.main, "--data.path", str(path), *words)
    assert "[2J" in line


def test_names_in_reports_do_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "a", {f"a/x{NASTY}y.png": b"no image"})
    assert len(read_all(folder, bad_images="skip", backend="device")) == NUM_IMAGES
    assert capsys.readouterr().out[:-1].isprintable()


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "a\x9bb", "a\udcffb"])
def test_class_names_are_fit_for_terminals_and_files(tmp_path: Path, name: str) -> None:
    message = "data.path: expected class names without control characters, got 'a"
    folder = write_folder(tmp_path / "a")
    write_bytes(folder / name / "x.png", RED)
    assert message in refuse(folder)
    if "\n" not in name and name.isascii():
        write_bytes(tmp_path / "classnames.txt", f"{name}\nb\n".encode())
        assert message in refuse(write_tar(tmp_path / "a.tar", samples()))


def test_class_names_of_any_language_are_taken(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "a", {"\u0645\u06cc\u200c\u0631/x.png": RED, "\u4e2d \U0001f642/x.png": RED}
    )
    assert set(read_all(folder)) == {0, 1, 2, 3}
