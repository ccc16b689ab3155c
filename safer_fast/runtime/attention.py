"""Choice of the attention kernel: the fastest for the model's shape, timed once and cached."""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import attention, functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from safer_fast.config.messages import first_line
from safer_fast.runtime.timing_cache import cache_file, machine, milliseconds, remember, remembered

Wanted = Literal["auto", "flash", "fa3", "fa4", "cudnn", "math"]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""torch's kernels by name, in order of preference: a later one must be faster by `MARGIN`."""


class Generation(NamedTuple):
    """A generation of flash attention that torch's hooks put in place of its own.

    hook: its name there. module: that is imported. distribution: that holds the module.
    """

    hook: str
    module: str
    distribution: str


GENERATIONS = {
    "fa3": Generation("FA3", "flash_attn_interface", "flash_attn_3"),
    "fa4": Generation("FA4", "flash_attn.cute.interface", "flash-attn-4"),
}
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
    repeated run computes the same bits. FA3 and FA4 compete where their packages are installed.
    With deterministic algorithms only kernels that give the same bits twice are used. Plain
    products (math) stay enabled for shapes that the kernel does not support.
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
    activate(backend)
    torch.backends.cuda.enable_flash_sdp(BACKENDS[backend] == SDPBackend.FLASH_ATTENTION)
    torch.backends.cuda.enable_mem_efficient_sdp(backend == "efficient")
    torch.backends.cuda.enable_cudnn_sdp(backend == "cudnn")
    torch.backends.cuda.enable_math_sdp(True)
    return Pinned(backend, times, refused, _note(wanted, backend, refused))


def usable_backends(
    shape: Shape,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Backends that work for a batch of this shape, and reasons why the others do not.

    names: those that are tried; default: all but FA3 and FA4 where they are not installed.
    """
    inputs = random_inputs(shape, batch_size, dtype, device)
    tried = _candidates(device) if names is None else names
    reasons = {name: _refusal(name, inputs) for name in tried}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in tried if name not in refused], refused


def activate(name: str) -> None:
    """Make torch's flash kernel that of this backend; FA2's for backends that are no generation.

    The process keeps it. Raises RuntimeError where torch has no hooks for it, and what the import
    of a package raises.
    """
    current = getattr(attention, "current_flash_attention_impl", lambda: None)()
    wanted = GENERATIONS[name].hook if name in GENERATIONS else None
    if current == wanted:
        return
    if wanted is None:
        attention.restore_flash_attention_impl()
    elif hasattr(attention, "activate_flash_attention_impl"):
        attention.activate_flash_attention_impl(wanted)
    else:
        raise RuntimeError(f"PyTorch {torch.__version__} has no hooks for it")


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
                activate(name)
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
    activate(name)
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
    if name in GENERATIONS and not _is_installed(name):
        return f"{GENERATIONS[name].distribution} is not installed"
    with warnings.catch_warnings(record=True) as caught:  # torch warns before it refuses
        warnings.simplefilter("always")
        try:
            first, second = run_backend(name, inputs), run_backend(name, inputs)
            if name in GENERATIONS:  # where it fails torch takes no other kernel in its place
                run_backend(name, _one_query(inputs))
        except (RuntimeError, *_OF_PACKAGES) as error:
            return _reason(error, [str(warning.message) for warning in caught])
    if not torch.are_deterministic_algorithms_enabled() or all(map(torch.equal, first, second)):
        return None
    return "does not give the same bits twice"


_OF_PACKAGES = (ImportError, OSError, AssertionError, TypeError, ValueError, AttributeError)
"""Errors of a package that is of another version than torch expects."""


def _candidates(device: torch.device) -> list[str]:
    """Backends worth a trial on this device: those of torch, and generations that are installed."""
    is_gpu = device.type == "cuda"
    return [n for n in BACKENDS if n not in GENERATIONS or (is_gpu and _is_installed(n))]


def _is_installed(name: str) -> bool:
    """Return true if the module of a generation is there; nothing is imported."""
    top, *rest = GENERATIONS[name].module.split(".")
    spec = find_spec(top)
    if spec is None or not rest:
        return spec is not None
    folders = [Path(location, *rest[:-1]) for location in spec.submodule_search_locations or ()]
    return any((folder / f"{rest[-1]}.py").is_file() for folder in folders)


def _one_query(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of a last block that computes one token."""
    q, k, v, gradient, *masks = inputs
    return (q[:, :, :1], k, v, gradient[:, :, :1], *(mask[:, :, :1] for mask in masks))


def _reason(error: Exception, warned: Sequence[str]) -> str:
    """The line of torch's warnings that is about this backend; most are about disabled ones."""
    lines = (text.partition(" (Triggered internally")[0] for text in warned)
    reasons = [line for line in lines if not line.endswith(("because:", "runtime disabled."))]
    is_named = bool(reasons) and str(error).startswith("No available kernel")
    return reasons[-1] if is_named else first_line(error)


def _note(wanted: str, backend: str, refused: Mapping[str, str]) -> str | None:
    if wanted in refused:
        return f"attention: {wanted} is off ({refused[wanted]}), {backend} is used"
    if backend != "math" or set(BACKENDS) - {"math", *GENERATIONS} - set(refused):
        return None
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    return f"attention: plain products, as no other kernel works ({reasons})"


def _key(shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device) -> str:
    """Key of the cache: everything that the fastest kernel depends on."""
    words = [machine(device), dtype, *asdict(shape).values(), batch_size]
    for name in GENERATIONS:
        if name in _candidates(device):
            words.append(name)
            with suppress(importlib.metadata.PackageNotFoundError):
                words.append(importlib.metadata.version(GENERATIONS[name].distribution))
    return " ".join(map(str, [*words, torch.are_deterministic_algorithms_enabled()]))
