"""Projected gradient descent (PGD); only the pixels are differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from safer_fast import kernels
from safer_fast.attacks.arguments import (
    as_classes,
    check_function,
    check_gradients,
    check_model,
    check_settings,
    checked_loss,
    naming_dtypes,
)
from safer_fast.attacks.gradient_watch import Watch
from safer_fast.config.checks import as_radius

Norm = Literal["linf", "l2"]
PLACES_PER_SEED = 32
AttackLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, K], labels) -> the 0-d loss that the attack raises, a sum over images."""
EachLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, K], labels) -> the loss of each image [B]."""


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | str | Tensor,
    step_size: float | str | Tensor,
    steps: int,
    norm: Norm = "linf",
    start: Tensor | None = None,
    objective: AttackLoss | None = None,
    generator: torch.Generator | None = None,
    check_tensors: bool = True,
    watch: Watch | None = None,
) -> Tensor:
    """Adversarial examples [B, C, H, W] within `epsilon` of `images` and within [0, 1].

    PGD (Madry et al., 2018): from `start`, `steps` times
    x <- clamp(project(x + step_size * sign(g))), g the gradient of the loss at x; for l2, g divided
    by its norm for each image. `steps=1` with `step_size=1.25 * epsilon` is FGSM-RS (Wong et al.,
    2020).

    >>> attacked = pgd(model, images, labels, epsilon=8 / 255, step_size=2 / 255, steps=3)
    >>> bool((attacked - images).abs().max() <= 8 / 255 + 1e-6)
    True

    Args:
        model: takes pixels in [0, 1], gives logits [B, K]. It runs in eval mode without weight
            gradients and is left as it was, also after an exception.
        images: float [B, C, H, W], each value in [0, 1]; not changed.
        labels: class numbers [B], or class probabilities [B, K].
        epsilon, step_size: radii in units of pixels in [0, 1], at least 0, or texts such as
            "8/255"; tensors must be 0-d, on the images' device.
        steps: number of iterations, at least 0.
        start: full starting point [B, C, H, W]; default: `random_start`.
        objective: sum-reduced loss of (logits, labels) to be raised; default: cross-entropy.
        generator: source of the random start, on the images' device; default: torch's own.
        check_tensors: look at the values of images, labels and start too. On a GPU this waits once
            for its queue to run empty; give False where they are known to be right.
        watch: flags images without a gradient of use, and those that start right.

    Raises:
        ValueError: a model that is no module, images that are no float [B, C, H, W] or of a dtype
            that the model does not take, another norm, steps below 0, radii in 255ths, a call in
            `torch.inference_mode`; with `check_tensors` values that are no pixels in [0, 1], labels
            that are no classes, an objective that is no sum, and tensors or a model of other shapes
            or on another device.
    """
    loss = cross_entropy if objective is None else objective
    check_model(model)
    check_function("objective", loss)
    reach: float | Tensor = as_radius("epsilon", epsilon)
    length: float | Tensor = as_radius("step_size", step_size)
    check_settings(images, norm=norm, epsilon=reach, step_size=length, steps=steps)
    if steps:
        check_gradients("pgd")
    labels = as_classes(labels)
    if check_tensors:
        loss = checked_loss(model, images, labels, start, loss)
    radius, step = (_as_scalar(value, images) for value in (reach, length))
    if start is None:
        start = random_start(images, radius, norm, generator)
    adversarial = start.detach().clone()
    with frozen(model), naming_dtypes(model, images):
        for _ in range(steps):
            pgd_step_(model, adversarial, images, labels, step, radius, norm, loss, watch)
    is_half = images.dtype in (torch.bfloat16, torch.float16)
    return _back_in_ball(adversarial, images, radius, norm) if is_half else adversarial


def pgd_step_(
    model: nn.Module,
    adversarial: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    epsilon: Tensor,
    norm: Norm,
    objective: AttackLoss,
    watch: Watch | None = None,
) -> Tensor:
    """Move `adversarial` by one step of PGD in place; the model must be `frozen`.

    The pixels of an image may lie in any order [B, ...] that the model takes; radii are 0-d.
    """
    loss = objective if watch is None else watch.seeing(objective)
    gradient = pixel_gradient(model, adversarial, labels, loss)
    if watch is not None:
        watch.note(gradient)
    move_ = kernels.linf_step_ if norm == "linf" else kernels.l2_step_
    return move_(adversarial, images, gradient, step_size, epsilon)


def _back_in_ball(adversarial: Tensor, images: Tensor, epsilon: Tensor, norm: Norm) -> Tensor:
    """Pixels of half precision that rounding took out of the ball, by up to 6 %, put back into it.

    They become the values that lie nearest to the ball's edge and not beyond it.
    """
    centre, radius = images.double(), epsilon.double()
    difference = adversarial.double() - centre
    if norm == "linf":
        inside = difference.clamp(-radius, radius)
    else:
        length = difference.flatten(1).norm(dim=1).view(-1, *[1] * (images.ndim - 1))
        inside = torch.where(length > radius, difference * (radius / length), difference)
    rounded = (centre + inside).to(images.dtype)
    beyond = (rounded.double() - centre).abs() > inside.abs()
    # numbers from 0 to 1 have the order of their bits
    inwards = torch.where(beyond, -inside.sign(), 0).to(torch.int16)
    return rounded.view(torch.int16).add_(inwards).view(images.dtype)


def random_start(
    images: Tensor,
    epsilon: Tensor,
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images plus noise uniform in the ball of radius `epsilon` (0-d), clamped to [0, 1]."""
    noise = _uniform_in_ball(images.shape, norm, images.device, generator)
    return (images + noise.to(images.dtype) * epsilon).clamp_(0, 1)


