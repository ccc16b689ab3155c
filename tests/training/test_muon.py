"""Muon takes the steps of torch.optim.Muon, and leaves all but matrices of blocks to AdamW."""

import pytest
import torch
from torch import Tensor

from safer_fast.config.schema import OptimConfig
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.lora import Adapters
from safer_fast.training.optimizers import (
    build_optimizer,
    load_optimizer,
    optimizer_state,
    orthogonalised,
    set_learning_rate,
    step_unless,
)
from tests.support.networks import FAMILIES, UNCUTTABLE, build

RATE, DECAY = 0.02, 0.3
MUON = OptimConfig(name="muon", learning_rate=RATE, weight_decay=DECAY)
LAYERS = ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.3.mlp.fc1", "blocks.3.mlp.fc2", "head"]


class Trained:
    """Arenas of a model, and Muon over some layers of it, fed with gradients from a seed."""

    def __init__(self, layers: list[str] | None = LAYERS) -> None:
        model = build()
        self.arenas = ParameterArenas(model.network, model.layers, torch.float32)
        self.selection = self.arenas.select(layers)
        self.names = model.names_of(self.selection.parameters)
        self.optimizer = build_optimizer(MUON, self.selection, model.inner_layers)
        self.generator = torch.Generator().manual_seed(3)

    def draw(self) -> list[Tensor]:
        """Store new gradients, of the size that they have in training."""
        shapes = [parameter.shape for parameter in self.selection.parameters]
        drawn = [1e-2 * torch.randn(shape, generator=self.generator) for shape in shapes]
        self.selection.store_gradients(drawn)
        return drawn


def is_of_muon(name: str, value: Tensor) -> bool:
    return name.startswith("blocks") and name.endswith("weight") and value.ndim == 2


@pytest.mark.parametrize("layers", [LAYERS, None], ids=["some layers", "everything"])
def test_ten_steps_follow_the_optimizers_of_torch(layers: list[str] | None) -> None:
    trained = Trained(layers)
    theirs = {name: torch.nn.Parameter(t) for name, t in trained.arenas.state_dict().items()}
    ordered = [n for n, p in trained.arenas.parameters.items() if _is_among(p, trained)]
    matrices = [theirs[n] for n in ordered if is_of_muon(n, theirs[n])]
    decayed = [theirs[n] for n in ("patch_embed.proj.weight", "head.weight")]
    known = {id(p) for p in (*matrices, *decayed)}
    rest = [theirs[n] for n in ordered if id(theirs[n]) not in known]
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=RATE)
    assert len(matrices) == (3 if layers else 16)
    for index in range(10):
        rate = RATE / (1 + index)
        set_learning_rate(trained.optimizer, rate)
        drawn = trained.draw()
        for parameter, gradient in zip(trained.selection.parameters, drawn, strict=True):
            theirs[_name_of(parameter, trained)].grad = gradient
        trained.optimizer.step()
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        ours = trained.arenas.state_dict()
        for name, value in theirs.items():
            torch.testing.assert_close(
                ours[name], value.detach(), msg=lambda m, n=name: f"{n}: {m}"
            )
    mine = trained.optimizer.param_groups[0]["params"]
    momenta = {p.data_ptr(): trained.optimizer.state[p]["momentum_buffer"] for p in mine}
    for name in (n for n in ordered if is_of_muon(n, theirs[n])):
        place = trained.arenas.view(name, trained.arenas.master).data_ptr()
        assert torch.equal(momenta[place], muon.state[theirs[name]]["momentum_buffer"])


def _is_among(parameter: Tensor, trained: Trained) -> bool:
    return any(parameter is own for own in trained.selection.parameters)


def _name_of(parameter: Tensor, trained: Trained) -> str:
    [name] = [n for n, p in trained.arenas.parameters.items() if p is parameter]
    return name


def test_a_skipped_step_changes_nothing_and_the_next_is_as_if_it_had_not_been() -> None:
    first, second = Trained(), Trained()
    for trained in (first, second):
        trained.draw()
        step_unless(torch.tensor(0.0), trained.optimizer)
    before = first.arenas.master.clone(), optimizer_state(first.optimizer)
    first.selection.flat[:-1].fill_(float("nan"))
    step_unless(torch.tensor(1.0), first.optimizer)
    assert torch.equal(first.arenas.master, before[0])
    after = optimizer_state(first.optimizer)
    assert all(torch.equal(value, after[name]) for name, value in before[1].items())
    first.selection.flat.zero_()
    for trained in (first, second):
        trained.draw()
        step_unless(torch.tensor(0.0), trained.optimizer)
    assert torch.equal(first.arenas.master, second.arenas.master)


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    first, second = Trained(), Trained()
    first.draw()
    first.optimizer.step()
    second.arenas.master.copy_(first.arenas.master)
    second.draw()
    load_optimizer(second.optimizer, optimizer_state(first.optimizer))
    for trained in (first, second):
        trained.draw()
        trained.optimizer.step()
    assert torch.equal(first.arenas.master, second.arenas.master)
    assert "optimizer.0.0.momentum_buffer" in optimizer_state(first.optimizer)
    assert "optimizer.1.0.exp_avg" in optimizer_state(first.optimizer)


@pytest.mark.parametrize("shape", [(8, 8), (48, 16), (16, 48), (1, 5)])
def test_singular_values_come_out_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    values = torch.linalg.svdvals(orthogonalised(matrix).float())
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3


def test_a_gradient_of_zeros_moves_nothing_but_by_decay() -> None:
    assert orthogonalised(torch.zeros(4, 6)).abs().max() == 0
    trained = Trained(["blocks.1.attn.qkv"])
    before = trained.arenas.state_dict()
    trained.optimizer.step()
    after = trained.arenas.state_dict()
    name = "blocks.1.attn.qkv.weight"
    torch.testing.assert_close(after[name], before[name] * (1 - RATE * DECAY))


def test_factors_of_layers_are_matrices_too_and_no_weight_is_left_to_adamw() -> None:
    model = build()
    layers = {name: model.layers[name] for name in LAYERS[1:3]}
    adapters = Adapters(model.network, layers, 2, torch.float32, seed=0)
    optimizer = build_optimizer(MUON, adapters.selection(), model.inner_layers)
    assert len(optimizer.param_groups) == 1
    shapes = [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]
    assert sorted(shapes) == sorted(
        tuple(adapters.arenas.places[name].shape) for name in adapters.arenas.places
    )


def test_a_head_alone_is_left_to_adamw() -> None:
    assert type(Trained(["head"]).optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("family", FAMILIES)
def test_inner_layers_are_those_between_image_and_head(family: str) -> None:
    model = build(family)
    outer = set(model.layers) - set(model.inner_layers)
    assert {"patch_embed.proj"} <= outer <= {"patch_embed.proj", "head", "head.fc", "head_dist"}
    assert model.inner_layers


def test_a_network_without_blocks_leaves_out_its_first_and_last_layer() -> None:
    model = build(UNCUTTABLE)
    assert not model.num_blocks
    assert set(model.layers) - set(model.inner_layers) == {"patch_embed.proj.0.0", "head"}
