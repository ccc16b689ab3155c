"""Which kernel computes attention: the fastest for the model's shape, measured once, then kept."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from safer_fast.network import RobustModel

Wanted = Literal["auto", "flash", "cudnn", "math"]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Torch's kernels by name, in order of preference: a later one must be faster by `MARGIN`."""
MARGIN = 1.1
SECONDS = 0.5
# On a CPU as many images are timed as have about this many scores.
CPU_SCORES = 2e7


@dataclass(frozen=True)
class Shape:
    """Attention of one image: `windows` times `heads` attend over `tokens` of `width` numbers."""

    windows: int
    heads: int
    tokens: int
    width: int


@dataclass(frozen=True)
class Pinned:
    """The kernel in use, milliseconds of those that were timed, reasons against the others."""

    backend: str
    times_ms: Mapping[str, float]
    refused: Mapping[str, str]
    note: str | None = None


def attention_shape(model: RobustModel, image_size: int) -> Shape | None:
    """The attention that most of the model's scores come from; None where it has none of torch's.

    The model runs once, on one image of zeros.
    """
    size = (1, model.mean.shape[1], image_size, image_size)
    with torch.no_grad(), _Watch() as watch:
        model(torch.zeros(size, device=model.mean.device))
    if not watch.scores:
        return None
    return Shape(*max(watch.scores, key=lambda shape: watch.scores[shape]))


def pin_attention(
    wanted: Wanted,
    shape: Shape,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    cache: Path | None = None,
) -> Pinned:
    """From now on the process computes attention with the kernel that is wanted, if it can.

    auto: the fastest, forward and backward, for a batch of this shape; it is measured once on a
    machine and remembered in `cache` (default: attention.json in the user's cache folder), so that
    a repeated run is the same run. Under deterministic algorithms only kernels that give the same
    bits twice count. Plain products (math) stay allowed for shapes that the kernel does not take.
    """
    usable, refused = usable_backends(shape, batch_size, dtype, device)
    times: dict[str, float] = {}
    note = None
    if wanted in usable:
        backend: str = wanted
    else:
        file = cache or _cache_folder() / "attention.json"
        key = _key(shape, batch_size, dtype, device)
        known = _read(file).get(key, {})
        times = {name: float(known[name]) for name in usable if name in known}
        if set(times) != set(usable):
            times = time_backends(usable, random_inputs(shape, batch_size, dtype, device))
            _remember(file, key, times)
        backend = fastest(times)
    if wanted != "auto" and wanted != backend:
        note = f"attention: {wanted} is off ({refused[wanted]}), {backend} is used"
    torch.backends.cuda.enable_flash_sdp(backend == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(backend == "efficient")
    torch.backends.cuda.enable_cudnn_sdp(backend == "cudnn")
    torch.backends.cuda.enable_math_sdp(True)
    return Pinned(backend, times, refused, note)


def pin_for(model: RobustModel, image_size: int, batch_size: int, wanted: Wanted) -> Pinned | None:
    """Pins the attention of this model on its device; None where it uses none of torch's."""
    shape = attention_shape(model, image_size)
    if shape is None:
        return None
    return pin_attention(wanted, shape, batch_size, model.compute_dtype, model.mean.device)


def usable_backends(
    shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """Backends that work for a batch of this shape, and why the others do not."""
    inputs = random_inputs(shape, batch_size, dtype, device)
    usable, refused = [], {}
    for name in BACKENDS:
        if device.type == "cpu" and name not in ("flash", "math"):
            refused[name] = "needs a GPU"
            continue
        reason = _refusal(name, inputs)
        if reason is None:
            usable.append(name)
        else:
            refused[name] = reason
    return usable, refused


def fastest(times_ms: Mapping[str, float]) -> str:
    """The backend with the least time; an earlier one of `BACKENDS` wins unless it is 10 % slower.

    Noise of the clock is no reason for other bits.
    """
    names = [name for name in BACKENDS if name in times_ms]
    best = names[0]
    for name in names[1:]:
        if times_ms[name] * MARGIN < times_ms[best]:
            best = name
    return best


def time_backends(names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Least milliseconds of forward and backward with each backend, measured in turn.

    The least, not the middle: whatever else the machine does only ever adds.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    started, least_rounds = time.perf_counter(), 2
    while least_rounds > 0 or time.perf_counter() - started < SECONDS:
        least_rounds -= 1
        for name in names:
            times[name].append(_milliseconds(lambda name=name: run_backend(name, inputs)))  # type: ignore[misc]
    return {name: round(min(values), 4) for name, values in times.items()}


class _Watch(TorchFunctionMode):
    """Adds up the scores that calls of torch's attention compute, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[tuple[int, ...], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            shape = tuple(args[0].shape)
            work = args[0].numel() * args[1].shape[-2]
            self.scores[shape] = self.scores.get(shape, 0) + work
        return func(*args, **(kwargs or {}))


def random_inputs(
    shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Queries, keys, values and the gradient of what comes out, all random."""
    if device.type == "cpu":
        scores = shape.windows * shape.heads * shape.tokens**2
        batch_size = max(1, min(batch_size, int(CPU_SCORES / scores)))
    size = (batch_size * shape.windows, shape.heads, shape.tokens, shape.width)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, gradient = (
        torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient


def run_backend(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values."""
    q, k, v, gradient = inputs
    with sdpa_kernel(BACKENDS[name]):
        out = functional.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(out, (q, k, v), gradient)


def _refusal(name: str, inputs: tuple[Tensor, ...]) -> str | None:
    """Why the backend cannot be used; None if it can."""
    with warnings.catch_warnings(record=True) as told:  # torch warns before it refuses
        warnings.simplefilter("always")
        try:
            first, second = run_backend(name, inputs), run_backend(name, inputs)
        except RuntimeError as error:
            reasons = [str(warning.message).splitlines()[0] for warning in told]
            return next(iter(reasons), str(error).splitlines()[0])
    if not torch.are_deterministic_algorithms_enabled():
        return None
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return None if same else "does not give the same bits twice"


def _milliseconds(run: Callable[[], tuple[Tensor, ...]]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def _key(shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    words = [name, torch.__version__, str(dtype), *map(str, asdict(shape).values())]
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return " ".join([*words, str(batch_size), str(threads), str(is_deterministic)])


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "safer_fast"


def _read(file: Path) -> dict[str, dict[str, float]]:
    """What is remembered; nothing where the file is missing or damaged: it is measured again."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    is_whole = isinstance(content, dict) and all(isinstance(v, dict) for v in content.values())
    return content if is_whole else {}


def _remember(file: Path, key: str, times_ms: dict[str, float]) -> None:
    """Adds an entry; a folder that cannot be written to costs a measurement in the next run."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**_read(file), key: times_ms}, indent=1))
        part.replace(file)
    except OSError:
        with suppress(OSError):
            part.unlink()
