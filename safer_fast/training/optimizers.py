"""Optimizers over the selected master weights, and the moving average of weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safer_fast.config.schema import OptimConfig
from safer_fast.models.arenas import ParameterArenas, Range, TrainedWeights
from safer_fast.models.perturbation import inverse_norm


def build_optimizer(config: OptimConfig, selection: TrainedWeights) -> torch.optim.Optimizer:
    """Build the optimizer of the selected masters, whose gradients are `selection`'s ranges.

    Weight decay applies to matrices of layers, not to biases, norms, tokens and embeddings. LAMB
    gets one parameter for each tensor (its trust ratio is defined per tensor), the others one for
    each range. Raises ValueError for an apex optimizer where apex is not built or the weights are
    not on a GPU.
    """
    ranges: Sequence[Range] = selection.ranges
    if config.name == "apex-lamb":
        ranges = [part for parts in selection.groups.values() for part in parts]
    groups = [
        {
            "params": [_parameter(part) for part in ranges if part.is_decayed is is_decayed],
            "weight_decay": config.weight_decay if is_decayed else 0.0,
        }
        for is_decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if config.name not in ("adamw", "sgd"):
        return _apex_optimizer(config, groups)
    # a tensor on the device: a CUDA graph of the update reads its current value
    rate = torch.tensor(config.learning_rate, device=selection.parameters[0].device)
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(
            groups, lr=rate, betas=config.betas, fused=True, capturable=rate.is_cuda
        )
        # silences a warning: an uncaptured step is as fast, because the optimizer is fused
        optimizer._warned_capturable_if_run_uncaptured = True
        return optimizer
    return _with_momentum(torch.optim.SGD(groups, lr=rate, momentum=config.momentum, fused=True))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all groups, for the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def step_unless(is_skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer step unless `is_skipped`, 0-d, is 1: decided on the device."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = is_skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif not is_skipped:  # apex cannot skip on the device: one host synchronisation per step
        optimizer.step()


def _with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Give SGD momentum buffers of zeros.

    Torch would allocate them uninitialised in the first update, and an update that is skipped on
    the device would leave them so.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class AveragedWeights:
    """Exponential moving average of all masters: average <- decay * average + (1 - decay) * w.

    A weight that has not changed since the average began is the same in it, bit for bit.
    """

    def __init__(self, arenas: ParameterArenas, decay: float) -> None:
        self.average = arenas.master.clone()
        """Averages of all weights, flat, laid out as `arenas.master`."""
        self.decay, self._arenas = decay, arenas

    def update(self) -> None:
        """Move the average one step towards the current masters."""
        self.average.lerp_(self._arenas.master, 1 - self.decay)

    def state_dict(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Copy the averages of these parameters (default: all), by name."""
        return self._arenas.state_dict(self.average, names)

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Set the averages of all parameters."""
        self.average.copy_(self._arenas.vector_of(weights))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copy an optimizer's state as tensors, named `optimizer.GROUP.PARAMETER.KEY`.

    Counts of steps are among it; apex keeps one for each group, named `optimizer.group.GROUP`.
    """
    state = {}
    for group_number, group in enumerate(optimizer.param_groups):
        if "step" in group:
            state[f"optimizer.group.{group_number}"] = torch.as_tensor(group["step"])
        for number, parameter in enumerate(group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is not None:  # SGD without momentum has None
                    state[f"optimizer.{group_number}.{number}.{key}"] = torch.as_tensor(value)
    return {name: value.clone() for name, value in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Set the state of an optimizer to what `optimizer_state` returned for the same parameters.

    Tensors of other names are ignored.
    """
    for name, value in state.items():
        kind, _, rest = name.partition(".")
        if kind != "optimizer":
            continue
        group_number, _, rest = rest.partition(".")
        if group_number == "group":
            optimizer.param_groups[int(rest)]["step"] = value.item()
            continue
        number, _, key = rest.partition(".")
        group = optimizer.param_groups[int(group_number)]
        parameter = group["params"][int(number)]
        # counts of steps are where the optimizer would make them: on the device only if fused
        stays = key == "step" and not group.get("fused")
        optimizer.state[parameter][key] = value if stays else value.to(parameter.device)


def _parameter(part: Range) -> nn.Parameter:
    parameter = nn.Parameter(part.master)
    parameter.grad = part.gradient
    return parameter


def _apex_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build one of NVIDIA apex's fused optimizers; its compiled kernels are in amp_C."""
    try:
        importlib.import_module("amp_C")
        apex: Any = importlib.import_module("apex.optimizers")
    except ImportError as error:
        raise ValueError(
            f"optim.name: {config.name} needs NVIDIA apex built with its CUDA extensions (the "
            f"PyPI package 'apex' is something else), {error}; adamw and sgd need nothing"
        ) from None
    if not _is_on_gpu(groups[0]["params"][0]):
        raise ValueError(f"optim.name: {config.name} needs a GPU, got cpu; use adamw or sgd")
    lr = config.learning_rate
    if config.name == "apex-sgd":
        optimizer: torch.optim.Optimizer = apex.FusedSGD(groups, lr=lr, momentum=config.momentum)
    elif config.name == "apex-lamb":
        optimizer = apex.FusedLAMB(groups, lr=lr, betas=config.betas, max_grad_norm=0.0)
    else:
        optimizer = apex.FusedAdam(groups, lr=lr, betas=config.betas, adam_w_mode=True)
    return optimizer


def _is_on_gpu(parameter: Tensor) -> bool:
    return parameter.is_cuda


def clip_(ranges: Iterable[Range], squares: Tensor, norm: float | None) -> None:
    """Scale the gradients of all ranges together to a norm of at most `norm`; None: no limit.

    squares: the sum of their squares. Where that is NaN they stay as they are: the padding between
    parameters is never written again, and must not become NaN.
    """
    if norm is None:
        return
    shrink = (norm * inverse_norm(squares)).clamp(max=1.0)
    for part in ranges:
        part.gradient.mul_(torch.where(squares > 0, shrink, 1.0))
