"""Checkpoints survive kills, full disks and flipped bits, and training never waits for them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safer_fast.runs.checkpoints.file import Checkpoint, read_checkpoint
from safer_fast.runs.checkpoints.folder import CheckpointFolder

STATE: dict[str, Any] = {"epoch": 3, "best": 0.1 + 0.2, "layers": ["head"], "none": None}
WEIGHTS = {"head.weight": torch.arange(12.0).view(3, 4), "step": torch.tensor(7)}

Make = Callable[..., CheckpointFolder]


@pytest.fixture
def reports() -> list[str]:
    """The lines that were reported."""
    return []


@pytest.fixture
def make(tmp_path: Path, reports: list[str]) -> Iterator[Make]:
    """Folders in the test's own folder; each of them is closed in the end."""
    made: list[CheckpointFolder] = []

    def make(**settings: Any) -> CheckpointFolder:
        defaults: dict[str, Any] = {"keep": 2, "report": reports.append}
        made.append(CheckpointFolder(tmp_path / "checkpoints", **defaults | settings))
        return made[-1]

    yield make
    for folder in made:
        folder.close()


def write(folder: CheckpointFolder, *steps: int, needs: Sequence[str] = ()) -> None:
    """The folder has checkpoints whose weights are their step."""
    for step in steps:
        folder.save(step, {"at": step}, {"w": torch.full((50,), step)}, needs=needs)
    assert folder.wait(30)


def until(event: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        assert event.wait(30)

    return wait


def newest(
    folder: CheckpointFolder, refuse: Callable[[Checkpoint], str | None] | None = None
) -> Checkpoint:
    checkpoint = folder.latest(refuse)
    assert checkpoint is not None
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, at: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at, 2 if at < 0 else 0)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ mask]))


def plant(path: Path, header: bytes, data: bytes = b"") -> str:
    """Write a file with a valid digest, as an attacker could; return the digest."""
    start = struct.pack("<Q", len(header)) + header
    digest = hashlib.sha256(start + data).hexdigest()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(start.replace(b"0" * 64, digest.encode(), 1) + data)
    return digest


def header(tensors: Mapping[str, Any] | None = None, **metadata: str) -> bytes:
    content = {"sha256": "0" * 64, "format": "pt", "step": "5", "state": "{}", "needs": "{}"}
    entries = {"__metadata__": content | metadata} | dict(tensors or {})
    return json.dumps(entries, separators=(",", ":")).encode()


