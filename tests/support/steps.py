"""The fast step and the textbook step of the same weights, and how far apart they end."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safer_fast.attacks.pgd import random_start
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.schema import ObjectiveConfig, OptimConfig, SAMConfig
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.robust_model import RobustModel, compile_blocks
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.training.objectives import Objective, Targets
from safer_fast.training.optimizers import build_optimizer
from safer_fast.training.reference import PlainModel, ReferenceStep
from safer_fast.training.step import Step
from tests.support.networks import build, images_and_labels

EPSILON, STEP_SIZE, STEPS = 0.03, 0.01, 2


RATE = 1e-2


def make_step(
    model: RobustModel,
    layers: list[str] | None,
    *,
    rho: float = 0.05,
    objective: str = "pgd-at",
    optim: OptimConfig | None = None,
    adaptive: bool = False,
    norm: Any = "linf",
    clip_norm: float | None = None,
    generator: torch.Generator | None = None,
    attack_micro_batch: Any = "auto",
    attack: Any = "pgd",
    **settings: Any,
) -> tuple[Step, ParameterArenas]:
    """The fast step over these layers (None: everything) of a model that moves into arenas."""
    arenas = ParameterArenas(model.network, model.layers, model.compute_dtype)
    selection = arenas.select(layers)
    attacks = ReplayedAttack(
        model,
        norm=norm,
        steps=STEPS,
        generator=generator or torch.Generator().manual_seed(5),
        micro_batch=MicroBatch(size=attack_micro_batch),
        replays=settings.get("replays"),
        kind=attack,
    )
    step = Step(
        model=model,
        selection=selection,
        optimizer=build_optimizer(optim or sgd(), selection, model.inner_layers),
        objective=Objective(ObjectiveConfig(name=objective)),  # type: ignore[arg-type]
        sam=SAMConfig(rho=rho, adaptive=adaptive),
        attack=attacks,
        clip_norm=clip_norm,
        **settings,
    )
    return step, arenas


def run_step(step: Step, images: Tensor, labels: Tensor) -> None:
    step(images, Targets.alike(labels), torch.tensor(EPSILON), torch.tensor(STEP_SIZE))


def make_reference(
    model: RobustModel,
    layers: list[str] | None,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    optim: OptimConfig | None = None,
    **settings: Any,
) -> ReferenceStep:
    """The textbook step from the same weights."""
    plain = PlainModel(model, dtype, autocast)
    names = [name for name, _ in plain.network.named_parameters()]
    if layers is not None:
        names = [name for layer in layers for name in model.layers[layer]]
    optim = optim or sgd()
    matrices = {n for own in model.layers.values() for n in own if n.endswith("weight")}
    groups = [
        {
            "params": [plain.network.get_parameter(n) for n in names if (n in matrices) == decayed],
            "weight_decay": optim.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if optim.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=optim.learning_rate, momentum=optim.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas)
    return ReferenceStep(
        plain,
        names,
        optimizer,
        epsilon=EPSILON,
        step_size=STEP_SIZE,
        steps=STEPS,
        **{"rho": 0.05} | settings,
    )


def starts(images: Tensor, norm: Any, count: int) -> list[Tensor]:
    """The random starts that the fast step draws, one for each step."""
    generator = torch.Generator().manual_seed(5)
    return [random_start(images, torch.tensor(EPSILON), norm, generator) for _ in range(count)]


def error(actual: dict[str, Tensor], truth: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Distance of two updates of all weights, relative to the length of the true one."""
    difference = sum(float((actual[n].double() - truth[n]).square().sum()) for n in truth)
    length = sum(float((truth[n] - start[n].double()).square().sum()) for n in truth)
    return float((difference / length) ** 0.5)


def assert_near_fp64(
    family: str,
    layers: list[str] | None,
    num_steps: int,
    is_compiled: bool = False,
    savings: Sequence[str] = ("prefix",),
    fast: Mapping[str, Any] | None = None,
    **settings: Any,
) -> None:
    """After some steps our fp32 weights are at most 3x as far from fp64 as textbook fp32 ones.

    Both are off by more than rounding where a pixel's gradient is so small that its sign differs.
    `fast` are settings of our step alone.
    """
    model = build(family)
    begin = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    images, labels = images_and_labels()
    first_starts = starts(images, settings.get("norm", "linf"), num_steps)
    updates = {}
    for dtype in (torch.float64, torch.float32):
        reference = make_reference(model, layers, dtype, **settings)
        for start in first_starts:
            reference(images.to(dtype), labels, start.to(dtype))
        named = reference.model.network.named_parameters()
        updates[dtype] = {name: parameter.detach() for name, parameter in named}
    model.enable_savings(savings, 32)
    step, arenas = make_step(
        model, layers, reuses_prefix="prefix" in savings, **settings, **fast or {}
    )
    if is_compiled:
        compile_blocks(model)
    for _ in range(num_steps):
        run_step(step, images, labels)
    truth = updates[torch.float64]
    allowed = max(3 * error(updates[torch.float32], truth, begin), 1e-4)
    assert error(arenas.state_dict(), truth, begin) <= allowed


@contextmanager
def forbidding_host_syncs() -> Iterator[None]:
    """Raise where a tensor's value travels to the host."""

    class Forbid(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "a host sync"
            return func(*args, **(kwargs or {}))

    with Forbid():
        yield


def sgd() -> OptimConfig:
    return OptimConfig(name="sgd", learning_rate=RATE, weight_decay=0.01)
