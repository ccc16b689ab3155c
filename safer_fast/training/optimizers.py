"""Optimizers over the selected master weights, and the moving average of weights."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safer_fast.config.schema import OptimConfig
from safer_fast.models.arenas import ParameterArenas, Range, TrainedWeights
from safer_fast.models.perturbation import inverse_norm

MUON_MOMENTUM = 0.95
"""Share of the running mean of gradients that Muon keeps in a step."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5 in an iteration that moves singular values towards 1."""
ITERATIONS = 5
SMALLEST_NORM = 1e-7


def build_optimizer(
    config: OptimConfig, selection: TrainedWeights, inner: Collection[str] = ()
) -> torch.optim.Optimizer:
    """Build the optimizer of the selected masters, whose gradients are `selection`'s ranges.

    Weight decay applies to matrices of layers, not to biases, norms, tokens and embeddings. LAMB
    gets one parameter for each tensor (its trust ratio is defined per tensor), the others one for
    each range. Muon changes the matrices of the layers named in `inner`, AdamW all other weights.
    Raises ValueError for an apex optimizer where apex is not built or the weights are not on a GPU.
    """
    ranges: Sequence[Range] = selection.ranges
    matrices: list[Range] = []
    if config.name in ("apex-lamb", "muon"):
        ranges = [part for parts in selection.groups.values() for part in parts]
    if config.name == "muon":
        own = [part for name, parts in selection.groups.items() if name in inner for part in parts]
        matrices = [part for part in own if part.is_decayed and len(part.shape) == 2]
        taken = {id(part) for part in matrices}
        ranges = [part for part in ranges if id(part) not in taken]
    groups = [
        {
            "params": [_parameter(part) for part in ranges if part.is_decayed is is_decayed],
            "weight_decay": config.weight_decay if is_decayed else 0.0,
        }
        for is_decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if config.name not in ("adamw", "sgd", "muon"):
        return _apex_optimizer(config, groups)
    # a tensor on the device: a CUDA graph of the update reads its current value
    rate = torch.tensor(config.learning_rate, device=selection.parameters[0].device)
    if config.name == "sgd":
        return _with_momentum(
            torch.optim.SGD(groups, lr=rate, momentum=config.momentum, fused=True)
        )
    adamw = _adamw(config, groups, rate) if groups else None
    if matrices:
        return Muon([_matrix(part) for part in matrices], rate, config.weight_decay, adamw)
    assert adamw is not None
    return adamw


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


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` for matrices, with any other optimizer of torch for the other weights.

    Keller Jordan et al., 2024: a step goes along the orthogonal matrix nearest to the gradient's
    Nesterov momentum, found by five Newton-Schulz iterations in bf16. It is as long as AdamW's
    steps are, as torch has it with `match_rms_adamw` (arXiv 2502.16982), so that AdamW's learning
    rates and weight decay carry over. Unlike torch's, this one never waits for the device, can be
    captured in a CUDA graph, and skips a step where `found_inf`, 0-d, is 1.

    Args:
        matrices: 2-d parameters with gradients; their momentum starts as zeros.
        rate: learning rate, 0-d, on the matrices' device.
        weight_decay: decay of the matrices.
        others: the optimizer of the other weights; None: there are none.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        rate: Tensor,
        weight_decay: float,
        others: torch.optim.Optimizer | None = None,
    ) -> None:
        super().__init__([{"params": list(matrices), "weight_decay": weight_decay}], {"lr": rate})
        self.found_inf = torch.zeros((), device=rate.device)
        for matrix in matrices:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        self._others = others
        if others is not None:  # one list of groups and one state, for both to be saved as one
            self.param_groups += others.param_groups
            others.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change all weights by their gradients, unless `found_inf` is 1; `closure` is not used."""
        assert closure is None
        is_taken = self.found_inf == 0
        group = self.param_groups[0]
        for matrix in group["params"]:
            momentum = self.state[matrix]["momentum_buffer"]
            moved = momentum.lerp(matrix.grad, 1 - MUON_MOMENTUM)
            direction = orthogonalised(matrix.grad.lerp(moved, MUON_MOMENTUM)).float()
            rate = group["lr"] * (0.2 * math.sqrt(max(matrix.shape)))
            decayed = matrix * (1 - group["lr"] * group["weight_decay"])
            matrix.copy_(torch.where(is_taken, decayed - rate * direction, matrix))
            momentum.copy_(torch.where(is_taken, moved, momentum))
        if self._others is not None:
            others: Any = self._others
            others.found_inf = self.found_inf
            others.step()


def orthogonalised(matrix: Tensor) -> Tensor:
    """Compute about U V^T of a matrix U S V^T [n, m], in bf16; zeros stay zeros.

    Singular values come out between about 0.7 and 1.2, not at 1: that is as good, and cheaper.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


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


def _adamw(
    config: OptimConfig, groups: list[dict[str, Any]], rate: Tensor
) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(
        groups, lr=rate, betas=config.betas, fused=True, capturable=rate.is_cuda
    )
    # silences a warning: an uncaptured step is as fast, because the optimizer is fused
    optimizer._warned_capturable_if_run_uncaptured = True
    return optimizer


def _matrix(part: Range) -> nn.Parameter:
    """Make a parameter of a range's weight, in its shape, without the padding behind it."""
    size = math.prod(part.shape)
    parameter = nn.Parameter(part.master[:size].view(part.shape))
    parameter.grad = part.gradient[:size].view(part.shape)
    return parameter


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
