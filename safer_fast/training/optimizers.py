"""Optimizers over the selected master ranges, and the averaging of weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safer_fast.config.schema import OptimConfig
from safer_fast.models.arenas import Range, TrainedWeights
from safer_fast.models.perturbation import inverse_norm


def build_optimizer(config: OptimConfig, selection: TrainedWeights) -> torch.optim.Optimizer:
    """The optimizer of the selected masters, whose gradients are the selection's gradient ranges.

    Matrices of layers are decayed; biases, norms, tokens and embeddings are not. LAMB gets one
    parameter for each tensor (its trust ratio is defined so), the others one for each range. Raises
    ValueError for an apex optimizer where apex is not built or the weights are not on a GPU.
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
    # a tensor: a recording of the update reads its value anew each time
    rate = torch.tensor(config.learning_rate, device=selection.parameters[0].device)
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(
            groups, lr=rate, betas=config.betas, fused=True, capturable=rate.is_cuda
        )
        # no warning: a step is not always captured, and fused it is as fast
        optimizer._warned_capturable_if_run_uncaptured = True
        return optimizer
    return _with_momentum(torch.optim.SGD(groups, lr=rate, momentum=config.momentum, fused=True))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Every group of the optimizer uses this learning rate from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def step_unless(is_skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer has stepped unless `is_skipped`, 0-d, is 1: decided on the device."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = is_skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif not is_skipped:  # apex cannot skip on the device: one synchronisation per step
        optimizer.step()


def _with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The optimizer with momenta of zero, which torch would make, unfilled, in the first update.

    A first update that is skipped on the device would leave them unfilled.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class AveragedWeights:
    """Exponential moving average of all masters: average <- decay * average + (1 - decay) * w.

    A weight that has not changed since the start of the average is the same in it, bit for bit.
    """

    def __init__(self, master: Tensor, decay: float) -> None:
        self.average = master.clone()
        self.decay = decay

    def update(self, master: Tensor) -> None:
        """One step of the average."""
        self.average.lerp_(master, 1 - self.decay)


def _parameter(part: Range) -> nn.Parameter:
    parameter = nn.Parameter(part.master)
    parameter.grad = part.gradient
    return parameter


def _apex_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """One of NVIDIA apex's fused optimizers; amp_C holds the kernels, which must be built."""
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


def clip_(ranges: Iterable[Range], squares: Tensor, norm: float) -> None:
    """The gradients, whose squares sum up to `squares`, are no longer than `norm` together.

    Where that is NaN they stay as they are: what lies between parameters is never written again,
    and must not become NaN with them.
    """
    shrink = (norm * inverse_norm(squares)).clamp(max=1.0)
    for part in ranges:
        part.gradient.mul_(torch.where(squares > 0, shrink, 1.0))
