"""Zero-shot logits: embeddings of images compared with text embeddings of the classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from safer_fast.config.messages import shortened
from safer_fast.config.untrusted import load_yaml
from safer_fast.data.formats.arrays import check_memory, load_array, open_archive
from safer_fast.runtime.tensor_files import read_metadata, read_tensors, write_tensors

FLAG = "--objective.text_embeddings"
EMBEDDINGS, CLASS_NAMES = "embeddings", "class_names"
"""Names in a file of text embeddings, the second of metadata or an array of texts."""


class TextHead(nn.Module):
    """Classifier without weights to train: cosine similarities divided by a temperature.

    `forward` takes embeddings [B, D] and returns float32 logits [B, K].

    Args:
        embeddings: of a text for each class [K, D], of any length.
        temperature: above 0; CLIP's own is 0.01.
        class_names: of the K classes, None where they have none.
    """

    embeddings: Tensor

    def __init__(
        self, embeddings: Tensor, temperature: float, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        units = functional.normalize(embeddings.float(), dim=1)
        self.register_buffer("embeddings", units, persistent=False)
        self.temperature = temperature
        self.class_names = None if class_names is None else list(class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.embeddings)

    @property
    def width(self) -> int:
        """Numbers of an embedding D."""
        return self.embeddings.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        units = functional.normalize(images.float(), dim=1)
        return units @ self.embeddings.T / self.temperature

    def for_classes(self, names: Sequence[str], flag: str = FLAG) -> TextHead:
        """Return this head with its rows in the order of the data's classes.

        Rows without names, and data whose names are numbers, are taken in their order. Raises
        ValueError naming `flag` for other classes.
        """
        if self.num_classes != len(names):
            raise ValueError(
                f"{flag}: expected embeddings of {len(names)} classes as the data have, got "
                f"{self.num_classes}"
            )
        own = self.class_names
        if own is None or list(names) == [str(number) for number in range(len(names))]:
            order = list(range(len(names)))
        elif other := next((name for name in names if name not in own), None):
            raise ValueError(
                f"{flag}: expected an embedding of the data's class {shortened(other)}, got those "
                f"of {shortened(', '.join(own))}"
            )
        else:
            order = [own.index(name) for name in names]
        return TextHead(self.embeddings[order], self.temperature, names)

    def check_width(self, width: int, flag: str = FLAG) -> None:
        """Raise ValueError naming `flag` unless embeddings of images have as many numbers."""
        if self.width != width:
            raise ValueError(
                f"{flag}: expected embeddings of {width} numbers as the network gives, got "
                f"{self.width}"
            )

    def digest(self) -> str:
        """Digest of the embeddings, sixteen hexadecimal digits."""
        values = self.embeddings.cpu().contiguous().numpy()
        return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()

    def save(self, path: Path) -> None:
        """Write a file that `read_text_head` reads; raises ValueError naming it on failure."""
        names = {} if self.class_names is None else {CLASS_NAMES: json.dumps(self.class_names)}
        write_tensors(path, {EMBEDDINGS: self.embeddings.cpu().contiguous()}, names)


def read_text_head(path: str | Path, temperature: float, flag: str = FLAG) -> TextHead:
    """Read text embeddings from a .safetensors or .npz file; code in it is never executed.

    It has one matrix of floats [K, D], `embeddings` if it has several arrays, and may have class
    names: a JSON list in the metadata `class_names` of safetensors, an array of texts of that name
    in .npz. Raises ValueError naming `flag` for other files and for values that are not finite.
    """
    file = Path(path)
    reader = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(file.suffix.lower())
    if reader is None or not file.is_file():
        raise ValueError(
            f"{flag}: expected a .safetensors or .npz file, got {shortened(str(path))}"
        )
    embeddings, names = reader(file, flag)
    shape = list(embeddings.shape)
    if not embeddings.is_floating_point() or embeddings.ndim != 2 or min(shape) < 2:
        raise ValueError(
            f"{flag}: expected float embeddings [K, D] of at least two classes, got "
            f"{str(embeddings.dtype).removeprefix('torch.')} {shape} in {file}"
        )
    if not embeddings.isfinite().all() or not embeddings.float().norm(dim=1).all():
        raise ValueError(
            f"{flag}: expected finite embeddings other than zero, got others in {file}"
        )
    if names is not None and (len(names) != len(embeddings) or len(set(names)) != len(names)):
        raise ValueError(
            f"{flag}: expected {len(embeddings)} different class names, as many as embeddings, got "
            f"{len(names)} in {file}"
        )
    return TextHead(embeddings, temperature, names)


def _read_safetensors(file: Path, flag: str) -> tuple[Tensor, list[str] | None]:
    try:
        tensors, metadata = read_tensors(file), read_metadata(file)
    except ValueError as error:
        raise ValueError(f"{flag}: expected safetensors, got {error}") from None
    name = _name_of(list(tensors), file, flag)
    text = metadata.get(CLASS_NAMES)
    if text is None:
        return tensors[name], None
    try:
        names = load_yaml(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{flag}: expected class_names as a JSON list of texts in {file}")
    return tensors[name], names


def _read_npz(file: Path, flag: str) -> tuple[Tensor, list[str] | None]:
    with file.open("rb") as opened, open_archive(opened, file, flag) as archive:
        arrays = [name for name in archive.files if name != CLASS_NAMES]
        name = _name_of(arrays, file, flag)
        check_memory(archive, [name, CLASS_NAMES], file, flag)
        values = load_array(archive, name, file, flag)
        names = None
        if CLASS_NAMES in archive.files:
            texts = load_array(archive, CLASS_NAMES, file, flag)
            if texts.ndim != 1 or texts.dtype.kind != "U":
                raise ValueError(f"{flag}: expected class_names as texts [K] in {file}")
            names = [str(text) for text in texts]
    try:
        return torch.from_numpy(values.copy()), names
    except TypeError:
        raise ValueError(
            f"{flag}: expected float embeddings [K, D], got {values.dtype} in {file}"
        ) from None


def _name_of(names: Sequence[str], file: Path, flag: str) -> str:
    """The name of the embeddings: the only one, or `embeddings`."""
    if len(names) == 1:
        return names[0]
    if EMBEDDINGS not in names:
        got = shortened(", ".join(names)) or "none"
        raise ValueError(f"{flag}: expected an array {EMBEDDINGS} [K, D], got {got} in {file}")
    return EMBEDDINGS
