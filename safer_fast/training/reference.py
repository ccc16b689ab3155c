"""Reference of the SAFER step in textbook PyTorch: slow, plain, in any precision; tests compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from safer_fast.models.robust_model import RobustModel

Loss = Callable[[Tensor, Tensor], Tensor]


class PlainModel(nn.Module):
    """timm's own network behind a normalisation: undivided, no arenas, weights in one dtype.

    With `autocast` it computes under torch.autocast in that dtype, with the weights as they are.
    """

    def __init__(
        self, model: RobustModel, dtype: torch.dtype, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.network = deepcopy(model.network).to(dtype).requires_grad_(True)
        self.mean, self.std = model.mean.to(dtype), model.std.to(dtype)
        self.dtype, self.autocast = dtype, autocast

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of pixels [B, C, H, W] in [0, 1]."""
        device = images.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            logits: Tensor = self.network((images - self.mean) / self.std)
        return logits.to(self.dtype)


def reference_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    loss: Loss | None = None,
) -> Tensor:
    """PGD as Madry et al. (2018) write it, from `start`, on images [B, C, H, W] in [0, 1]."""
    loss = loss or functional.cross_entropy
    x = start.clone()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        gradient = torch.autograd.grad(loss(model(x), labels), x)[0]
        if norm == "linf":
            x = x.detach() + step_size * gradient.sign()
            x = torch.min(torch.max(x, images - epsilon), images + epsilon)
        else:
            x = x.detach() + step_size * gradient / _norms(gradient).clamp(min=1e-30)
            difference = x - images
            x = images + difference * (epsilon / _norms(difference).clamp(min=1e-30)).clamp(max=1)
        x = x.clamp(0, 1)
    return x.detach()


@dataclass
class ReferenceStep:
    """One step of SAFER over the parameters `names` of a PlainModel's network.

    The whole network runs forward and backward in both passes, the weights are backed up and
    copied back, and `optimizer`, over exactly these parameters, is any of torch's.
    """

    model: PlainModel
    names: Sequence[str]
    optimizer: torch.optim.Optimizer
    rho: float
    epsilon: float
    step_size: float
    steps: int
    norm: str = "linf"
    objective: str = "pgd-at"
    beta: float = 6.0
    adaptive: bool = False
    clip_norm: float | None = None

    def __call__(self, images: Tensor, labels: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights; return the losses at w and at w + e."""
        self.model.eval()
        adversarial = self.attack(images, labels, start)
        parameters = [self.model.network.get_parameter(name) for name in self.names]

        loss = self.loss(adversarial, images, labels)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        worst = loss
        if self.rho > 0:
            backup = [parameter.detach().clone() for parameter in parameters]
            self._perturb(parameters, gradients)
            worst = self.loss(adversarial, images, labels)
            gradients = torch.autograd.grad(worst, parameters, materialize_grads=True)
            with torch.no_grad():
                for parameter, old in zip(parameters, backup, strict=True):
                    parameter.copy_(old)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimizer.step()
        return loss.detach(), worst.detach()

    def attack(self, images: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        """Compute the adversarial examples of a batch."""
        loss: Loss | None = None
        if self.objective == "trades":
            with torch.no_grad():
                clean = self.model(images).softmax(1)

            def loss(logits: Tensor, _: Tensor) -> Tensor:
                return functional.kl_div(logits.log_softmax(1), clean, reduction="sum")

        return reference_pgd(
            self.model,
            images,
            labels,
            start,
            epsilon=self.epsilon,
            step_size=self.step_size,
            steps=self.steps,
            norm=self.norm,
            loss=loss,
        )

    def loss(self, adversarial: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean training loss of a batch."""
        logits = self.model(adversarial)
        if self.objective == "pgd-at":
            return functional.cross_entropy(logits, labels)
        clean = self.model(images)
        robust = functional.kl_div(logits.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
        if self.objective == "trades":
            return functional.cross_entropy(clean, labels) + self.beta * robust.mean()
        probabilities = logits.softmax(1)
        others = probabilities.scatter(1, labels[:, None], 0.0)
        boosted = functional.cross_entropy(logits, labels)
        boosted = boosted - (1.0001 - others.max(1).values + 1e-12).log().mean()
        doubt = 1.0000001 - clean.softmax(1).gather(1, labels[:, None]).squeeze(1)
        mart: Tensor = boosted + self.beta * (robust * doubt).mean()
        return mart

    @torch.no_grad()
    def _perturb(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        sizes = [p.abs() if self.adaptive else torch.ones_like(p) for p in parameters]
        scaled = [size * gradient for size, gradient in zip(sizes, gradients, strict=True)]
        length = torch.cat([gradient.flatten() for gradient in scaled]).norm()
        for parameter, size, gradient in zip(parameters, sizes, scaled, strict=True):
            parameter.add_(self.rho * size * gradient / length)


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of each image, [B, 1, 1, 1]."""
    norms: Tensor = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return norms