def placed_start(
    images: Tensor,
    epsilon: Tensor,
    norm: Norm,
    *,
    position: int,
    seed_of: Callable[[int], int],
) -> Tensor:
    """A random start whose noise depends on an image's position alone, not on its batch.

    Image k of `images` stands at `position` + k of some order. Noise is drawn for PLACES_PER_SEED
    places at a time, with the seed that `seed_of` gives for their number: it is the same however
    images are cut into batches, and batches into parts.
    """
    first, end = position // PLACES_PER_SEED, -(-(position + len(images)) // PLACES_PER_SEED)
    generator = torch.Generator(images.device)
    shape = (PLACES_PER_SEED, *images.shape[1:])
    noise = torch.cat(
        [
            _uniform_in_ball(shape, norm, images.device, generator.manual_seed(seed_of(number)))
            for number in range(first, max(end, first + 1))
        ]
    )
    noise = noise.narrow(0, position - first * PLACES_PER_SEED, len(images))
    return (images + noise.to(images.dtype) * epsilon).clamp_(0, 1)


def _uniform_in_ball(
    shape: Sequence[int], norm: Norm, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Points [B, ...] of the unit ball."""
    if norm == "linf":
        return torch.rand(shape, device=device, generator=generator) * 2 - 1
    noise = torch.randn(shape, device=device, generator=generator)
    lengths = torch.rand(shape[0], device=device, generator=generator)
    scale: Tensor = lengths ** (1 / noise[0].numel()) / noise.flatten(1).norm(dim=1)
    return noise * scale.view(-1, 1, 1, 1)


def pixel_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, objective: AttackLoss
) -> Tensor:
    """Gradient of the objective with respect to the images, in their shape."""
    pixels = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = objective(model(pixels), labels)
    return torch.autograd.grad(loss, pixels)[0]


def finite_pixels(attacked: Tensor, images: Tensor) -> Tensor:
    """The attacked images, with pixels of `images` where a gradient of NaN left NaN.

    Such pixels are no image: an attack that can give nothing else has not succeeded.
    """
    return torch.where(attacked.isfinite(), attacked, images)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over images: no image's gradient depends on how many there are."""
    return functional.cross_entropy(logits, labels, reduction="sum")


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, [B]."""
    return functional.cross_entropy(logits, labels, reduction="none")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, no parameter requiring gradients; afterwards as it was before."""
    modes = [module for module in model.modules() if module.training]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in modes:
        module.training = False
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in modes:
            module.training = True
        for parameter in wanted:
            parameter.requires_grad_(True)


def default_step_size(epsilon: float, steps: int) -> float:
    """1.25 epsilon for a single step (FGSM-RS), 2.5 epsilon / steps for more (Madry et al.)."""
    return 1.25 * epsilon if steps == 1 else 2.5 * epsilon / max(steps, 1)


def _as_scalar(value: float | Tensor, images: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=images.device)
