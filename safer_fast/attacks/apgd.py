"""Auto-PGD on buffers that stay where they are: each image's step is halved where it overshoots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from safer_fast.attacks.pgd import EachLoss, Norm
from safer_fast.runtime.cuda_graphs import Buffers

MOMENTUM = 0.75
"""Share of the new step; the rest is of the one before."""
LEAST_RISES = 0.75
"""Share of iterations between two checkpoints that must raise the loss, or the step is halved."""


class Climb:
    """State of Auto-PGD on one part of a batch (Croce & Hein, ICML 2020, without restarts).

    A step begins at 2 epsilon. At checkpoints it is halved, and the climb goes on from the best
    point so far, for images whose loss rose too rarely since the last one, or whose step was kept
    there and whose best loss is no better. As AutoAttack's library computes it, the first step
    counts as a rise where its loss is above 0.

    Args:
        buffers: hold the state, for recordings to find it again.
        start: where the climb begins, within [0, 1].
        images: [B, ...], pixels in any order.
        epsilon: 0-d. Recordings read these three: they must not move either.
    """

    def __init__(
        self, buffers: Buffers, start: Tensor, images: Tensor, epsilon: Tensor, norm: Norm
    ) -> None:
        self.start, self.images, self.epsilon, self.norm = start, images, epsilon, norm

        def reserve(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return buffers.reserve(f"climb {name}", shape, dtype, start.device)

        pixels, num_images = partial(reserve, dtype=start.dtype), len(start)
        self.now, self.before = pixels("now", *start.shape), pixels("before", *start.shape)
        self.best = pixels("best", *start.shape)
        """Points of the highest loss so far, [B, ...]."""
        self.gradient = pixels("gradient", *start.shape)
        self.best_gradient = pixels("best gradient", *start.shape)
        self.step_size = reserve("step size", num_images)
        self.loss, self.best_loss = reserve("loss", num_images), reserve("best loss", num_images)
        self.checked_loss = reserve("checked loss", num_images)
        self.rises = reserve("rises", num_images)
        self.was_halved = reserve("halved", num_images, dtype=torch.bool)
        self.share = reserve("share")
        """Share of the new step in the next iteration, 0-d: 1 in the first."""
        self.num_checked = reserve("checked")
        """Iterations since the last checkpoint, 0-d, if the next iteration ends at one; else 0."""

    def begin_(self, model: nn.Module, targets: Tensor, losses: EachLoss) -> None:
        """Take loss and gradient of the start; the model must be `frozen`."""
        for points in (self.now, self.before, self.best):
            points.copy_(self.start)
        values, gradient = _differentiated(model, self.now, targets, losses)
        for gradients in (self.gradient, self.best_gradient):
            gradients.copy_(gradient)
        for values_so_far in (self.best_loss, self.checked_loss):
            values_so_far.copy_(values)
        self.step_size.copy_((2 * self.epsilon).expand_as(values))
        self.loss.zero_()
        self.rises.zero_()
        self.num_checked.zero_()
        self.was_halved.fill_(True)
        self.share.fill_(1.0)

    def step_(self, model: nn.Module, targets: Tensor, losses: EachLoss, is_last: bool) -> None:
        """Take a step, and halve steps at a checkpoint; the last one needs no gradient."""
        moved = self._moved()
        self.before.copy_(self.now)
        if is_last:
            with torch.no_grad():
                values = _of_each(losses, model(moved), targets)
            self._keep_best(moved, values)
            return
        values, gradient = _differentiated(model, moved, targets, losses)
        is_better = self._keep_best(moved, values)
        self.best_gradient.copy_(_where(is_better, gradient, self.best_gradient))
        self.rises.add_(values > self.loss)
        self.loss.copy_(values)
        is_halved = self.rises <= LEAST_RISES * self.num_checked
        is_halved |= ~self.was_halved & (self.checked_loss >= self.best_loss)
        is_checked = self.num_checked > 0
        is_halved &= is_checked
        self.was_halved.copy_(torch.where(is_checked, is_halved, self.was_halved))
        self.checked_loss.copy_(torch.where(is_checked, self.best_loss, self.checked_loss))
        self.rises.mul_(~is_checked)
        self.step_size.copy_(torch.where(is_halved, self.step_size / 2, self.step_size))
        self.now.copy_(_where(is_halved, self.best, moved))
        self.gradient.copy_(_where(is_halved, self.best_gradient, gradient))
        self.share.fill_(MOMENTUM)

    def _keep_best(self, moved: Tensor, values: Tensor) -> Tensor:
        """Keep points of a higher loss; return which they are, bool [B]."""
        is_better = values > self.best_loss
        self.best.copy_(_where(is_better, moved, self.best))
        self.best_loss.copy_(torch.where(is_better, values, self.best_loss))
        return is_better

    def _moved(self) -> Tensor:
        """Points after a step with momentum, within ball and [0, 1]."""
        project = self._into_linf if self.norm == "linf" else self._into_l2
        along = self.gradient.sign() if self.norm == "linf" else _unit(self.gradient)
        ahead = project(self.now + _spread(self.step_size, self.now) * along)
        drift = (self.now - self.before) * (1 - self.share)
        return project(self.now + (ahead - self.now) * self.share + drift)

    def _into_linf(self, points: Tensor) -> Tensor:
        low, high = self.images - self.epsilon, self.images + self.epsilon
        return torch.min(torch.max(points, low), high).clamp(0, 1)

    def _into_l2(self, points: Tensor) -> Tensor:
        away = points - self.images
        length = _spread(_lengths(away), away)
        return (self.images + _unit(away) * torch.minimum(length, self.epsilon)).clamp(0, 1)


def climb(
    state: Climb,
    model: nn.Module,
    targets: Tensor,
    losses: EachLoss,
    steps: int,
    run: Callable[[str, Callable[[], None]], None],
) -> Tensor:
    """Take all steps, at least 1, and return the points of the highest loss.

    run: calls a function, or replays what it recorded of it under that name. The model is called
    `steps` + 1 times, and differentiated in all but the last.
    """
    limits, num_checked = checkpoints(steps), 0
    run("begin", partial(state.begin_, model, targets, losses))
    for index in range(steps):
        is_last = index == steps - 1
        if not is_last and limits.get(index, 0) != num_checked:
            num_checked = limits.get(index, 0)
            state.num_checked.fill_(num_checked)
        run("last" if is_last else "step", partial(state.step_, model, targets, losses, is_last))
    return state.best


def checkpoints(steps: int) -> dict[int, int]:
    """Iterations, from 0, at whose end steps may be halved; and how many are between two such."""
    length, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, index = {}, length - 1
    while index < steps:
        found[index] = length
        length = max(length - less, least)
        index += length
    return found


def _differentiated(
    model: nn.Module, points: Tensor, targets: Tensor, losses: EachLoss
) -> tuple[Tensor, Tensor]:
    """Losses of images [B], and the gradient of their sum with respect to the points."""
    pixels = points.detach().requires_grad_()
    with torch.enable_grad():
        values = _of_each(losses, model(pixels), targets)
    return values.detach(), torch.autograd.grad(values.sum(), pixels)[0]


def _of_each(losses: EachLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each image, fp32 [B]."""
    values = losses(logits, targets)
    if values.shape != logits.shape[:1]:
        raise ValueError(
            "--attack.name: expected pgd with an objective whose attack raises a sum over images, "
            "got apgd, which needs the loss of each image [B]"
        )
    return values.float()


def _lengths(values: Tensor) -> Tensor:
    lengths: Tensor = values.flatten(1).norm(dim=1)
    return lengths


def _unit(values: Tensor) -> Tensor:
    return values / (_spread(_lengths(values), values) + 1e-12)


def _spread(of_each: Tensor, alike: Tensor) -> Tensor:
    """View [B] as [B, 1, ...]."""
    return of_each.view(-1, *[1] * (alike.ndim - 1))


def _where(chosen: Tensor, values: Tensor, others: Tensor) -> Tensor:
    return torch.where(_spread(chosen, values), values, others)
