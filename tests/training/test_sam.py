"""SAM moves weights as other libraries do, restores them exactly, and wraps any optimizer."""

from typing import Any

import pytest
import torch
from pytorch_optimizer import SAM
from torch import nn

from safer_fast import SharpnessAware
from safer_fast.models.perturbation import inverse_norm
from tests.support.networks import PlainNetwork, images_and_labels


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_equals_that_of_pytorch_optimizer(adaptive: bool) -> None:
    images, labels = images_and_labels()
    ours, theirs = PlainNetwork().eval(), PlainNetwork().eval()
    names = ["stem", "norm", "hidden", "head"]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    sam = SharpnessAware(ours, names, optimizer, rho=0.05, adaptive=adaptive)
    other = SAM(
        theirs.parameters(),
        torch.optim.SGD,
        rho=0.05,
        adaptive=adaptive,
        use_gc=False,
        lr=0.1,
        momentum=0.9,
    )
    for _ in range(3):
        sam.ascend(nn.functional.cross_entropy(ours(images), labels))
        sam.descend(nn.functional.cross_entropy(ours(images), labels))
        nn.functional.cross_entropy(theirs(images), labels).backward()
        other.first_step(zero_grad=True)
        nn.functional.cross_entropy(theirs(images), labels).backward()
        other.second_step(zero_grad=True)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_ascent_has_length_rho_and_points_along_the_gradient() -> None:
    model, (images, labels) = PlainNetwork().eval(), images_and_labels()
    before = [p.detach().clone() for p in model.head.parameters()]
    loss = nn.functional.cross_entropy(model(images), labels)
    expected = torch.autograd.grad(loss, list(model.head.parameters()), retain_graph=True)
    sam = SharpnessAware(model, ["head"], torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3)
    sam.ascend(loss)
    moved = torch.cat(
        [(p - b).flatten() for p, b in zip(model.head.parameters(), before, strict=True)]
    ).detach()
    gradient = torch.cat([g.flatten() for g in expected])
    assert float(moved.norm()) == pytest.approx(0.3, rel=1e-4)
    assert float(torch.cosine_similarity(moved, gradient, dim=0)) == pytest.approx(1.0)


def test_restore_gives_back_the_very_same_weights_in_the_same_storage() -> None:
    model, (images, labels) = PlainNetwork().eval(), images_and_labels()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    sam = SharpnessAware(model, ["head", "stem"], torch.optim.SGD(model.parameters(), 0.1), rho=1.0)
    sam.ascend(nn.functional.cross_entropy(model(images), labels))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"head.weight", "head.bias", "stem.weight", "stem.bias"}
    sam.restore()
    sam.restore()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == pointers[name]


def test_a_change_of_the_learning_rate_reaches_the_update() -> None:
    model, (images, labels) = PlainNetwork().eval(), images_and_labels()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = SharpnessAware(model, ["head"], optimizer, rho=0.05)
    optimizer.param_groups[0]["lr"] = 0.0
    before = model.head.weight.detach().clone()
    for _ in range(2):
        sam.ascend(nn.functional.cross_entropy(model(images), labels))
        sam.descend(nn.functional.cross_entropy(model(images), labels))
        assert torch.equal(model.head.weight, before) == (optimizer.param_groups[0]["lr"] == 0.0)
        optimizer.param_groups[0]["lr"] = 0.1


def test_only_the_named_layers_learn() -> None:
    model, (images, labels) = PlainNetwork().eval(), images_and_labels()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    sam = SharpnessAware(model, ["hidden"], optimizer, rho=0.05)
    sam.ascend(nn.functional.cross_entropy(model(images), labels))
    sam.descend(nn.functional.cross_entropy(model(images), labels))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"hidden.weight", "hidden.bias"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_zero_gradient_leaves_the_weights_and_nan_is_not_hidden() -> None:
    values = inverse_norm(torch.tensor([0.0, 4.0, float("nan")]))
    assert values[:2].tolist() == [0.0, 0.5]
    assert values[2].isnan()


