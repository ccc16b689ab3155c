"""A checkpoint: one safetensors file, verified when it is read."""

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
    """Contents of a checkpoint, and the companions it needs."""

    step: int
    path: Path
    state: dict[str, Any]  # values that JSON has
    tensors: dict[str, Tensor]  # on the CPU
    needs: dict[str, str]  # sha256 of the companions by name


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint; its companions are not checked.

    Raises ValueError naming the file and its fault. Nothing in a file is executed.
    """
    metadata = verify(path)
    with naming(path):
        step, state = int(metadata["step"]), json_object(metadata["state"])
    return Checkpoint(step, path, state, read_tensors(path), needs_of(path, metadata))


def needs_of(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Read the companions that a checkpoint needs from its metadata, with their sha256."""
    with naming(path):
        return json_object(metadata["needs"])


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Raise ValueError, one line, for errors of a checkpoint whose contents do not fit the run."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # subclasses are errors of the device
        raise ValueError(f"{path}: it does not fit this run: {reason(error)}") from None


class Companion(NamedTuple):
    """A companion to write: its name, its path, a function that returns its tensors, and a link."""

    name: str
    path: Path
    take: Callable[[], dict[str, Tensor]]
    link: Path | None
