"""All that decides how a run goes on: taken at a point between two steps, and put back there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from safer_fast.distributed import Ranks
from safer_fast.optim import AveragedWeights
from safer_fast.parameters import ParameterArenas
from safer_fast.step import Step

FORMAT = 1
"""Of checkpoints; to be raised where one holds something else under the same names."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come, in what JSON knows; it changes at points where the run may end.

    epoch: the one in progress, from 1. has_begun: whether its layers are selected. index: steps
    taken in it; num_steps: steps taken in all. totals: sums of its step lines. selected: layers
    that are trained, None for every parameter. best: robust and clean accuracy of the best weights,
    which lie in the file that `best_file` names. num_without_gain: evaluations since they were the
    best. accuracies: final figures so far. start_file: names the weights at the start of SAFER,
    from which only the parameters `moved` differ. metrics_size: bytes of metrics.jsonl. audit: what
    the last audit of a cheaper attack found.
    """

    epoch: int = 1
    has_begun: bool = False
    index: int = 0
    num_steps: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    selected: list[str] | None = None
    best: tuple[float, float] = (-1.0, -1.0)
    best_file: str | None = None
    num_without_gain: int = 0
    accuracies: list[dict[str, Any]] = field(default_factory=list)
    start_file: str | None = None
    moved: list[str] = field(default_factory=list)
    metrics_size: int = 0
    audit: dict[str, float] = field(default_factory=dict)

    def judged(self, accuracies: tuple[float, float], counts: bool) -> dict[str, Any]:
        """What changes with an evaluation, which counts against patience or does not."""
        gains = accuracies[0] > self.best[0] or not counts
        changes: dict[str, Any] = {"num_without_gain": 0 if gains else self.num_without_gain + 1}
        if accuracies >= self.best:
            changes |= {"best": accuracies, "best_file": f"best-{self.num_steps:08d}"}
        return changes

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Progress:
        """What `dataclasses.asdict` and JSON have made of it."""
        return cls(**{**values, "best": tuple(values["best"])})


def check_state(state: Mapping[str, Any]) -> None:
    """Raises ValueError for what no checkpoint of this format holds, naming the field.

    A checkpoint without a format was written before formats were counted, in the first.
    """
    found = state.get("format", 1)
    if found != FORMAT or type(found) is not int:
        raise ValueError(f"expected format {FORMAT}, got {found!r:.40}: of another version")
    for name in ("config", "facts", "progress"):
        if not isinstance(state.get(name), dict):
            raise ValueError(f"expected {name}, got {state.get(name)!r:.40}")
    for name in ("data", "backend"):
        if not isinstance(state["facts"].get(name), str):
            raise ValueError(f"expected facts.{name}, got {state['facts'].get(name)!r:.40}")
    known = {item.name for item in fields(Progress)}
    if different := sorted(known ^ set(state["progress"])):
        word = "lacks" if different[0] in known else "has an unknown"
        raise ValueError(f"it {word} field progress.{different[0]}")
    for name, value in state["progress"].items():
        if not _is_valid(name, value):
            raise ValueError(f"progress.{name}: expected another value, got {value!r:.40}")


def _is_valid(name: str, value: Any) -> bool:
    """Whether a field of `Progress`, as JSON has it, can be of a run."""
    default = getattr(Progress(), name)
    if name == "best":
        return isinstance(value, list) and [type(item) for item in value] == [float, float]
    if (name == "selected" and value is not None) or isinstance(default, list):
        kind = dict if name == "accuracies" else str
        return isinstance(value, list) and all(isinstance(item, kind) for item in value)
    if default is None:
        return value is None or isinstance(value, str)
    if isinstance(default, dict):
        numbers = value.values() if isinstance(value, dict) else [None]
        return all(isinstance(number, int | float) for number in numbers)
    return type(value) is type(default) and value >= (name == "epoch")


@dataclass
class Parts:
    """The parts of a run that change while it trains."""

    network: nn.Module
    arenas: ParameterArenas
    average: AveragedWeights | None
    step: Step | None
    factors: ParameterArenas | None = None


def take_tensors(parts: Parts, moved: list[str] | None, ranks: Ranks) -> dict[str, Tensor]:
    """Copies of all tensors that decide how the run goes on, on their devices.

    moved: the parameters that are worth copying, None for all. Waits for nothing; all ranks must
    take them at the same point.
    """
    arenas, taken = parts.arenas, {}
    names = list(arenas.places) if moved is None else moved
    sources = {"master": arenas.master}
    if parts.average is not None:
        sources["average"] = parts.average.average
    for kind, source in sources.items():
        for name in names:
            taken[f"{kind}.{name}"] = arenas.view(name, source).detach().clone()
    if parts.factors is not None:
        for name, value in parts.factors.state_dict().items():
            taken[f"factor.{name}"] = value
    for name, buffer in _buffers(parts.network).items():
        taken[f"buffer.{name}"] = buffer.clone()
    if parts.step is not None:
        for name, value in optimizer_tensors(parts.step.optimizer).items():
            taken[f"optimizer.{name}"] = value.clone()
        health = parts.step.health
        taken["skips"] = torch.stack([health.skips.in_a_row, health.skips.longest])
        taken["sums"] = ranks.gather(health.sums.values())
    return taken


def put_tensors(
    parts: Parts, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], ranks: Ranks
) -> None:
    """The run has the tensors that were taken; `start` has the parameters that were not.

    With another number of ranks than they were taken from, the first rank has all the sums.
    """
    arenas = parts.arenas
    arenas.master.copy_(arenas.vector_of({**start, **_of_kind(tensors, "master")}))
    arenas.load_compute()
    if parts.average is not None:
        parts.average.average.copy_(arenas.vector_of({**start, **_of_kind(tensors, "average")}))
    if parts.factors is not None:
        parts.factors.master.copy_(parts.factors.vector_of(_of_kind(tensors, "factor")))
        parts.factors.load_compute()
    for name, buffer in _of_kind(tensors, "buffer").items():
        _buffers(parts.network)[name].copy_(buffer)
    if parts.step is None:
        return
    load_optimizer(parts.step.optimizer, _of_kind(tensors, "optimizer"))
    skips = parts.step.health.skips
    skips.in_a_row.copy_(tensors["skips"][0])
    skips.longest.copy_(tensors["skips"][1])
    sums = tensors["sums"]
    if len(sums) == ranks.num_ranks:
        own = sums[ranks.rank]
    else:
        own = sums.sum(0) if ranks.is_first else torch.zeros_like(sums[0])
    if own.numel():  # a step was taken
        health = parts.step.health
        health.sums.load(health.shapes, own.to(arenas.master.device))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, by number of the parameter and name; counts of steps among it."""
    taken = {}
    for group_number, group in enumerate(optimizer.param_groups):
        if "step" in group:  # apex counts for the group
            taken[f"group.{group_number}"] = torch.as_tensor(group["step"])
        for number, parameter in enumerate(group["params"]):
            for name, value in optimizer.state.get(parameter, {}).items():
                if value is None:  # SGD without momentum
                    continue
                taken[f"{group_number}.{number}.{name}"] = torch.as_tensor(value)
    return taken


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The optimizer, whose parameters are those of before, has the state that was taken."""
    for name, value in tensors.items():
        group_number, _, rest = name.partition(".")
        if group_number == "group":
            optimizer.param_groups[int(rest)]["step"] = value.item()
            continue
        number, _, key = rest.partition(".")
        parameter = optimizer.param_groups[int(group_number)]["params"][int(number)]
        # counts lie where the optimizer would make them: on the device if it may be captured
        stays = key == "step" and not optimizer.param_groups[int(group_number)].get("fused")
        optimizer.state[parameter][key] = value if stays else value.to(parameter.device)


def _of_kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Those of one kind, by their names within it."""
    prefix = f"{kind}."
    return {
        name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)
    }


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the state, such as the statistics of batch norms."""
    parameters = dict(network.named_parameters())
    return {name: value for name, value in network.state_dict().items() if name not in parameters}
