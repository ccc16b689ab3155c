"""Safetensors files with a digest of all their bytes: written atomically, verified when read."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from safer_fast.runtime.files import naming, replace, write_new

# start of a file after 8 bytes with the length of its header; the digest follows
_OPENING = b'{"__metadata__":{"sha256":"'
_DIGEST_AT = 8 + len(_OPENING)
_NO_DIGEST = b"0" * 64


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write contiguous CPU tensors to `path`, read the file back, and return its sha256.

    The digest covers the whole file, with zeros in place of itself: any changed byte is noticed.
    """
    # Not the library's save_file: it orders metadata at random, so that equal weights would make
    # different files, syncs nothing to disk, gives the file mode 0600, and leaves files with random
    # names when it is killed. Before version 0.8 it also holds the GIL for 0.9 s per 300 MB.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header({name: tensors[name] for name in order}, metadata)
    digest = hashlib.sha256(header)
    for name in order:
        digest.update(_bytes(tensors[name]))
    header = header.replace(_NO_DIGEST, digest.hexdigest().encode(), 1)

    def write(temporary: Path) -> None:
        write_new(temporary, chain([header], (_bytes(tensors[name]) for name in order)))
        verify(temporary)

    replace(path, write)
    return digest.hexdigest()


def verify(path: Path, expected: str | None = None) -> dict[str, str]:
    """Verify every byte of a file and return its metadata.

    Raises ValueError naming the file if it is damaged or does not have the expected sha256.
    """
    with naming(path):
        if not path.is_file():  # opening a pipe might wait for ever
            raise ValueError("there is no such file")
        with path.open("rb", buffering=0) as file:
            start, recorded = file.read(_DIGEST_AT), file.read(len(_NO_DIGEST))
            if start[8:] != _OPENING:
                raise ValueError("it does not begin like a file of a checkpoint")
            digest = hashlib.sha256(start + _NO_DIGEST)
            # each piece takes the GIL twice: large ones let training run
            piece = memoryview(bytearray(8 << 20))
            while size := file.readinto(piece):
                digest.update(piece[:size])
        if digest.hexdigest().encode() != recorded:
            raise ValueError("its contents are not those that were written")
        if expected not in (None, digest.hexdigest()):
            raise ValueError("it is not the one that was meant")
    return read_metadata(path)


def verify_if_signed(path: Path) -> None:
    """Raise ValueError naming the file if it has a sha256 and its contents do not match it.

    A sha256 elsewhere in the header was copied from another file, and is refused too. Raises the
    exceptions of `safe_open` for a file that is not a safetensors file.
    """
    with safe_open(path, framework="pt") as file:
        is_signed = "sha256" in (file.metadata() or {})
    if is_signed:
        verify(path)


def is_verified(path: Path, digest: str | None) -> bool:
    """True if the file is undamaged, and has this sha256 if one is given."""
    try:
        verify(path, digest)
    except ValueError:
        return False
    return True


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; raises ValueError naming it."""
    with naming(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file to the CPU; raises ValueError naming it."""
    # not mapped: a page that the disk later fails to read would kill the process
    with naming(path):
        return load(path.read_bytes())


def snapshot(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Return a function that copies the tensors to contiguous CPU memory.

    The copies hold the values after all work that is queued now. From a GPU they are made on a
    separate stream, so that training does not wait for them.
    """
    sources = {name: tensor.detach() for name, tensor in tensors.items()}
    devices = {tensor.device for tensor in sources.values() if tensor.is_cuda}
    assert len(devices) <= 1, f"expected tensors of one GPU, got those of {devices}"
    if not devices:
        return lambda: {name: tensor.contiguous() for name, tensor in sources.items()}
    device = devices.pop()
    ready = torch.cuda.current_stream(device).record_event()

    def copies() -> dict[str, Tensor]:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            pinned = {name: _pinned_copy(tensor) for name, tensor in sources.items()}
        stream.synchronize()
        sources.clear()  # frees their memory while the file is written
        return pinned

    return copies


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header of the file: 8 bytes of length, JSON, and spaces up to a multiple of 8 bytes."""
    own = {"sha256": _NO_DIGEST.decode(), "format": "pt", **metadata}
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": own}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype, shape = _dtype_name(tensor.dtype), list(tensor.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in safetensors: BF16, F32, I64, U8, BOOL."""
    name = str(dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
    return name.replace("ui", "u").upper()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _pinned_copy(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
