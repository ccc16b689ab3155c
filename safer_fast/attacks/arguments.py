"""Arguments of an attack, checked before it starts: radii, pixels, labels, shapes, devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from numbers import Integral

import torch
from torch import Tensor, nn

from safer_fast.config.checks import check_ball, check_number
from safer_fast.config.messages import meant, shortened

Loss = Callable[[Tensor, Tensor], Tensor]
WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model that is no module, such as a function."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {described(model)}")


def check_function(name: str, function: object) -> None:
    """Raise ValueError for a loss that cannot be called, such as its name."""
    if not callable(function):
        got = shortened(repr(function))
        raise ValueError(f"{name}: expected a function of logits and labels, got {got}")


def check_logits(logits: object, num_images: int) -> None:
    """Raise ValueError for what a model returned if it is no tensor [num_images, K]."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != num_images:
        raise ValueError(f"model: expected logits [{num_images}, K], got {described(logits)}")


def check_sum(name: str, loss: Tensor) -> None:
    """Raise ValueError for a loss that is no tensor, or that of each image in place of a sum."""
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(f"{name}: expected a loss that is a 0-d tensor, got {described(loss)}")


def check_differentiable(name: str, loss: Tensor) -> None:
    """Raise ValueError for a loss that is no sum, or that was computed without a gradient."""
    check_sum(name, loss)
    if not loss.requires_grad:
        raise ValueError(f"{name}: expected a loss with a gradient, got one without")


def check_gradients(function: str) -> None:
    """Raise ValueError in inference mode, where nothing can be differentiated."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{function}: expected a call outside of torch.inference_mode(), got one in it: leave "
            "it, torch.no_grad() works"
        )


def as_classes(labels: Tensor) -> Tensor:
    """Labels of other whole numbers as int64; any others as they are."""
    is_number = isinstance(labels, Tensor) and labels.dtype in WHOLE_NUMBERS
    return labels.long() if is_number else labels


@contextmanager
def naming_dtypes(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Name both dtypes in place of torch's error where a model does not take that of the images.

    Some models take others than that of their weights, which only they know.
    """
    try:
        yield
    except RuntimeError as error:
        floats = [weight.dtype for weight in model.parameters() if weight.is_floating_point()]
        is_told = re.search("dtype|scalar type|type .* should be the same", str(error))
        if not floats or images.dtype in floats or not is_told:
            raise
        expected, got = (str(dtype).removeprefix("torch.") for dtype in (floats[0], images.dtype))
        raise ValueError(f"images: expected {expected} as the model has, got {got}") from error


def check_settings(
    images: Tensor, *, norm: str, epsilon: float | Tensor, step_size: float | Tensor, steps: int
) -> None:
    """Raise ValueError for arguments that are wrong whatever values the tensors hold."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected float [B, C, H, W], got {described(images)}")
    if norm not in ("linf", "l2"):
        got = shortened(repr(norm)) + meant(norm, ("linf", "l2"))
        raise ValueError(f"norm: expected linf or l2, got {got}")
    is_whole = isinstance(steps, Integral)
    if not is_whole or steps < 0:
        raise ValueError(f"steps: expected a whole number of at least 0, got {steps!r}")
    for name, value in (("epsilon", epsilon), ("step_size", step_size)):
        if isinstance(value, Tensor) and (value.ndim or value.device != images.device):
            raise ValueError(
                f"{name}: expected a 0-d tensor on {images.device}, got {described(value)}"
            )
        if not isinstance(value, Tensor):
            check_number(name, value)
    if not isinstance(epsilon, Tensor):
        step = None if isinstance(step_size, Tensor) else float(step_size)
        shape = images.shape[1:]
        check_ball(norm, float(epsilon), step, shape=shape, flags=("epsilon", "step_size"))


def checked_loss(
    model: nn.Module, images: Tensor, labels: Tensor, start: Tensor | None, loss: Loss
) -> Loss:
    """The loss, with a check of the logits' shape against the labels in it.

    Raise ValueError unless the tensors and the model's weights fit together, pixels are in [0, 1]
    and labels are classes. This waits for the device once, for all values together.
    """
    _check_devices(model, images, labels)
    if start is not None and (start.shape, start.dtype) != (images.shape, images.dtype):
        expected = described(images)
        raise ValueError(f"start: expected {expected} like images, got {described(start)}")
    last = _check_values(images, labels, start)

    def checked(logits: Tensor, labels: Tensor) -> Tensor:
        check_logits(logits, len(labels))
        num_classes = logits.shape[1]
        if last >= num_classes or (labels.ndim == 2 and labels.shape[1] != num_classes):
            got = last if labels.ndim == 1 else described(labels)
            raise ValueError(f"labels: expected {num_classes} classes as logits have, got {got}")
        if not logits.requires_grad:
            raise ValueError("model: expected logits with a gradient, got some without")
        value = loss(logits, labels)
        check_differentiable("objective", value)
        return value

    return checked


def _check_devices(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: expected int64 [{len(images)}], got {described(labels)}")
    is_classes = labels.ndim == 1 and labels.dtype == torch.int64
    is_probabilities = labels.ndim == 2 and labels.is_floating_point()
    if not (is_classes or is_probabilities) or len(labels) != len(images):
        size = len(images)
        raise ValueError(
            f"labels: expected int64 [{size}] or probabilities [{size}, K], got {described(labels)}"
        )
    if labels.device != images.device:
        raise ValueError(f"labels: expected on {images.device} like images, got {labels.device}")
    devices = {weight.device for weight in chain(model.parameters(), model.buffers())}
    if devices and images.device not in devices:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model: expected on {images.device} like images, got {found}")


def _check_values(images: Tensor, labels: Tensor, start: Tensor | None) -> int:
    """The highest class number, -1 for probabilities; raises ValueError for values out of range."""
    if not images.numel() or not labels.numel():
        return -1
    looked_at = [images, labels] if start is None else [images, labels, start]
    ends = torch.stack([end.double() for values in looked_at for end in values.detach().aminmax()])
    names = ("images", "labels", "start")
    lows_and_highs = dict(zip(names, ends.view(-1, 2).tolist(), strict=False))
    low, high = lows_and_highs.pop("labels")
    for name, (smallest, largest) in lows_and_highs.items():
        if not (smallest >= 0 and largest <= 1):
            raise ValueError(
                f"{name}: expected pixels in [0, 1], got values from {smallest:g} to {largest:g}"
            )
    if labels.ndim == 1 and low < 0:
        raise ValueError(f"labels: expected class numbers from 0, got {int(low)}")
    if labels.ndim == 2 and not (low >= 0 and high <= 1 + 1e-3):
        raise ValueError(f"labels: expected probabilities, got values from {low:g} to {high:g}")
    return int(high) if labels.ndim == 1 else -1


def described(values: object) -> str:
    """Dtype, shape and device of a tensor; the type of anything else."""
    if not isinstance(values, Tensor):
        return type(values).__name__
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)} on {values.device}"
