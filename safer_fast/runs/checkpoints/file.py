"""One safetensors file: written whole or not at all, verified when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from safer_fast.runtime.files import json_object, naming, reason
from safer_fast.runtime.tensor_files import read_tensors, verify


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, and the companions it refers to."""

    step: int
    path: Path
    state: dict[str, Any]  # what JSON knows
    tensors: dict[str, Tensor]  # on the CPU
    needs: dict[str, str]  # sha256 of the companions by name


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file, every byte as it was written; its companions are not looked at.

    Raises ValueError naming the file and what is wrong with it. Nothing in a file is executed.
    """
    metadata = verify(path)
    with naming(path):
        step, state = int(metadata["step"]), json_object(metadata["state"])
    return Checkpoint(step, path, state, read_tensors(path), needs_of(path, metadata))


def needs_of(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """The companions that a checkpoint needs, from its metadata, with their sha256."""
    with naming(path):
        return json_object(metadata["needs"])


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """A checkpoint whose contents do not fit the run becomes a ValueError of one line."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # of the device
        raise ValueError(f"{path}: it does not fit this run: {reason(error)}") from None


class Companion(NamedTuple):
    """What there is to write; `link`: its other name."""

    name: str
    path: Path
    take: Callable[[], dict[str, Tensor]]
    link: Path | None
