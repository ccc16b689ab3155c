"""Independent random streams, each named by its purpose."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Derive a 64-bit seed from all arguments; `numbers` must not be negative."""
    words = [seed % 2**64, zlib.crc32(purpose.encode()), *numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def make_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Make a CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *numbers))


def make_permutation(length: int, seed: int, purpose: str, *numbers: int) -> NDArray[np.int64]:
    """Draw a permutation of 0 to `length - 1` with `make_generator`."""
    generator = make_generator(seed, purpose, *numbers)
    order: NDArray[np.int64] = torch.randperm(length, generator=generator).numpy()
    return order
