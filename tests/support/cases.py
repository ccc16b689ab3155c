"""The inputs that every kernel is tested and timed on."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@contextmanager
def named(*facts: Any) -> Iterator[None]:
    """Add the facts to an error from inside, so that a test over a whole table names its row."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"row: {', '.join(map(str, facts))}")
        raise


@dataclass(frozen=True)
class Case:
    """A shape, a layout in memory, and what is unusual about the values."""

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"  # or channels_last, strided
    values: str = "usual"  # or nan, inf, zero, tiny
    gradient_dtype: torch.dtype = torch.float32


SIZES = [
    Case("one element", (1, 1)),
    Case("primes", (3, 7, 11, 13)),
    Case("empty batch", (0, 3, 4, 4)),
    Case("empty images", (2, 0)),
    Case("block - 1", (1, 1023)),
    Case("block", (1, 1024)),
    Case("block + 1", (1, 1025)),
    Case("sum block - 1", (1, 8191)),
    Case("sum block", (1, 8192)),
    Case("sum block + 1", (1, 8193)),
    Case("several chunks", (3, 16411)),
]
LAYOUTS = [
    Case("channels_last", (2, 3, 8, 10), layout="channels_last"),
    Case("non-contiguous", (2, 3, 8, 10), layout="strided"),
]
VALUES = [
    Case("NaN", (2, 1040), values="nan"),
    Case("inf", (2, 1040), values="inf"),
    Case("zero gradient", (2, 1040), values="zero"),
    Case("tiny gradient", (2, 1040), values="tiny"),
]
HALVES = [
    replace(case, name=f"{case.name}, {str(dtype)[6:]}", gradient_dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for case in (SIZES[1], SIZES[6], SIZES[10], *LAYOUTS, *VALUES)
]
CASES = [*SIZES, *LAYOUTS, *VALUES, *HALVES]

ATTACK_BENCH = [
    Case("64 x 3 x 224 x 224", (64, 3, 224, 224)),
    Case("64 x 3 x 224 x 224", (64, 3, 224, 224), gradient_dtype=torch.bfloat16),
]
SAM_BENCH = [
    Case("25 M", (25_000_000,)),
    Case("25 M", (25_000_000,), gradient_dtype=torch.bfloat16),
]


def attack_inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """adversarial, images and gradient; the first is within 0.1 of the second and in [0, 1]."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    images = torch.rand(case.shape, generator=generator)
    noise = torch.rand(case.shape, generator=generator) - 0.5
    adversarial = (images + 0.2 * noise).clamp(0, 1)
    gradient = torch.randn(case.shape, generator=generator) * 1e-3
    spoil(case.values, gradient)
    if case.values == "nan":
        # Each input has to be able to break its pixel, so each breaks another one.
        images[..., 5] = torch.nan
        adversarial[..., 7] = torch.nan
    return (
        lay_out(adversarial, case.layout).to(device),
        lay_out(images, case.layout).to(device),
        lay_out(gradient.to(case.gradient_dtype), case.layout).to(device),
    )


def sam_inputs(
    case: Case, compute_dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """compute, master and gradient; compute holds NaN, so that whatever is not written shows."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    master = torch.randn(case.shape, generator=generator)
    gradient = torch.randn(case.shape, generator=generator)
    compute = torch.full(case.shape, torch.nan, dtype=compute_dtype)
    spoil(case.values, gradient)
    if case.values == "nan":
        master[..., 5] = torch.nan
    if case.values == "inf":
        master[..., 5] = torch.inf
    return (
        lay_out(compute, case.layout).to(device),
        lay_out(master, case.layout).to(device),
        lay_out(gradient.to(case.gradient_dtype), case.layout).to(device),
    )


def spoil(values: str, gradient: Tensor) -> None:
    """The first image of `gradient` has the unusual values that a case asks for."""
    if values == "nan":
        gradient[0, 3] = torch.nan
    if values == "inf":
        gradient[0, 3] = torch.inf
        gradient[0, 4] = -torch.inf
    if values == "zero":
        gradient[0] = 0
    if values == "tiny":
        # Representable in bf16 and fp32; the squares are not.
        gradient[0] *= 1e-22


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same values in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7.0, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return tensor
