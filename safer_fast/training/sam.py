"""Sharpness-aware minimization: the ascent to w + e, and back to exactly the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature

import torch
from torch import Tensor, nn

from safer_fast.attacks.arguments import check_differentiable, check_model, described
from safer_fast.config.checks import check_number
from safer_fast.config.messages import meant, shortened
from safer_fast.config.ranges import FACTOR
from safer_fast.config.schema import SAMConfig
from safer_fast.models.arenas import TrainedWeights, module_selection
from safer_fast.models.perturbation import ascend_, restore_
from safer_fast.models.robust_model import RobustModel


def ascend_as_set_(selection: TrainedWeights, config: SAMConfig, is_relative: bool) -> None:
    """Move a selection to w + e, as one group or layer by layer; see `ascend_`.

    is_relative: radii are relative to the norms of layers, with `sam.layerwise`.
    """
    groups = selection.groups.values() if config.layerwise else [selection.ranges]
    relative = config.layerwise and is_relative
    ascend_(groups, config.rho, adaptive=config.adaptive, relative=relative)


class SharpnessAware:
    """SAM over some layers of any module, around any optimizer of its parameters.

    SAM: Foret et al., ICLR 2021; ASAM: Kwon et al., ICML 2021. One step is `ascend(loss)`, then
    `descend(loss)` of the same batch at the perturbed weights.

    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> sam = SharpnessAware(model, ["blocks.1.mlp.fc1"], optimizer, rho=0.05)
    >>> loss = torch.nn.functional.cross_entropy
    >>> sam.ascend(loss(model(images), labels))
    >>> sam.descend(loss(model(images), labels))

    Args:
        model: the module; its parameters keep their storage.
        names: names of the modules (layers) whose own parameters are perturbed and updated, as
            `rank_layers` returns them: relative to the network of a `RobustModel`.
        optimizer: must hold every one of these parameters; parameters of other layers that it
            holds have no gradient and are left alone.
        rho: radius of the perturbation over all selected weights together, at least 0.
        adaptive: ASAM in place of SAM.

    Raises:
        ValueError: unknown names, names without parameters, parameters that the optimizer lacks, an
            optimizer whose step evaluates the loss itself (LBFGS).
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
        check_model(model)
        check_number("rho", rho, FACTOR)
        _check_optimizer(optimizer)
        self.parameters = _parameters_of(model, _checked_names(names))
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = sum(id(parameter) not in held for parameter in self.parameters)
        if missing:
            total = len(self.parameters)
            raise ValueError(
                f"optimizer: expected it to hold all {total} selected parameters, "
                f"{missing} are missing"
            )
        self.optimizer, self.rho, self.adaptive = optimizer, rho, adaptive
        self._selection: TrainedWeights | None = None

    def ascend(self, loss: Tensor) -> None:
        """Differentiate `loss` and move the selected weights to w + e.

        Raises RuntimeError when called twice without `descend` or `restore` in between, and
        ValueError for a loss that is no 0-d tensor with a gradient.
        """
        if self._selection is not None:
            raise RuntimeError("ascend was called twice: descend, or restore, comes first")
        check_differentiable("loss", loss)
        selection = module_selection({"selected": self.parameters})
        selection.store_gradients(selection.gradients_of(loss))
        self._selection = selection
        ascend_([self._selection.ranges], self.rho, adaptive=self.adaptive)

    def descend(self, loss: Tensor) -> None:
        """Differentiate `loss` at w + e, restore w exactly, and take an optimizer step.

        Raises RuntimeError when called without `ascend` before, and ValueError as `ascend` does.
        """
        if self._selection is None:
            raise RuntimeError("descend was called without ascend: ascend comes first")
        check_differentiable("loss", loss)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self.restore()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def restore(self) -> None:
        """Restore the selected weights to w, bit for bit, if they are at w + e."""
        if self._selection is not None:
            restore_(self._selection.ranges)
        self._selection = None


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for what has no groups of parameters, or a step that needs a closure."""
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
        got = described(optimizer)
        raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {got}")
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        got = type(optimizer).__name__
        raise ValueError(f"optimizer: expected one whose step needs no closure, got {got}")


def _checked_names(names: Sequence[str]) -> list[str]:
    """The names as a list; raise ValueError for what is no text, such as parameters."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        got = shortened(repr(names))
        raise ValueError(f"names: expected a list of names of layers, got {got}")
    names = list(names)
    if other := [type(name).__name__ for name in names if not isinstance(name, str)]:
        raise ValueError(f"names: expected names of layers, got {other[0]}")
    return names


def _parameters_of(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    if isinstance(model, RobustModel):
        model, names = model.network, [name.removeprefix("network.") for name in names]
    for name in names:
        try:
            own = list(model.get_submodule(name).parameters(recurse=False))
        except AttributeError:
            hint = meant(name, (known for known, _ in model.named_modules()))
            raise ValueError(f"names: expected a module of the model, got {name!r}{hint}") from None
        if not own:
            raise ValueError(f"names: expected a module with parameters of its own, got {name!r}")
        parameters += own
    if not parameters:
        raise ValueError("names: expected at least one layer, got none")
    return parameters
