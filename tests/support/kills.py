"""Runs that are stopped, killed and resumed, in processes that start in a fraction of a second."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from safer_fast.runs.checkpoints.file import Checkpoint, read_checkpoint
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime.command import run
from tests.support.programs import Order, Program, Question
from tests.support.reports import leave_out_drawings

BACKENDS = ["device", "torch", "dali"]
SIZE, NUM_CLASSES = 12, 4
NUM_IMAGES = {"train": 8, "val": 4, "test": 4}  # of each class
STEPS_PER_EPOCH, WARMUP_EPOCHS, EPOCHS = 4, 2, 5
# All that draws or counts: warm-up, and SAFER with a selection before each epoch, ramps, averaged
# weights, stochastic depth, augmentation, an image left out, an evaluation after each epoch.
FLAGS = [
    "--model.name=vit_tiny_patch16_224",
    "--model.arguments={depth: 2, embed_dim: 16, num_heads: 2}",
    "--model.patch_size=4",
    "--model.drop_path_rate=0.2",
    f"--epochs={EPOCHS}",
    f"--selection.warmup_epochs={WARMUP_EPOCHS}",
    "--batch-size=8",
    f"--data.image_size={SIZE}",
    "--data.bad_images=skip",
    "--data.random_erasing=0.5",
    "--data.mixup=0.2",
    "--data.cutmix=0.2",
    "--attack.epsilon=0.1",
    "--attack.steps=auto",
    "--attack.max_steps=3",
    "--attack.audit_every=3",
    "--attack.clean_epochs=1",
    "--attack.epsilon_warmup_epochs=1",
    "--selection.every_epochs=1",
    "--selection.num_images=16",
    "--selection.fraction=0.2",
    "--selection.radius=relative",
    "--optim.learning_rate=0.01",
    "--optim.warmup_epochs=1",
    "--optim.clip_norm=1",
    "--optim.ema_decay=0.8",
    "--evaluation.steps=2",
    "--evaluation.attacks=clean,pgd-2",
    "--evaluation.sentinel_images=8",
    "--runtime.device=cpu",
    "--runtime.attention=math",
    "--runtime.num_threads=1",
    "--runtime.log_every_steps=3",
    "--checkpoint.every_steps=1",
]
MEASURED = ("time_s", "images_per_second", "data_wait_fraction", "peak_memory_mib", "stage_ms")
MEASURED += ("audit_fraction",)

_ASKING = {signal.SIGINT, signal.SIGTERM}  # held back until there is a run that can be asked


def write_photos(folder: Path, seed: int = 0) -> Path:
    """Splits of noisy pictures whose colours mostly show their class; one is broken."""
    rng = np.random.default_rng(seed)
    colours = rng.uniform(60, 195, (NUM_CLASSES, 1, 1, 3))
    for split, count in NUM_IMAGES.items():
        for number in range(NUM_CLASSES):
            place = folder / split / "abcd"[number]
            place.mkdir(parents=True)
            for index in range(count):
                pixels = colours[number] + rng.normal(0, 50, (SIZE, SIZE, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(place / f"{index}.png")
    (folder / "train" / "a" / "0.png").write_bytes(b"broken")
    return folder


def flags_for(photos: Path, backend: str, *others: str) -> list[str]:
    """Flags of a run on `write_photos` data that is resumed where it was stopped."""
    own = {
        "device": ["--data.augmentation=crop"],
        "torch": ["--data.augmentation=random-resized-crop", "--data.randaugment=9"],
        "dali": ["--data.augmentation=random-resized-crop"],
    }
    data = [f"--data.path={photos}", f"--data.backend={backend}", *own[backend]]
    return [*FLAGS, *data, "--resume=auto", *others]


def send(*numbers: int) -> None:
    """Send these signals to this process, one after the other."""
    for number in numbers:
        os.kill(os.getpid(), number)


def kill() -> None:
    """Kill this process."""
    send(signal.SIGKILL)


@dataclass(frozen=True)
class Patch:
    """A replacement of a function, named in full: `replace` maps the old one to the new."""

    function: str
    replace: Callable[[Callable[..., Any]], Callable[..., Any]]

    def arm(self) -> None:
        """Replace the function in this process."""
        owner, _, name = self.function.rpartition(".")
        place = _resolve(owner)
        setattr(place, name, self.replace(getattr(place, name)))


@dataclass(frozen=True)
class Setting:
    """Another value of a module's constant in the process of a run."""

    module: str
    name: str
    value: object

    def arm(self) -> None:
        """Set the constant in this process."""
        setattr(importlib.import_module(self.module), self.name, self.value)