def test_ascending_twice_is_an_error() -> None:
    model, (images, labels) = PlainNetwork().eval(), images_and_labels()
    sam = SharpnessAware(model, ["head"], torch.optim.SGD(model.parameters(), 0.1), rho=0.05)
    sam.ascend(nn.functional.cross_entropy(model(images), labels))
    with pytest.raises(RuntimeError, match="ascend was called twice"):
        sam.ascend(nn.functional.cross_entropy(model(images), labels))


@pytest.mark.parametrize(
    ("names", "rho", "message"),
    [
        (["hed"], 0.1, "names: expected a module of the model, got 'hed', did you mean head?"),
        (["drop"], 0.1, "names: expected a module with parameters of its own, got 'drop'"),
        ([], 0.1, "names: expected at least one layer, got none"),
        (["head"], -1.0, r"rho: expected at least 0, got -1\.0"),
        (["head"], "0.05", "rho: expected a number, got '0.05'"),
        (["stem"], 0.1, "optimizer: expected it to hold all 2 selected parameters, 2 are missing"),
    ],
)
def test_wrong_arguments_are_refused(names: list[str], rho: float, message: str) -> None:
    model = PlainNetwork()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        SharpnessAware(model, names, optimizer, rho=rho)


def test_arguments_of_another_kind_are_refused() -> None:
    model: Any = PlainNetwork()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    lbfgs: Any = torch.optim.LBFGS(model.parameters())
    calls: list[tuple[tuple[Any, Any, Any], str]] = [
        ((None, ["head"], optimizer), "model: expected a torch.nn.Module, got NoneType"),
        ((model, model.parameters(), optimizer), "names: expected names of layers, got Parameter"),
        ((model, "head", optimizer), "names: expected a list of names of layers, got 'head'"),
        ((model, 3, optimizer), "names: expected a list of names of layers, got 3"),
        ((model, ["head"], None), "optimizer: expected a torch.optim.Optimizer, got NoneType"),
        (
            (model, ["head"], lbfgs),
            "optimizer: expected one whose step needs no closure, got LBFGS",
        ),
    ]
    for arguments, message in calls:
        with pytest.raises(ValueError, match=f"^{message}$"):
            SharpnessAware(*arguments, rho=0.1)


def test_losses_that_cannot_be_differentiated_leave_the_weights_alone() -> None:
    model, (images, labels) = PlainNetwork().eval(), images_and_labels()
    before = model.head.weight.detach().clone()
    sam = SharpnessAware(model, ["head"], torch.optim.SGD(model.parameters(), 0.1), rho=0.05)

    def loss(reduction: str = "mean") -> Any:
        return nn.functional.cross_entropy(model(images), labels, reduction=reduction)

    wrong: list[tuple[Any, str]] = [
        (1.0, "loss: expected a loss that is a 0-d tensor, got float"),
        (loss("none"), r"loss: expected a loss that is a 0-d tensor, got float32 \[6\] on cpu"),
        (loss().detach(), "loss: expected a loss with a gradient, got one without"),
    ]
    for value, message in wrong:
        with pytest.raises(ValueError, match=f"^{message}$"):
            sam.ascend(value)
    assert torch.equal(model.head.weight, before)
    sam.ascend(loss())
    for value, message in wrong:
        with pytest.raises(ValueError, match=f"^{message}$"):
            sam.descend(value)
    sam.descend(loss())
    assert not torch.equal(model.head.weight, before)


def test_descending_without_ascending_is_an_error() -> None:
    model, (images, labels) = PlainNetwork().eval(), images_and_labels()
    before = model.head.weight.detach().clone()
    sam = SharpnessAware(model, ["head"], torch.optim.SGD(model.parameters(), 0.1), rho=0.05)
    loss = nn.functional.cross_entropy(model(images), labels)
    with pytest.raises(RuntimeError, match="descend was called without ascend"):
        sam.descend(loss)
    assert torch.equal(model.head.weight, before)
