"""Optimizers update masters in place; without apex, its optimizers are refused in one line."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from safer_fast.config.schema import OptimConfig
from safer_fast.models.arenas import ParameterArenas, TrainedWeights
from safer_fast.training.optimizers import AveragedWeights, build_optimizer, set_learning_rate
from tests.support.networks import build

LAYERS = ["blocks.1.attn.qkv", "blocks.3.mlp.fc1"]


def select(device: str = "cpu") -> tuple[ParameterArenas, TrainedWeights]:
    model = build().to(device)
    arenas = ParameterArenas(model.network, model.layers, torch.bfloat16)
    selection = arenas.select(LAYERS)
    selection.store_gradients([torch.ones_like(p) for p in selection.parameters])
    return arenas, selection


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_an_update_moves_the_selected_masters_and_no_others(name: Any) -> None:
    arenas, selection = select()
    before = arenas.state_dict()
    optimizer = build_optimizer(OptimConfig(name=name, learning_rate=0.1), selection, LAYERS)
    optimizer.step()
    moved = {n for n, t in arenas.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}


def test_matrices_are_decayed_and_biases_are_not() -> None:
    arenas, selection = select()
    selection.store_gradients([torch.zeros_like(p) for p in selection.parameters])
    before = arenas.state_dict()
    config = OptimConfig(name="adamw", learning_rate=0.1, weight_decay=0.5)
    build_optimizer(config, selection).step()
    after = arenas.state_dict()
    for layer in LAYERS:
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        torch.testing.assert_close(after[weight], before[weight] * 0.95)
        assert torch.equal(after[bias], before[bias])


def test_the_learning_rate_reaches_every_group() -> None:
    arenas, selection = select()
    optimizer = build_optimizer(OptimConfig(learning_rate=0.1), selection)
    set_learning_rate(optimizer, 0.0)
    before = arenas.master.clone()
    optimizer.step()
    assert torch.equal(arenas.master, before)


def test_an_average_follows_the_weights_and_keeps_what_never_moved() -> None:
    network = nn.Linear(1, 3, bias=False)
    network.weight.data = torch.tensor([[1.0], [2.0], [1 / 3]])
    arenas = ParameterArenas(network, {}, torch.float32)
    average = AveragedWeights(arenas, decay=0.9)
    arenas.master[0] = 2.0
    average.update()
    average.update()
    assert average.average[0] == pytest.approx(2 - 0.81)
    assert torch.equal(average.average[1:3], torch.tensor([2.0, 1 / 3]))
    assert torch.equal(average.state_dict()["weight"].flatten(), average.average[:3])


def test_a_resumed_average_goes_the_same_way() -> None:
    arenas, selection = select()
    first, second = AveragedWeights(arenas, decay=0.9), AveragedWeights(arenas, decay=0.9)
    build_optimizer(OptimConfig(learning_rate=0.1), selection).step()
    first.update()
    second.load_state_dict(first.state_dict())
    for average in (first, second):
        average.update()
    assert torch.equal(first.average, second.average)
    assert not torch.equal(first.average, arenas.master)


class _StandIn(torch.optim.SGD):
    """SGD with apex's arguments, which it remembers."""

    def __init__(self, groups: Any, lr: float, **arguments: Any) -> None:
        super().__init__(groups, lr=lr)
        self.arguments = arguments


@pytest.mark.parametrize(
    ("name", "kind", "arguments", "num_tensors"),
    [
        ("apex-adam", "FusedAdam", {"betas": (0.9, 0.999), "adam_w_mode": True}, 4),
        ("apex-sgd", "FusedSGD", {"momentum": 0.9}, 4),
        ("apex-lamb", "FusedLAMB", {"betas": (0.9, 0.999), "max_grad_norm": 0.0}, 4),
    ],
)
def test_apex_gets_its_own_arguments(
    name: Any, kind: str, arguments: dict[str, Any], num_tensors: int, monkeypatch: Any
) -> None:
    apex = ModuleType("apex.optimizers")
    for optimizer in ("FusedAdam", "FusedSGD", "FusedLAMB"):
        setattr(apex, optimizer, type(optimizer, (_StandIn,), {}))
    monkeypatch.setitem(sys.modules, "amp_C", ModuleType("amp_C"))
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    monkeypatch.setattr("safer_fast.training.optimizers._is_on_gpu", lambda parameter: True)
    arenas, selection = select()
    before = arenas.master.clone()
    built: Any = build_optimizer(OptimConfig(name=name, learning_rate=0.1), selection)
    assert type(built).__name__ == kind
    assert built.arguments == arguments
    assert sum(len(group["params"]) for group in built.param_groups) == num_tensors
    assert [group["weight_decay"] for group in built.param_groups] == [0.05, 0.0]
    built.step()
    assert not torch.equal(arenas.master, before)


def test_lamb_gets_every_tensor_apart_even_where_ranges_are_merged(monkeypatch: Any) -> None:
    apex = ModuleType("apex.optimizers")
    apex.FusedLAMB = type("FusedLAMB", (_StandIn,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "amp_C", ModuleType("amp_C"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    monkeypatch.setattr("safer_fast.training.optimizers._is_on_gpu", lambda parameter: True)
    model = build()
    arenas = ParameterArenas(model.network, model.layers, torch.bfloat16)
    selection = arenas.select()
    built = build_optimizer(OptimConfig(name="apex-lamb"), selection)
    num_tensors = sum(len(group["params"]) for group in built.param_groups)
    assert num_tensors == len(list(model.network.parameters()))


def test_missing_apex_is_one_clear_line(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(
        ValueError, match=r"optim\.name: apex-adam needs NVIDIA apex built"
    ) as error:
        build_optimizer(OptimConfig(name="apex-adam"), select()[1])
    assert "\n" not in str(error.value)


def test_apex_on_a_cpu_is_one_clear_line(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", ModuleType("amp_C"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", ModuleType("apex.optimizers"))
    with pytest.raises(ValueError, match=r"optim\.name: apex-sgd needs a GPU, got cpu"):
        build_optimizer(OptimConfig(name="apex-sgd"), select()[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["apex-adam", "apex-sgd", "apex-lamb"])
def test_apex_updates_masters_on_a_gpu(name: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("amp_C", reason="NVIDIA apex is not built with its CUDA extensions")
    arenas, selection = select("cuda")
    before = arenas.master.clone()
    build_optimizer(OptimConfig(name=name, learning_rate=0.1), selection).step()
    assert not torch.equal(arenas.master, before)
    assert arenas.master.isfinite().all()
