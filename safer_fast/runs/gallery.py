"""Gallery: a few images before and after an attack, for the report and for TensorBoard."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safer_fast.attacks.correctness import has_finite
from safer_fast.config.messages import printable
from safer_fast.runtime.files import json_object, naming
from safer_fast.runtime.tensor_files import read_metadata, read_tensors, verify, write_tensors

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MOST_IMAGES = 64
NO_CLASS = -1
_MOST_PIXELS = 1024  # along one side
_MOST_BYTES = 128 << 20
_MOST_FACTS_BYTES = 16 << 20
_MOST_CLASSES = 100_000
_FACTS = "gallery"  # where the metadata have them
_TILE = 64  # pixels: smaller images are scaled up to it in a strip


@dataclass(frozen=True)
class Gallery:
    """Images before and after an attack, and a model's predictions for both; all on the CPU.

    images, adversarial: float32 [n, C, H, W] in [0, 1], C being 1 or 3. labels, predicted_before,
    predicted_after: int64 [n]; `NO_CLASS` is predicted where a logit is not finite.
    confidence_before, confidence_after: float32 [n] in [0, 1], the probability of the class that is
    predicted.
    """

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    predicted_before: Tensor
    predicted_after: Tensor
    confidence_before: Tensor
    confidence_after: Tensor

    @property
    def amplifications(self) -> list[float]:
        """Factor by which `perturbations` enlarges each perturbation; 1 where it is zero."""
        largest = (self.adversarial - self.images).abs().amax(dim=(1, 2, 3))
        return [1 / (2 * size) if size > 0 else 1.0 for size in largest.tolist()]

    @property
    def perturbations(self) -> Tensor:
        """Adversarial - images [n, C, H, W] as pixels: 0.5 is no change, 0 and 1 the largest."""
        factors = torch.tensor(self.amplifications).view(-1, 1, 1, 1)
        return 0.5 + (self.adversarial - self.images) * factors


@dataclass(frozen=True)
class GalleryFacts:
    """Origin of a gallery. class_names: by label; epsilon: radius, for pixels in [0, 1]."""

    class_names: list[str]
    attack: str
    epsilon: float
    weights: str
    split: str


def make_gallery(model: nn.Module, images: Tensor, labels: Tensor, adversarial: Tensor) -> Gallery:
    """The images beside their adversarial versions, with the model's predictions for both.

    images, adversarial: [n, C, H, W] in [0, 1]; labels: int64 [n]; on the device of the model,
    which computes in eval mode. Raise ValueError where shapes do not fit or n is 0 or over 64.
    """
    count = len(images)
    if images.shape != adversarial.shape or labels.shape != (count,) or not 0 < count <= 64:
        shapes = [list(tensor.shape) for tensor in (images, labels, adversarial)]
        raise ValueError(
            f"images, labels, adversarial: expected 1 to {MOST_IMAGES} of one shape, got {shapes}"
        )
    was_training = model.training
    model.eval()
    try:
        confidence_before, before = _predictions(model, images)
        confidence_after, after = _predictions(model, adversarial)
    finally:
        model.train(was_training)
    return Gallery(
        images=images.detach().float().cpu(),
        adversarial=adversarial.detach().float().cpu(),
        labels=labels.cpu(),
        predicted_before=before,
        predicted_after=after,
        confidence_before=confidence_before,
        confidence_after=confidence_after,
    )


def write_gallery(
    gallery: Gallery,
    path: Path,
    *,
    class_names: Sequence[str],
    attack: str,
    epsilon: float,
    weights: str,
    split: str,
) -> None:
    """Write the gallery and these facts to `path`; a reader never sees half of it.

    Raise ValueError naming the file where it cannot be written, and what `read_gallery` would
    refuse.
    """
    facts = GalleryFacts(list(class_names), attack, float(epsilon), weights, split)
    tensors = _contiguous(gallery)
    try:
        _checked_gallery(tensors, len(_checked_facts(vars(facts)).class_names))
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if num_bytes > _MOST_BYTES - _MOST_FACTS_BYTES:
            raise ValueError(f"{num_bytes:,} bytes")
    except ValueError as error:
        raise ValueError(f"expected what a gallery can hold, got {error}") from None
    with naming(path):
        write_tensors(path, tensors, {_FACTS: json.dumps(vars(facts))})


def read_gallery(path: Path) -> tuple[Gallery, GalleryFacts]:
    """Read a gallery from a file that may come from anybody, and its facts with printable texts.

    Raise ValueError, one line that names the file, where it is damaged or not what
    `write_gallery` writes. Nothing in a file is executed.
    """
    with naming(path):
        if path.is_file() and path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"expected a gallery of at most {_MOST_BYTES:,} bytes, got more")
    try:
        verify(path)
        facts = _checked_facts(json_object(read_metadata(path)[_FACTS]))
        return _checked_gallery(read_tensors(path), len(facts.class_names)), facts
    except (KeyError, RecursionError, ValueError) as error:
        problem = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: expected a gallery of attacked images, got {problem}") from None


def gallery_strip(gallery: Gallery) -> tuple[bytes, int, int]:
    """One PNG with its width and height: images above perturbations above adversarial images."""
    from PIL import Image

    rows = (gallery.images, gallery.perturbations, gallery.adversarial)
    strip = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # [C, 3 H, n W]
    picture = picture_of(strip)
    times = max(1, _TILE // max(gallery.images.shape[2:]))
    size = (times * picture.width, times * picture.height)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    return png_of(picture), picture.width, picture.height


def picture_of(pixels: Tensor) -> Picture:
    """Pixels [C, H, W] in [0, 1] as a picture in grey (C = 1) or colours (C = 3)."""
    from PIL import Image

    values = (255 * pixels).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(values.squeeze(2).numpy() if values.shape[2] == 1 else values.numpy())


def png_of(picture: Picture) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@torch.no_grad()
def _predictions(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(images).float()
    is_finite = has_finite(logits)
    confidence, predicted = logits.softmax(1).max(1)
    confidence = confidence.where(is_finite, 0.0)
    return confidence.cpu(), predicted.where(is_finite, NO_CLASS).cpu()


def _contiguous(gallery: Gallery) -> dict[str, Tensor]:
    return {field.name: getattr(gallery, field.name).contiguous() for field in fields(gallery)}


def _checked_facts(facts: Mapping[str, Any]) -> GalleryFacts:
    expected = {field.name for field in fields(GalleryFacts)}
    if set(facts) != expected:
        raise ValueError(f"facts {sorted(map(printable, facts))!r:.80}")
    names, epsilon = facts["class_names"], facts["epsilon"]
    if not isinstance(names, list) or not 0 < len(names) <= _MOST_CLASSES:
        raise ValueError(f"class_names {names!r:.40}")
    is_number = isinstance(epsilon, int | float) and type(epsilon) is not bool
    if not is_number or not 0 <= epsilon < math.inf or epsilon > 1e6:
        raise ValueError(f"epsilon {epsilon!r:.40}")
    texts = [*names, *(facts[name] for name in ("attack", "weights", "split"))]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{text!r:.40} in place of a text")
    attack, weights, split = map(printable, texts[len(names) :])
    return GalleryFacts(list(map(printable, names)), attack, float(epsilon), weights, split)


def _checked_gallery(tensors: Mapping[str, Tensor], num_classes: int) -> Gallery:
    """The gallery if its tensors are as documented; raise ValueError naming one that is not."""
    names = [field.name for field in fields(Gallery)]
    if sorted(tensors) != sorted(names):
        raise ValueError(f"tensors {sorted(map(printable, tensors))!r:.80}")
    shape = tensors["images"].shape
    if (
        len(shape) != 4
        or not 0 < shape[0] <= MOST_IMAGES
        or shape[1] not in (1, 3)
        or not all(0 < side <= _MOST_PIXELS for side in shape[2:])
    ):
        raise ValueError(f"images of shape {list(shape)!r:.60}")
    for name in names:
        _check_tensor(name, tensors[name], shape, num_classes)
    return Gallery(**tensors)


def _check_tensor(name: str, tensor: Tensor, shape: torch.Size, num_classes: int) -> None:
    is_integer = name == "labels" or name.startswith("predicted")
    dtype = torch.int64 if is_integer else torch.float32
    if tensor.shape != (shape if name in ("images", "adversarial") else shape[:1]):
        raise ValueError(f"{name} of shape {list(tensor.shape)!r:.60}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} of {tensor.dtype}")
    least = NO_CLASS if name.startswith("predicted") else 0
    limit = num_classes - 1 if is_integer else 1
    if not bool(((tensor >= least) & (tensor <= limit)).all()):  # NaN is neither
        raise ValueError(f"{name} outside of {least} to {limit}")
