"""Sharpness-aware minimization: to the worst weights nearby, and exactly back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from safer_fast import kernels
from safer_fast.config import SAMConfig
from safer_fast.parameters import Range, Selection, module_selection
from safer_fast.ranges import FACTOR
from safer_fast.validation import check_number


def ascend_(
    groups: Iterable[Sequence[Range]],
    rho: float,
    *,
    adaptive: bool = False,
    relative: bool = False,
) -> None:
    """The network reads w + e, where e raises the loss most in each group's ball of radius rho.

    e = rho * g / ||g|| over all ranges of a group together (SAM, Foret et al., 2021, equation 2);
    `adaptive`: e = rho * w^2 g / ||w g|| (ASAM, Kwon et al., 2021, with T = |w| for every weight);
    `relative`: the radius is rho * ||w|| of the group (AWP, Wu et al., 2020, equation 9). A zero
    gradient leaves the weights as they are. Masters and gradients are only read.
    """
    for ranges in groups:
        scale = rho * inverse_norm(gradient_squares(ranges, adaptive))
        if relative:
            scale = scale * weight_norm(ranges)
        perturb_(ranges, scale, adaptive=adaptive)


def ascend_as_set_(selection: Selection, config: SAMConfig, is_relative: bool) -> None:
    """`ascend_` over a selection, as one group or layer by layer; relative radii are those of
    layers."""
    groups = selection.groups.values() if config.layerwise else [selection.ranges]
    relative = config.layerwise and is_relative
    ascend_(groups, config.rho, adaptive=config.adaptive, relative=relative)


def perturb_(ranges: Iterable[Range], scale: Tensor, *, adaptive: bool = False) -> None:
    """Compute <- cast(master + scale * gradient) for each range; `scale` is 0-d on the device."""
    for part in ranges:
        kernels.perturb_(part.compute, part.master, part.gradient, scale, adaptive)


def restore_(ranges: Iterable[Range]) -> None:
    """Compute <- cast(master): the very weights of before `ascend_`."""
    for part in ranges:
        kernels.restore_(part.compute, part.master)


def clip_(ranges: Iterable[Range], squares: Tensor, norm: float) -> None:
    """The gradients, whose squares sum up to `squares`, are no longer than `norm` together.

    Where that is NaN they stay as they are: what lies between parameters is never written again,
    and must not become NaN with them.
    """
    shrink = (norm * inverse_norm(squares)).clamp(max=1.0)
    for part in ranges:
        part.gradient.mul_(torch.where(squares > 0, shrink, 1.0))


def gradient_squares(ranges: Iterable[Range], adaptive: bool = False) -> Tensor:
    """||g||^2 of all ranges together, or ||w g||^2; 0-d float32 on the device."""
    sums = [
        kernels.sum_squares(part.gradient, part.master if adaptive else None) for part in ranges
    ]
    return torch.stack(sums).sum()


def weight_norm(ranges: Iterable[Range]) -> Tensor:
    """||w|| of all ranges together; 0-d float32 on the device."""
    return torch.stack([kernels.sum_squares(part.master) for part in ranges]).sum().sqrt()


def inverse_norm(squares: Tensor) -> Tensor:
    """1 / sqrt(squares), and 0 where that is 0; NaN stays NaN."""
    return torch.where(squares == 0, 0.0, squares.rsqrt())


class SharpnessAware:
    """SAM over some layers of any module, around any optimizer of its parameters.

    One step is `ascend(loss)`, then `descend(loss)` of the same batch at the perturbed weights:

        sam = SharpnessAware(model, ["blocks.10.mlp.fc1"], optimizer, rho=0.05)
        sam.ascend(objective(model(images), labels))
        sam.descend(objective(model(images), labels))

    Args:
        model: the module; its parameters keep their storage.
        names: names of the modules (layers) whose own parameters are perturbed and updated.
        optimizer: must hold every one of these parameters; parameters of other layers that it
            holds have no gradient and are left alone.
        rho: radius of the perturbation over all selected weights together, at least 0.
        adaptive: ASAM in place of SAM.

    Raises:
        ValueError: unknown names, names without parameters, parameters that the optimizer lacks.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        optimizer: torch.optim.Optimizer,
        *,
        rho: float,
        adaptive: bool = False,
    ) -> None:
        check_number("rho", rho, FACTOR)
        self.parameters = _parameters_of(model, names)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = sum(id(parameter) not in held for parameter in self.parameters)
        if missing:
            total = len(self.parameters)
            raise ValueError(
                f"optimizer: expected it to hold all {total} selected parameters, "
                f"{missing} are missing"
            )
        self.optimizer, self.rho, self.adaptive = optimizer, rho, adaptive
        self._selection: Selection | None = None

    def ascend(self, loss: Tensor) -> None:
        """Differentiates `loss` and moves the selected weights to w + e.

        Raises RuntimeError when called twice without `descend` or `restore` in between.
        """
        if self._selection is not None:
            raise RuntimeError("ascend was called twice: descend, or restore, comes first")
        gradients = torch.autograd.grad(loss, self.parameters)
        self._selection = module_selection({"selected": self.parameters})
        self._selection.store_gradients(gradients)
        ascend_([self._selection.ranges], self.rho, adaptive=self.adaptive)

    def descend(self, loss: Tensor) -> None:
        """Differentiates `loss` at w + e, goes back to w exactly, and lets the optimizer step."""
        gradients = torch.autograd.grad(loss, self.parameters)
        self.restore()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def restore(self) -> None:
        """The selected weights are w again, bit for bit; nothing happens if they already are."""
        if self._selection is not None:
            restore_(self._selection.ranges)
        self._selection = None


def _parameters_of(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    for name in names:
        try:
            own = list(model.get_submodule(name).parameters(recurse=False))
        except AttributeError:
            raise ValueError(f"names: expected a module of the model, got {name!r}") from None
        if not own:
            raise ValueError(f"names: expected a module with parameters of its own, got {name!r}")
        parameters += own
    if not parameters:
        raise ValueError("names: expected at least one layer, got none")
    return parameters