@dataclass(frozen=True)
class Moment:
    """An action right before or after the `call`-th call of a function."""

    function: str
    call: int = 1
    is_after: bool = False
    act: Callable[[], object] = kill

    def arm(self) -> None:
        """Wrap the function in this process."""
        Patch(self.function, self._wrapped).arm()

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        count, lock = 0, threading.Lock()

        def wrapped(*arguments: Any, **settings: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                is_now = count == self.call
            if is_now and not self.is_after:
                self.act()
            result = function(*arguments, **settings)
            if is_now and self.is_after:
                self.act()
            return result

        return wrapped


class Ending(NamedTuple):
    """status: minus the number of the signal that ended it, if one did."""

    status: int
    output: str
    errors: str


class Server:
    """A process that has imported everything and forks a process for each run; a context manager.

    It does nothing itself, so that no run inherits more than imports.
    """

    def __enter__(self) -> Server:
        # not a child of this process: tests count theirs
        program = f"import os; os.fork() and os._exit(0); from {__name__} import serve\n"
        program += "order = serve()\nif order is not None: order.run()"
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[2]
        )
        self._process.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def train(self, folder: Path, flags: Sequence[str], *changes: Moment | Patch) -> Ending:
        """`python -m safer_fast.train FLAGS --output FOLDER`, started and ended."""
        return self.start(folder, flags, *changes).ending()

    def start(self, folder: Path, flags: Sequence[str], *changes: Moment | Patch) -> Training:
        """Start `python -m safer_fast.train FLAGS --output FOLDER`."""
        return self.start_command("train", [*flags, "--output", str(folder)], folder, changes)

    def command(self, name: str, folder: Path, *words: str) -> Ending:
        """`python -m safer_fast.NAME FOLDER WORDS`, started and ended."""
        return self.start_command(name, [str(folder), *words], folder, ()).ending()

    def run(
        self,
        *words: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """`python WORDS`, started and ended; killed and an error after so many seconds."""
        program = Program(self._ask, words, cwd=cwd, env=env)
        try:
            output, errors = program.communicate(timeout)
        finally:
            program.end()
        assert program.returncode is not None
        return subprocess.CompletedProcess(words, program.returncode, output, errors)

    def program(self, *words: str, env: Mapping[str, str] | None = None) -> Program:
        """Start `python WORDS`, in a session of its own."""
        return Program(self._ask, words, env=env, start_new_session=True)

    def popen(
        self,
        words: Sequence[str],
        *,
        stdout: IO[bytes],
        env: Mapping[str, str],
        cwd: Path,
        **_: object,
    ) -> Program:
        """Start `python WORDS` where `subprocess.Popen` would; both streams go to a file."""
        assert words[0] == sys.executable
        settings = {"env": env, "cwd": cwd, "output": stdout.name, "start_new_session": True}
        return Program(self._ask, words[1:], **settings)  # type: ignore[arg-type]

    def start_command(
        self, name: str, words: Sequence[str], folder: Path, changes: Sequence[Moment | Patch]
    ) -> Training:
        """Start `python -m safer_fast.NAME WORDS`; its output lies beside the folder."""
        texts = [Text(folder.with_name(f"{folder.name}.{stream}")) for stream in ("out", "err")]
        pid = self._ask((name, words, [text.path for text in texts], changes))
        assert pid is not None
        return Training(self, pid, texts)

    def status_of(self, pid: int, seconds: float) -> int | None:
        """Exit status of a process; kill it and return None if it has not ended after `seconds`."""
        assert self._process.stdout is not None
        _put(pid, self._process.stdin)
        in_time, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        status: int = _get(self._process.stdout)
        return status if in_time else None

    def _ask(self, request: object) -> int | None:
        _put(request, self._process.stdin)
        answer: int | None = _get(self._process.stdout)
        return answer


class Training:
    """A run in a process of its own."""

    def __init__(self, server: Server, pid: int, texts: Sequence[Text]) -> None:
        self.pid = pid
        self._server, self._texts = server, texts

    def send(self, number: int) -> None:
        """The process gets the signal; it does no harm where it has ended already."""
        # its number is its own until it is asked how it ended, or another one starts
        os.kill(self.pid, number)

    def ending(self, seconds: float = 180) -> Ending:
        """Wait for its end; fail if that takes longer than `seconds`."""
        status = self._server.status_of(self.pid, seconds)
        output, errors = (text.read() for text in self._texts)
        assert status is not None, f"no end within {seconds} seconds: {output}{errors}"
        return Ending(status, output, errors)


class Text:
    """Output of a process, up to 64 KiB, through a pipe: it has room on a full disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        self._pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def read(self) -> str:
        """All of it; once."""
        content = b""
        with suppress(BlockingIOError):
            while part := os.read(self._pipe, 2**16):
                content += part
        os.close(self._pipe)
        self.path.unlink()
        return content.decode()


def serve() -> Order | None:
    """Fork a process for each request to run something; answer with its exit status when asked.

    A request is what to run, or the number of a process to wait for. The process ends without
    clearing up its memory, which would take longer than many a run. One that is to be a program
    returns from here with its order, and comes to its end as programs do.
    """
    importlib.import_module("tests.support.imported")
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    fork, running = multiprocessing.get_context("fork"), dict[int | None, Any]()
    while (request := _get(sys.stdin.buffer)) is not None:
        if isinstance(request, int):
            process = running.pop(request)
            process.join()
            _put(process.exitcode, sys.stdout.buffer)
        elif isinstance(request, Question):
            ended, status = os.waitpid(request.pid, os.WNOHANG)
            _put(os.waitstatus_to_exitcode(status) if ended else None, sys.stdout.buffer)
        elif isinstance(request, Order):
            if (pid := request.fork()) == 0:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)
                return request
            _put(pid, sys.stdout.buffer)
        else:
            process = fork.Process(target=_run, args=request)
            process.start()
            running[process.pid] = process
            _put(process.pid, sys.stdout.buffer)
    return None


def _run(name: str, words: Sequence[str], texts: Sequence[Path], changes: Sequence[Any]) -> None:
    for stream, path in zip((sys.stdout, sys.stderr), texts, strict=True):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    command = importlib.import_module(f"safer_fast.{name}")
    if name == "train":
        leave_out_drawings()
    for change in changes:
        change.arm()
    sys.argv = [name, *words]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)
    run(command.main)


def _put(value: object, pipe: IO[bytes] | None) -> None:
    assert pipe is not None
    pickle.dump(value, pipe)
    pipe.flush()


def _get(pipe: IO[bytes] | None) -> Any:
    """The next value, None at the end."""
    assert pipe is not None
    try:
        return pickle.load(pipe)
    except EOFError:
        return None


def _resolve(name: str) -> Any:
    """The module, or class in a module, of this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        owner, _, rest = name.rpartition(".")
        return getattr(_resolve(owner), rest)


@dataclass(frozen=True)
class State:
    """Files of a finished run that must be the same however often it was stopped."""

    weights: bytes
    best: bytes
    config: str
    lines: list[dict[str, Any]]
    scalars: list[tuple[int, dict[str, float]]]
    checkpoint: dict[str, Any]
    names: set[str]

    @classmethod
    def of(cls, folder: Path) -> State:
        """Read the state of a finished run."""
        names = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
        return cls(
            weights=(folder / "model.safetensors").read_bytes(),
            best=(folder / "best.safetensors").read_bytes(),
            config=(folder / "config.json").read_text(),
            lines=lines_of(folder),
            scalars=scalars_of(folder),
            checkpoint=contents_of(read_checkpoint(checkpoints_of(folder)[-1])),
            names=names | {path.name for path in folder.glob("checkpoints/*.tmp")},
        )

    def differences(self, other: State) -> list[str]:
        """Names of the fields that differ; of lists the first place."""
        found = []
        for name, mine in vars(self).items():
            others = getattr(other, name)
            if mine == others:
                continue
            if isinstance(mine, list):
                pairs = enumerate(zip_longest(mine, others))
                name += next(f"[{at}]: {a} and {b}" for at, (a, b) in pairs if a != b)
            elif isinstance(mine, dict):
                every = {**mine, **others}
                name += f": {[key for key in every if mine.get(key) != others.get(key)]}"
            elif isinstance(mine, set):
                name += f": {mine ^ others}"
            found.append(name)
        return found


def checkpoints_of(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.safetensors"))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what is measured."""
    events = read_metrics(folder / "metrics.jsonl")
    return [{key: event[key] for key in event if key not in MEASURED} for event in events]


def scalars_of(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Scalars that TensorBoard reads, in order, without times and speeds."""
    records = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            found = [each for each in event.summary.value if each.HasField("simple_value")]
            values = {each.tag: each.simple_value for each in found}
            kept = {tag: values[tag] for tag in values if not set(tag.split("/")) & set(MEASURED)}
            records.append((event.step, kept))
    return [(step, values) for step, values in records if values]


def contents_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Progress and tensors by name, bit for bit; the number of bytes of the log hangs on times."""
    tensors = checkpoint.tensors.items()
    contents = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors}
    return {**checkpoint.state["progress"], "metrics_size": None, **contents}