def program(text: str, *arguments: object, within: Sequence[str] = ()) -> list[Any]:
    """Run code in a new Python process; return its output, parsed from JSON lines."""
    result = subprocess.run(
        [*within, sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_and_shape_comes_back_bit_for_bit(make: Make) -> None:
    random = torch.randint(0, 256, (6, 64), dtype=torch.uint8)  # NaN of every kind among them
    dtypes = ["float32", "bfloat16", "float64", "float16", "int64", "int32", "int16", "int8"]
    tensors = {f"random.{name}": random.view(getattr(torch, name)) for name in dtypes}
    nan = torch.tensor([0x7FC12345, 0x7F800001, -1], dtype=torch.int32)
    tensors |= {
        "nan": nan.view(torch.float32),
        "uint8": random,
        "bool": random > 100,
        "scalar": torch.tensor(-0.0),
        "scalar.bool": torch.tensor(True),
        "empty": torch.empty(0, dtype=torch.bfloat16),
        "empty.3d": torch.empty(2, 0, 3, dtype=torch.int64),
        "a single byte": torch.tensor([1], dtype=torch.uint8),
        "transposed": torch.randn(5, 7, dtype=torch.float64).T,
        "every other": torch.arange(20)[::2],
        "expanded": torch.tensor([3.0]).expand(4, 2),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "größe/\"'\\\n": torch.ones(1),
    }
    tensors["same as uint8"] = tensors["uint8"]
    folder = make()
    folder.save(12, STATE, tensors)
    folder.close()
    checkpoint = newest(make())
    assert (checkpoint.step, checkpoint.state, checkpoint.needs) == (12, STATE, {})
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        got = checkpoint.tensors[name]
        assert (got.dtype, got.shape, got.device.type) == (tensor.dtype, tensor.shape, "cpu"), name
        assert bits(got) == bits(tensor.detach()), name
    assert checkpoint.path.name == "step-00000012.safetensors"
    assert folder.last == checkpoint.path


def test_the_library_reads_the_files_too(make: Make, tmp_path: Path) -> None:
    tensors = WEIGHTS | {"a": torch.ones(1, dtype=torch.bool), "z": torch.ones(3).double()}
    folder = make()
    folder.save(1, STATE, tensors)
    folder.save_companion("best-1", tensors)
    folder.close()
    for name in ("step-00000001", "best-1"):
        loaded = load_file(tmp_path / "checkpoints" / f"{name}.safetensors")
        assert set(loaded) == set(tensors)
        assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
        content = (tmp_path / "checkpoints" / f"{name}.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        assert length % 8 == 0
        for key, tensor in tensors.items():  # none lies across the words of memory
            assert entries[key]["data_offsets"][0] % tensor.element_size() == 0


def test_what_was_read_does_not_change_with_the_file(make: Make) -> None:
    folder = make()
    write(folder, 7)
    checkpoint = newest(folder)
    size = checkpoint.path.stat().st_size
    checkpoint.path.write_bytes(bytes(size))
    assert checkpoint.tensors["w"].eq(7).all()


def test_a_checkpoint_without_tensors_and_odd_states_come_back(make: Make) -> None:
    state = {"text": 'ä "\\ \ud83d', "nan": float("inf"), "zeros": "0" * 64, "deep": [[{"a": []}]]}
    folder = make()
    folder.save(0, state, {})
    folder.save(123456789, state, {})
    folder.close()
    assert read_checkpoint(newest(make()).path).state == state


def test_the_state_is_that_of_the_time_of_handing_over(make: Make) -> None:
    folder, state, may_go_on = make(), {"list": [1]}, threading.Event()
    folder.save(1, state, {}, before=until(may_go_on))
    state["list"].append(2)
    may_go_on.set()
    folder.wait()
    assert newest(folder).state == {"list": [1]}


def test_a_state_that_json_does_not_know_is_refused_at_once(make: Make) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        make().save(1, {"a": {1, 2}}, {})


def test_there_is_nothing_where_nothing_was_written(make: Make, tmp_path: Path) -> None:
    folder = make()
    assert folder.latest() is None
    assert folder.last is None
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-1.safetensors").write_text("not a name of ours")
    assert folder.latest() is None


def test_any_flipped_byte_is_noticed(make: Make, tmp_path: Path) -> None:
    folder = make()
    folder.save_companion("best-1", {"w": torch.randn(3)})
    folder.save(5, {"a": "text"}, {"w": torch.randn(9), "b": torch.ones(3, dtype=torch.bool)})
    folder.close()
    for name in ("step-00000005", "best-1"):
        path = tmp_path / "checkpoints" / f"{name}.safetensors"
        content = path.read_bytes()
        for at in range(len(content)):
            flip(path, at, 1 << at % 8)
            with pytest.raises(ValueError, match=rf"{name}\.safetensors: "):
                read_checkpoint(path) if name[0] == "s" else folder.read_companion(name)
            flip(path, at, 1 << at % 8)
        assert path.read_bytes() == content
    assert read_checkpoint(tmp_path / "checkpoints" / "step-00000005.safetensors").step == 5
    assert list(folder.read_companion("best-1")) == ["w"]


def test_spaces_that_become_other_spaces_are_noticed(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-00000001.safetensors"
    for text in ("", "a", "aa", "aaa"):  # one of them needs a padding
        folder = make()
        folder.save(1, {"a": text}, WEIGHTS)
        folder.close()
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        if content[7 + length] == ord(" "):
            break
    flip(path, 7 + length, ord(" ") ^ ord("\n"))
    assert set(load_file(path)) == set(WEIGHTS)  # the library does not mind
    with pytest.raises(ValueError, match="its contents are not those that were written"):
        read_checkpoint(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 34, 35, 98, 99, 200, -8, -1])
def test_a_file_of_another_length_is_noticed(make: Make, size: int) -> None:
    folder = make()
    write(folder, 5)
    path = folder.last
    assert path is not None
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"step-00000005\.safetensors: it|step-0.*: its contents"):
        read_checkpoint(path)
    path.write_bytes(content + b"\0" * (size % 7 + 1))
    with pytest.raises(ValueError, match="its contents are not those that were written"):
        read_checkpoint(path)


def test_the_one_before_a_damaged_one_is_used_and_both_are_named(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    write(make(keep=3), 10, 20, 30)
    last, middle = (tmp_path / "checkpoints" / f"step-000000{n}.safetensors" for n in (30, 20))
    flip(last, -1)
    flip(middle, 200)
    folder = make(keep=2)
    checkpoint = newest(folder)
    assert checkpoint.step == 10
    assert checkpoint.tensors["w"].eq(10).all()
    reason = "its contents are not those that were written; the one before is used"
    assert reports == [f"damaged checkpoint {path}: {reason}" for path in (last, middle)]
    left = ["step-00000010.safetensors", f"{middle.name}.damaged", f"{last.name}.damaged"]
    assert names(last.parent) == left
    write(folder, 11)  # the damaged ones are not among the newest two
    assert names(last.parent) == [left[0], "step-00000011.safetensors", *left[1:]]
    assert newest(make()).step == 11
    assert len(reports) == 2


def test_where_all_are_damaged_the_run_is_not_taken_for_a_new_one(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    write(make(), 10, 20)
    before = names(tmp_path / "checkpoints")
    for name in before:
        (tmp_path / "checkpoints" / name).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint can be used; the newest: ") as caught:
            make().latest()
        newest = f"{tmp_path / 'checkpoints' / before[-1]}: it does not begin like"
        assert str(caught.value).startswith(f"{tmp_path / 'checkpoints'}: no checkpoint")
        assert newest in str(caught.value)
        assert "\n" not in str(caught.value)
    assert names(tmp_path / "checkpoints") == before
    assert len(reports) == 4
    assert "the one before" not in reports[1]


def test_one_that_is_refused_is_passed_over_with_the_reason(make: Make, reports: list[str]) -> None:
    write(make(), 10, 20)

    def refuse(checkpoint: Checkpoint) -> str | None:
        return "of another model" if checkpoint.state["at"] == 20 else None

    folder = make()
    assert newest(folder, refuse).step == 10
    assert folder.last is not None
    assert folder.last.name == "step-00000010.safetensors"
    (line,) = reports
    assert line.endswith("step-00000020.safetensors: of another model; the one before is used")
    with pytest.raises(ValueError, match=r"the newest: .*00000010\.safetensors: never$"):
        make().latest(lambda _: "never")


def test_a_copy_under_the_name_of_another_step_is_noticed(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    write(make(), 10)
    path = tmp_path / "checkpoints" / "step-00000010.safetensors"
    shutil.copy(path, path.with_name("step-00000011.safetensors"))
    assert newest(make()).path == path
    assert "step-00000011.safetensors: it is that of step 10; the one before" in reports[0]


def test_readers_that_are_no_writers_rename_nothing(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    write(make(), 10, 20)
    before = names(tmp_path / "checkpoints")
    flip(tmp_path / "checkpoints" / before[-1], 300)
    reader = make(is_writer=False)
    assert newest(reader).step == 10
    assert names(tmp_path / "checkpoints") == before
    assert len(reports) == 1
    with pytest.raises(AssertionError, match="another process writes"):
        reader.save(30, {}, {})
    with pytest.raises(AssertionError, match="another process writes"):
        reader.save_companion("best-1", {})


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
def test_what_is_no_file_is_passed_over(make: Make, tmp_path: Path, kind: str) -> None:
    write(make(), 10)
    path = tmp_path / "checkpoints" / "step-00000020.safetensors"
    create: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link to nothing": lambda: path.symlink_to("nowhere"),
    }
    create[kind]()
    assert newest(make()).step == 10


class Attack:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_planted_pickle_is_never_executed(make: Make, tmp_path: Path) -> None:
    write(make(), 10)
    path, harm = tmp_path / "checkpoints" / "step-00000020.safetensors", tmp_path / "harm"
    torch.save(Attack(harm), tmp_path / "archive")
    for content in (pickle.dumps(Attack(harm)), (tmp_path / "archive").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"step-00000020\.safetensors: it does not begin"):
            read_checkpoint(path)
        assert newest(make()).step == 10
    for digestible in (pickle.dumps(Attack(harm)).hex(), "\x80\x04."):
        plant(path, header(state=digestible))
        with pytest.raises(ValueError, match=r"step-00000020\.safetensors: "):
            read_checkpoint(path)
    assert not harm.exists()
    pickle.loads(pickle.dumps(Attack(harm)))
    assert harm.exists()


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header(state="[1]"), "expected a JSON object, got list"),
        (header(state="{"), "Expecting property name"),
        (header(state="[" * 200_000), "RecursionError"),
        (header(state='{"a":' + "9" * 5000 + "}"), "Exceeds the limit"),
        (header(needs='["best-1"]'), "expected a JSON object, got list"),
        (header(needs="null"), "expected a JSON object, got NoneType"),
        (header(step="five"), "invalid literal"),
        (header({"w": ENTRY | {"shape": [2]}}), "rror"),
        (header({"w": ENTRY | {"shape": [2**62, 2**62]}}), "rror"),
        (header({"w": ENTRY | {"shape": [-1]}}), "rror"),
        (header({"w": ENTRY | {"dtype": "O"}}), "rror"),
        (header({"w": ENTRY | {"data_offsets": [0, 2**60]}}), "rror"),
        (header({"w": ENTRY | {"data_offsets": [4, 0]}}), "rror"),
        (header({"w": ENTRY, "v": ENTRY}), "rror"),
        (header({"w": [[]]}), "rror"),
        (header()[:-1], "rror"),
        (header().replace(b'"step"', b'"stop"'), "KeyError: 'step'"),
        (b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"}}', "KeyError: 'step'"),
    ],
)
def test_a_planted_file_ends_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "step-00000005.safetensors"
    plant(path, content, b"\0" * 4 if b'"w"' in content else b"")
    with pytest.raises(ValueError, match=reason) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_the_planted_files_are_made_from_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "step-00000005.safetensors"
    plant(path, header({"w": ENTRY}), b"\0" * 4)
    assert read_checkpoint(path).tensors == {"w": torch.zeros(1)}


@pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_an_absurd_length_of_the_header_ends_in_one_line(tmp_path: Path, length: int) -> None:
    path = tmp_path / "step-00000005.safetensors"
    content = struct.pack("<Q", length) + header()
    digest = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content.replace(b"0" * 64, digest, 1))
    with pytest.raises(ValueError, match=r"step-00000005\.safetensors: .*eader"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["../secret-1", "/etc/passwd", "best-1/../../secret-1", "best", "", "step-00000005",
             "best-1\n", "best-\u0661", "BEST-1", "x-1.safetensors"]
)  # fmt: skip
def test_no_name_leads_out_of_the_folder(
    make: Make, reports: list[str], tmp_path: Path, name: str
) -> None:
    folder = make()
    folder.save_companion("best-1", WEIGHTS)
    write(folder, 4)
    digest = plant(tmp_path / "secret-1.safetensors", header())
    plant(
        tmp_path / "checkpoints" / "step-00000005.safetensors",
        header(needs=json.dumps({name: digest})),
    )
    assert newest(make()).step == 4
    assert "expected a companion such as best-00000120, got" in reports[0]
    for refuse in (partial(folder.save_companion, tensors=WEIGHTS), folder.read_companion):
        with pytest.raises(ValueError, match="expected a companion"):
            refuse(name)
    assert not folder.is_busy


def test_a_companion_is_held_as_soon_as_it_is_handed_over_and_comes_back(make: Make) -> None:
    folder, may_go_on = make(), threading.Event()
    assert not folder.holds("best-00000010")
    folder.save(9, {}, {}, before=until(may_go_on))
    folder.save_companion("best-00000010", WEIGHTS)
    assert folder.holds("best-00000010")
    folder.save(10, {}, {}, needs=["best-00000010"])
    may_go_on.set()
    folder.wait()
    assert folder.holds("best-00000010")
    resumed = make()
    assert not resumed.holds("best-00000010")
    checkpoint = newest(resumed)
    assert list(checkpoint.needs) == ["best-00000010"]
    assert resumed.holds("best-00000010")
    got = resumed.read_companion("best-00000010")
    assert all(torch.equal(got[key], WEIGHTS[key]) for key in WEIGHTS)
    write(resumed, 11, needs=["best-00000010"])
    assert resumed.last is not None
    assert resumed.last.name == "step-00000011.safetensors"


@pytest.mark.parametrize("damage", ["missing", "flipped", "another one", "cut"])
def test_a_checkpoint_whose_companion_is_not_the_one_it_needs_is_passed_over(
    make: Make, reports: list[str], tmp_path: Path, damage: str
) -> None:
    folder = make()
    folder.save_companion("best-10", WEIGHTS)
    folder.save_companion("start-10", WEIGHTS)
    write(folder, 10, needs=["start-10"])
    write(folder, 20, needs=["start-10", "best-10"])
    path = tmp_path / "checkpoints" / "best-10.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        flip(path, -3)
    elif damage == "another one":
        folder.save_companion("best-10", {"w": torch.zeros(3)})
        folder.wait()
    else:
        os.truncate(path, path.stat().st_size - 1)
    resumed = make()
    assert newest(resumed).step == 10
    (line,) = reports
    assert line.startswith("damaged checkpoint ")
    assert "step-00000020.safetensors: " in line
    assert f"{path}: " in line
    assert resumed.holds("start-10")
    assert not resumed.holds("best-10")


def test_a_companion_that_was_replaced_after_the_look_at_it_is_not_read(make: Make) -> None:
    folder = make()
    folder.save_companion("best-1", WEIGHTS)
    write(folder, 1, needs=["best-1"])
    resumed = make()
    resumed.latest()
    folder.save_companion("best-1", {"w": torch.zeros(3)})
    folder.wait()
    with pytest.raises(ValueError, match=r"best-1\.safetensors: it is not the one that was meant"):
        resumed.read_companion("best-1")


def test_a_checkpoint_whose_companion_was_not_written_fails(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    folder = make()
    write(folder, 1)
    write(folder, 2, needs=["best-2"])
    last = tmp_path / "checkpoints" / "step-00000001.safetensors"
    assert reports == [
        "checkpoint at step 2 was not written: its companion best-2 is not there; "
        f"training continues, the last one is {last}"
    ]
    folder.save_companion("best-2", WEIGHTS)
    write(folder, 3, needs=["best-2"])
    assert reports[1:] == ["writing checkpoints works again"]
    (tmp_path / "checkpoints" / "best-2.safetensors").unlink()
    assert not folder.holds("best-2")
    write(folder, 4, needs=["best-2"])
    assert reports[2].startswith("checkpoint at step 4 was not written: its companion best-2 is")


def test_a_link_is_the_old_file_until_it_is_the_new_one(make: Make, tmp_path: Path) -> None:
    folder, may_go_on, link = make(), threading.Event(), tmp_path / "best.safetensors"
    link.write_text("of an earlier run")
    folder.save(1, {}, {}, before=until(may_go_on))
    folder.save_companion("best-1", WEIGHTS, link=link)
    assert link.read_text() == "of an earlier run"
    may_go_on.set()
    folder.wait()
    assert link.samefile(tmp_path / "checkpoints" / "best-1.safetensors")
    folder.save_companion("best-2", {"w": torch.zeros(2)}, link=link)
    folder.wait()
    assert link.samefile(tmp_path / "checkpoints" / "best-2.safetensors")
    assert names(tmp_path) == ["best.safetensors", "checkpoints"]


def test_a_link_is_never_missing_nor_half_written(make: Make, tmp_path: Path) -> None:
    folder, link = make(), tmp_path / "best.safetensors"
    folder.save_companion("best-0", {"w": torch.zeros(10_000)}, link=link)
    folder.wait()
    for number in range(1, 30):
        folder.save_companion(f"best-{number}", {"w": torch.full((10_000,), number)}, link=link)
    while folder.is_busy:
        weights = load_file(link)["w"]
        assert weights.eq(weights[0]).all()
    assert load_file(link)["w"][0] == 29


def test_a_link_is_a_copy_where_there_are_no_hard_links(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    folder, path = make(), tmp_path / "best.safetensors"
    folder.save_companion("best-1", WEIGHTS, link=path)
    folder.wait()
    companion = tmp_path / "checkpoints" / "best-1.safetensors"
    assert path.read_bytes() == companion.read_bytes()
    assert not path.samefile(companion)
    assert names(tmp_path) == ["best.safetensors", "checkpoints"]


def test_a_link_that_cannot_be_made_is_reported_and_the_companion_is_there(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    folder = make()
    link = tmp_path / "no folder" / "best.safetensors"
    for number in (1, 2):
        folder.save_companion(f"best-{number}", WEIGHTS, link=link)
    write(folder, 1, needs=["best-1"])
    (line,) = reports
    assert line.startswith(f"{link} was not written: No such file or directory; training continues")
    assert newest(folder).step == 1


def test_the_newest_remain_and_what_they_need(make: Make, tmp_path: Path) -> None:
    folder, checkpoints = make(keep=2), tmp_path / "checkpoints"
    foreign = ["notes.txt", "step-7.safetensors", "other-1.safetensors", "other-2.safetensors",
               "best-000.bin", "step-00000001.safetensors.damaged", "best-1"]  # fmt: skip
    checkpoints.mkdir()
    for name in foreign:
        (checkpoints / name).write_text("foreign")

    def ours() -> list[str]:
        return [name.split(".")[0] for name in names(checkpoints) if name not in foreign]

    folder.save_companion("start-100", WEIGHTS)
    folder.save_companion("best-100", WEIGHTS)
    write(folder, 100, needs=["start-100", "best-100"])
    folder.save_companion("best-110", WEIGHTS)
    write(folder, 110, needs=["start-100", "best-110"])
    assert ours() == ["best-100", "best-110", "start-100", "step-00000100", "step-00000110"]
    write(folder, 120, needs=["start-100", "best-110"])
    assert ours() == ["best-110", "start-100", "step-00000110", "step-00000120"]
    assert not folder.holds("best-100")
    folder.save_companion("best-121", WEIGHTS)
    folder.save_companion("best-122", WEIGHTS)
    write(folder, 125, needs=["start-100", "best-110"])  # neither is needed yet, both may be
    assert ours() == ["best-110", "best-121", "best-122", "start-100", "step-00000120", "step-00000125"]  # fmt: skip  # noqa: E501
    write(folder, 130, 140, needs=["best-122"])
    assert ours() == ["best-122", "start-100", "step-00000130", "step-00000140"]
    assert folder.holds("start-100")  # the newest of its kind
    assert all((checkpoints / name).read_text() == "foreign" for name in foreign)
    resumed = make(keep=1)
    resumed.latest()
    write(resumed, 150, needs=["best-122"])  # it knows nothing of start any more
    assert ours() == ["best-122", "start-100", "step-00000150"]


def test_numbers_of_companions_are_compared_as_numbers(make: Make, tmp_path: Path) -> None:
    folder = make(keep=1)
    for number in (9, 10):
        folder.save_companion(f"best-{number}", WEIGHTS)
        write(folder, number, needs=[f"best-{number}"])
    write(folder, 11)
    assert names(tmp_path / "checkpoints") == ["best-10.safetensors", "step-00000011.safetensors"]


def test_companions_stay_where_a_checkpoint_does_not_say_which_it_needs(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    folder = make(keep=2)
    for number in (1, 2, 3):
        folder.save_companion(f"best-{number}", WEIGHTS)
        write(folder, number, needs=[f"best-{number}"])
    flip(tmp_path / "checkpoints" / "step-00000003.safetensors", 9)
    write(folder, 4, needs=["best-3"])
    assert "best-2.safetensors" in names(tmp_path / "checkpoints")
    assert len(reports) == 1
    assert reports[0].startswith("not all that is old was removed: ")
    assert "step-00000003.safetensors: " in reports[0]
    write(folder, 5, 6, needs=["best-3"])
    assert reports[1:] == ["removing old checkpoints works again"]
    assert "best-2.safetensors" not in names(tmp_path / "checkpoints")


def test_the_one_just_written_remains_even_below_the_steps_of_others(
    make: Make, tmp_path: Path
) -> None:
    write(make(), 100, 200)
    write(make(), 1)
    kept = ["step-00000001.safetensors", "step-00000200.safetensors"]
    assert names(tmp_path / "checkpoints") == kept


def test_nothing_is_removed_before_the_new_one_is_safely_there(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = make(keep=1), []
    write(folder, 1)
    fsync, rename, unlink = os.fsync, os.replace, Path.unlink

    def recorded_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("sync the folder" if is_folder else "sync the file")
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        calls.append(f"rename {source.name} to {target.name}")
        rename(source, target)

    def recorded_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            calls.append(f"remove {path.name}")
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    monkeypatch.setattr(Path, "unlink", recorded_unlink)
    folder.save(2, {}, {}, before=lambda: calls.append("before"))
    folder.wait()
    name = "step-00000002.safetensors"
    assert calls == [
        "before",
        "sync the file",
        f"rename {name}.tmp to {name}",
        "sync the folder",
        "remove step-00000001.safetensors",
    ]


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(
    make: Make, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    left = ["step-00000009.safetensors.tmp", "best-3.safetensors.tmp"]
    foreign = ["x.tmp", "step-00000009.tmp", "model.safetensors.tmp", "best-3.safetensors.tmp.gz"]
    for name in [*left, *foreign]:
        (checkpoints / name).write_text("half")
    folder = make()
    assert folder.latest() is None
    assert set(left) <= set(names(checkpoints))  # whoever only reads removes nothing
    write(folder, 10)
    assert names(checkpoints) == sorted([*foreign, "step-00000010.safetensors"])


def test_a_folder_that_became_a_file_is_reported_once_and_so_is_its_return(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.write_text("in the way")
    folder = make()
    for step in (1, 2):
        folder.save_companion(f"best-{step}", WEIGHTS)
        write(folder, step)
        assert not folder.holds(f"best-{step}")
    reason = f"{checkpoints}: File exists; training continues, there is none yet"
    assert reports == [
        f"companion best-1 was not written: {reason}",
        f"checkpoint at step 1 was not written: {reason}",
    ]
    assert checkpoints.read_text() == "in the way"
    assert folder.last is None
    checkpoints.unlink()
    write(folder, 3, 4)
    assert reports[2:] == ["writing checkpoints works again"]
    assert newest(folder).step == 4


def test_a_folder_that_vanished_is_created_again(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    folder = make()
    folder.save_companion("best-1", WEIGHTS)
    write(folder, 1, needs=["best-1"])
    shutil.rmtree(tmp_path)
    assert not folder.holds("best-1")
    write(folder, 2)
    assert reports == []
    assert names(tmp_path / "checkpoints") == ["step-00000002.safetensors"]


def test_a_folder_that_is_a_file_is_no_new_run(make: Make, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="checkpoints: Not a directory"):
        make().latest()


def test_lost_permission_is_reported_and_harms_nothing(
    make: Make, reports: list[str], tmp_path: Path
) -> None:
    folder, checkpoints = make(), tmp_path / "checkpoints"
    write(folder, 1)
    checkpoints.chmod(0o555)
    try:
        if os.access(checkpoints, os.W_OK):
            pytest.skip("this user may write everywhere")
        write(folder, 2, 3)
    finally:
        checkpoints.chmod(0o755)
    (line,) = reports
    assert line.startswith("checkpoint at step 2 was not written: ")
    assert f"{checkpoints}: Permission denied; training continues" in line
    assert line.endswith(f"the last one is {checkpoints / 'step-00000001.safetensors'}")
    write(folder, 4)
    assert reports[1:] == ["writing checkpoints works again"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("a line\nand another"), "RuntimeError: a line and another"),
        (KeyError("x"), "KeyError: 'x'"),
        (MemoryError(), "MemoryError:"),
    ],
)
def test_whatever_goes_wrong_before_a_write_is_reported_and_the_thread_continues(
    make: Make, reports: list[str], tmp_path: Path, error: Exception, reason: str
) -> None:
    def before() -> None:
        raise error

    folder = make()
    write(folder, 1)
    folder.save(2, {}, {}, before=before)
    folder.save(3, {}, {}, before=before)
    folder.wait()
    last = tmp_path / "checkpoints" / "step-00000001.safetensors"
    assert names(tmp_path / "checkpoints") == [last.name]
    expected = (
        f"checkpoint at step 2 was not written: {reason}; training continues, the last one is"
    )
    assert reports == [f"{expected} {last}"]
    write(folder, 4)
    assert folder.last == last.with_name("step-00000004.safetensors")
    folder.save(5, {}, {}, before=before)
    folder.wait()
    assert len(reports) == 3  # it worked in between: the same reason is news again


def test_a_reader_of_the_reports_that_went_away_does_not_end_the_thread(
    make: Make, tmp_path: Path
) -> None:
    def report(line: str) -> None:
        raise BrokenPipeError(line)

    (tmp_path / "checkpoints").write_text("in the way")
    folder = make(report=report)
    folder.save_companion("best-1", WEIGHTS)
    write(folder, 1)
    assert not folder.holds("best-1")
    (tmp_path / "checkpoints").unlink()
    write(folder, 2, 3)
    assert newest(folder).step == 3


def test_a_checkpoint_that_the_disk_did_not_keep_does_not_count(
    make: Make, reports: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(keep=1)
    write(folder, 1)
    fsync = os.fsync

    def lying(descriptor: int) -> None:
        fsync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.pwrite(descriptor, b"!", 300)

    monkeypatch.setattr(os, "fsync", lying)
    write(folder, 2)
    monkeypatch.undo()
    assert names(tmp_path / "checkpoints") == ["step-00000001.safetensors"]
    assert "its contents are not those that were written" in reports[0]
    assert newest(folder).step == 1


# what is in a program: saves of 1 kB and of 4 MB, before, in and after the time of need
FULL_DISK = """
import json, os, resource, sys
from pathlib import Path
import torch
from safer_fast.runs.checkpoints.folder import CheckpointFolder

where, how = Path(sys.argv[1]), sys.argv[2]
reports = []
folder = CheckpointFolder(where / "checkpoints", keep=2, report=reports.append)
small, large = {"w": torch.ones(300)}, {"w": torch.ones(1_000_000)}

def fill():
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    else:
        room = os.statvfs(where)
        (where / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize - 1_500_000))

def empty():
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    else:
        (where / "ballast").unlink()

folder.save(1, {}, large)
folder.wait()
fill()
folder.save_companion("best-2", large, link=where / "best.safetensors")
folder.save(2, {}, large)
folder.save(3, {}, large)
folder.wait()
print(json.dumps([reports, sorted(os.listdir(where / "checkpoints"))]))
folder.save(4, {}, small)
folder.wait()
empty()
folder.save(5, {}, large)
folder.close()
latest = CheckpointFolder(where / "checkpoints", keep=2).latest()
names = sorted(os.listdir(where)), sorted(os.listdir(where / "checkpoints"))
print(json.dumps([reports, names, latest.step]))
"""


def check_full_disk(reason: str, folder: Path, outcome: list[Any]) -> None:
    (reports, left), (all_reports, (run, checkpoints), step) = outcome
    last = folder / "checkpoints" / "step-00000001.safetensors"
    tail = f"{folder / 'checkpoints'}: {reason}; training continues, the last one is {last}"
    expected = [f"companion best-2 was not written: {tail}"]
    assert reports == [*expected, f"checkpoint at step 2 was not written: {tail}"]
    assert left == ["step-00000001.safetensors"]
    assert all_reports[2:] == ["writing checkpoints works again"]
    assert run == ["checkpoints"]
    assert checkpoints == ["step-00000004.safetensors", "step-00000005.safetensors"]
    assert step == 5


@pytest.mark.slow
def test_files_that_may_not_grow_are_reported_and_harm_nothing(tmp_path: Path) -> None:
    check_full_disk("File too large", tmp_path, program(FULL_DISK, tmp_path, "limit"))


@pytest.mark.slow
def test_a_full_disk_is_reported_and_harms_nothing(tmp_path: Path) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["sh", "-c", 'mount -t tmpfs -o size=12m none "$0" && exec "$@"', str(tmp_path)]
    if (
        not shutil.which("unshare")
        or subprocess.run([*alone, *mount, sys.executable, "-c", ""]).returncode
    ):
        pytest.skip("this user may mount nothing")
    outcome = program(FULL_DISK, tmp_path, "disk", within=[*alone, *mount])
    check_full_disk("No space left on device", tmp_path, outcome)


# children save without a pause, and are killed whenever it happens
KILLS = """
import itertools, json, os, random, signal, sys, time
from pathlib import Path
import torch
from safer_fast.runs.checkpoints.folder import CheckpointFolder

torch.set_num_threads(1)
where, reports = Path(sys.argv[1]), []
content = lambda step: {"w": torch.full((200_000,), step), "v": torch.full((3,), float(step))}
make = lambda: CheckpointFolder(where, keep=2, report=reports.append)

def save_for_ever(confirm):
    folder = make()
    latest = folder.latest()
    best = next(iter(latest.needs)) if latest else None
    for step in itertools.count(latest.step + 1 if latest else 1):
        if best is None or step % 3 == 0:
            best = f"best-{step:08d}"
            folder.save_companion(best, content(step), link=where.parent / "best.safetensors")
        folder.save(step, {"at": step, "best": best}, content(step), needs=[best])
        folder.wait()
        os.write(confirm, f"{folder.last}\\n".encode())

for attempt in range(20):
    reader, confirm = os.pipe()
    child = os.fork()
    if not child:
        try:
            save_for_ever(confirm)
        finally:
            os._exit(1)
    os.close(confirm)
    os.read(reader, 1)
    time.sleep(random.Random(attempt).uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    confirmed = open(reader).read().split()[-1:]
    half = [name for name in os.listdir(where) if name.endswith(".tmp")]
    folder = make()
    latest = folder.latest()
    best = int(latest.state["best"].split("-")[1])
    companion = folder.read_companion(latest.state["best"])
    is_right = latest.state["at"] == latest.step and all(
        torch.equal(tensors[name], expected)
        for tensors, step in ((latest.tensors, latest.step), (companion, best))
        for name, expected in content(step).items()
    )
    step = int(confirmed[0].split("-")[-1][:8]) if confirmed else 0
    print(json.dumps([status, latest.step, step, is_right, half, reports]))
"""


@pytest.mark.slow
def test_a_kill_at_any_time_leaves_the_newest_checkpoint_whole(tmp_path: Path) -> None:
    rows = program(KILLS, tmp_path / "checkpoints")
    assert len(rows) == 20
    for status, step, confirmed, is_right, _, reports in rows:
        assert status == 9
        assert is_right
        assert step >= confirmed
        assert reports == []
    steps = [row[1] for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] >= 20
    # some were killed in the middle of a file, and what they left did not add up
    assert any(row[4] for row in rows)
    assert max(len(row[4]) for row in rows) == 1
    assert len(names(tmp_path / "checkpoints")) <= 7


def test_waiting_has_an_end_and_closing_ends_the_thread(make: Make) -> None:
    folder, may_go_on = make(), threading.Event()
    assert folder.wait(0)
    assert not folder.is_busy
    folder.save(1, {}, {}, before=until(may_go_on))
    assert folder.is_busy
    assert not folder.wait(0.02)
    may_go_on.set()
    assert folder.wait(30)
    assert not folder.is_busy
    folder.save(2, {}, {})
    folder.close()
    assert folder.last is not None
    assert folder.last.name == "step-00000002.safetensors"
    folder.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoints")]


def test_all_is_written_in_the_order_of_handing_over_by_one_thread(make: Make) -> None:
    folder, calls = make(), []
    for step in range(8):
        note = partial(lambda step: calls.append((step, threading.current_thread().name)), step)
        folder.save(step, {}, {}, before=note)
    folder.wait()
    assert [step for step, _ in calls] == list(range(8))
    assert {name for _, name in calls} == {"checkpoints_0"}


@pytest.mark.alone
def test_handing_over_takes_a_small_part_of_the_time_of_writing(make: Make) -> None:
    folder, tensors = make(), {f"w{index}": torch.zeros(500_000) for index in range(100)}
    folder.save(0, {}, {})
    folder.wait()
    start = time.perf_counter()
    folder.save(1, STATE, tensors)
    handed_over = time.perf_counter()
    assert folder.is_busy
    folder.wait()
    written = time.perf_counter()
    assert newest(folder).step == 1
    assert handed_over - start < 0.1 * (written - start)


@pytest.mark.alone
def test_other_threads_run_while_a_file_is_written(make: Make) -> None:
    folder, tensors, shares = make(keep=1), {"w": torch.zeros(30_000_000)}, []
    for step in (1, 2):
        start = last = time.perf_counter()
        longest_gap = 0.0
        folder.save(step, {}, tensors)
        while folder.is_busy:
            time.sleep(0.0005)
            now = time.perf_counter()
            longest_gap, last = max(longest_gap, now - last), now
        shares.append(longest_gap / (last - start))
        assert folder.last is not None
    # a file of one tensor is hashed, written and hashed again: each takes a tenth or more
    assert min(shares) < 0.1


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_writing_holds_one_copy_at_most(make: Make, is_contiguous: bool) -> None:
    tensors = {f"w{index}": torch.zeros(5000, 500) for index in range(10)}  # 95 MiB
    if not is_contiguous:
        tensors = {name: tensor.t() for name, tensor in tensors.items()}
    folder = make()
    folder.save(0, {}, {"w": torch.zeros(9, 9).t()})
    folder.wait()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of memory cannot be set back here")
    before = peak_mib()
    folder.save(1, {}, tensors)
    folder.wait()
    assert folder.last is not None
    assert folder.last.name == "step-00000001.safetensors"
    assert peak_mib() - before < (20 if is_contiguous else 120)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_a_gpu_are_those_that_were_queued_and_nobody_waits_for_them(make: Make) -> None:
    folder, weights = make(), torch.zeros(1_000_000, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]  # half a second or so
    weights.fill_(1)
    start = time.perf_counter()
    folder.save(1, {}, {"w": weights, "t": weights[:6].view(2, 3).t(), "cpu": torch.ones(2)})
    assert time.perf_counter() - start < 0.1
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
    end = torch.cuda.current_stream().record_event()
    folder.wait()
    assert not end.query()  # the file was written while the training stream still ran
    assert all(tensor.eq(1).all() for tensor in newest(folder).tensors.values())
