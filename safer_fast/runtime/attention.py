"""Choice of the attention kernel: the fastest for the model's shape, timed once and cached."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from safer_fast.config.messages import first_line
from safer_fast.runtime.timing_cache import cache_file, machine, milliseconds, remember, remembered

Wanted = Literal["auto", "flash", "cudnn", "math"]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""torch's kernels by name, in order of preference: a later one must be faster by `MARGIN`."""
MARGIN = 1.1
SECONDS = 0.5
# Number of images is limited to about this many scores: more would only take longer.
MOST_SCORES = {"cpu": 4_000_000, "cuda": 200_000_000}


@dataclass(frozen=True)
class Shape:
    """Shape of attention for one image: `windows` times `heads` over `tokens` of `width` numbers.

    is_masked: a bias, such as that of relative positions, is added to the scores.
    """

    windows: int
    heads: int
    tokens: int
    width: int
    is_masked: bool = False


class KernelTimings(NamedTuple):
    """Milliseconds of the kernels that work for a shape, and reasons against the others."""

    times_ms: dict[str, float]
    refused: dict[str, str]

    @classmethod
    def parse(cls, stored: Any) -> KernelTimings:
        """Convert a JSON value; raises ValueError, TypeError or AttributeError."""
        times, refused = stored
        return cls({name: float(ms) for name, ms in times.items()}, dict(refused))


@dataclass(frozen=True)
class Pinned:
    """The kernel in use, times of all that were timed, and reasons against the others."""

    backend: str
    times_ms: Mapping[str, float]
    refused: Mapping[str, str]
    note: str | None = None


def pin_attention(
    wanted: Wanted,
    shape: Shape,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    cache: Path | None = None,
) -> Pinned:
    """Make the process compute attention with the wanted kernel, if it works for this shape.

    auto: the fastest, forward and backward, for a batch of this shape; it is timed once on a
    machine and stored in `cache` (default: attention.json in the user's cache folder), so that a
    repeated run computes the same bits. With deterministic algorithms only kernels that give the
    same bits twice are used. Plain products (math) stay enabled for shapes that the kernel does not
    support.
    """
    case = (shape, batch_size, dtype, device)
    backend: str = wanted
    reason = None if wanted == "auto" else _refusal(wanted, random_inputs(*case))
    times, refused = dict[str, float](), {} if reason is None else {backend: reason}
    if wanted == "auto" or refused:
        file, key = cache or cache_file("attention.json"), _key(*case)
        known = remembered(file, KernelTimings.parse).get(key)
        known = known or remember(file, key, _measure(*case), KernelTimings.parse)
        times, refused = known.times_ms, {**known.refused, **refused}
        backend = fastest({name: value for name, value in times.items() if name not in refused})
    torch.backends.cuda.enable_flash_sdp(backend == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(backend == "efficient")
    torch.backends.cuda.enable_cudnn_sdp(backend == "cudnn")
    torch.backends.cuda.enable_math_sdp(True)
    return Pinned(backend, times, refused, _note(wanted, backend, refused))


def usable_backends(
    shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """Backends that work for a batch of this shape, and reasons why the others do not."""
    inputs = random_inputs(shape, batch_size, dtype, device)
    reasons = {name: _refusal(name, inputs) for name in BACKENDS}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in BACKENDS if name not in refused], refused


def fastest(times_ms: Mapping[str, float]) -> str:
    """The backend with the least time; an earlier one of `BACKENDS` wins unless it is 10 % slower.

    The margin keeps noise of the clock from changing bits. math if nothing was timed.
    """
    best, *others = [name for name in BACKENDS if name in times_ms] or ["math"]
    for name in others:
        if times_ms[name] * MARGIN < times_ms[best]:
            best = name
    return best


def time_backends(names: Sequence[str], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Least milliseconds of forward and backward with each backend, timed in turns.

    The minimum and not the median: other load on the machine can only add time.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    started, least_rounds = time.perf_counter(), 2
    with warnings.catch_warnings():  # these kernels work, see `usable_backends`
        warnings.simplefilter("ignore")
        while least_rounds > 0 or time.perf_counter() - started < SECONDS:
            least_rounds -= 1
            for name in names:
                run = partial(run_backend, name, inputs)
                times[name].append(milliseconds(run, inputs[0].device))
    return {name: round(min(values), 4) for name, values in times.items()}


def random_inputs(
    shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Random queries, keys, values, gradient of the output, and a mask if the shape has one.

    Their memory layout is that of a ViT, heads within tokens: copies by kernels count.
    """
    most = MOST_SCORES[device.type] // (shape.windows * shape.heads * shape.tokens**2)
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    rows = (max(1, min(batch_size, most)) * shape.windows, shape.tokens)
    q, k, v = random((*rows, 3, shape.heads, shape.width)).permute(2, 0, 3, 1, 4).unbind()
    gradient = random((*rows, shape.heads, shape.width)).transpose(1, 2)  # [B, heads, N, width]
    masks = [random((1, shape.heads, shape.tokens, shape.tokens))] if shape.is_masked else []
    return (*(t.detach().requires_grad_() for t in (q, k, v)), gradient, *masks)


def run_backend(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Compute attention and the gradients of queries, keys and values with one backend."""
    q, k, v, gradient, *masks = inputs
    with sdpa_kernel(BACKENDS[name]):
        out = functional.scaled_dot_product_attention(q, k, v, masks[0] if masks else None)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), gradient))


def _measure(
    shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device
) -> KernelTimings:
    usable, refused = usable_backends(shape, batch_size, dtype, device)
    inputs = random_inputs(shape, batch_size, dtype, device)
    return KernelTimings(time_backends(usable, inputs), refused)


def _refusal(name: str, inputs: tuple[Tensor, ...]) -> str | None:
    """Reason why the backend cannot be used; None if it can."""
    if inputs[0].device.type == "cpu" and name not in ("flash", "math"):
        return "needs a GPU"
    with warnings.catch_warnings(record=True) as caught:  # torch warns before it refuses
        warnings.simplefilter("always")
        try:
            first, second = run_backend(name, inputs), run_backend(name, inputs)
        except RuntimeError as error:
            return _reason(error, [str(warning.message) for warning in caught])
    if not torch.are_deterministic_algorithms_enabled() or all(map(torch.equal, first, second)):
        return None
    return "does not give the same bits twice"


def _reason(error: RuntimeError, warned: Sequence[str]) -> str:
    """The line of torch's warnings that is about this backend; most are about disabled ones."""
    lines = (text.partition(" (Triggered internally")[0] for text in warned)
    reasons = [line for line in lines if not line.endswith(("because:", "runtime disabled."))]
    is_named = bool(reasons) and str(error).startswith("No available kernel")
    return reasons[-1] if is_named else first_line(error)


def _note(wanted: str, backend: str, refused: Mapping[str, str]) -> str | None:
    if wanted in refused:
        return f"attention: {wanted} is off ({refused[wanted]}), {backend} is used"
    if set(BACKENDS) - {"math"} - set(refused):
        return None
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    return f"attention: plain products, as no other kernel works ({reasons})"


def _key(shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device) -> str:
    """Key of the cache: everything that the fastest kernel depends on."""
    words = [machine(device), dtype, *asdict(shape).values(), batch_size]
    return " ".join(map(str, [*words, torch.are_deterministic_algorithms_enabled()]))
