"""PGD stays in its ball, raises the loss, agrees with torchattacks, and leaves the model alone."""

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from safer_fast import pgd
from safer_fast.attacks.pgd import (
    Norm,
    cross_entropies,
    default_step_size,
    placed_start,
    random_start,
)
from tests.support.networks import PlainNetwork, build, images_and_labels


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_adversarial_images_stay_in_the_ball_and_in_the_unit_cube(norm: Norm, steps: int) -> None:
    model, (images, labels) = build(), images_and_labels()
    before = images.clone()
    radius = 0.1 if norm == "linf" else 2.0
    attacked = pgd(model, images, labels, epsilon=radius, step_size=radius, steps=steps, norm=norm)
    difference = (attacked - images).flatten(1)
    size = difference.abs().amax(1) if norm == "linf" else difference.norm(dim=1)
    assert (size <= radius * (1 + 1e-5)).all()
    assert (size > radius / 10).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8 / 255), ("linf", 0.003), ("l2", 0.5)])
def test_rounding_to_half_precision_leaves_no_pixel_out_of_the_ball(
    norm: Norm, epsilon: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(32, 3, 8, 8, generator=generator)
    images[:3] = torch.tensor([0, epsilon, 1]).view(3, 1, 1, 1)
    images = images.to(dtype)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).to(dtype)
    labels = torch.arange(32) % 5
    sizes = {"epsilon": epsilon, "step_size": epsilon / 2}
    for steps in (0, 1, 5):
        attacked = pgd(model, images, labels, **sizes, steps=steps, norm=norm, generator=generator)
        change = (attacked.double() - images.double()).flatten(1)
        length = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        assert attacked.dtype == dtype
        assert (length <= epsilon * (1 + 1e-7)).all()
        assert (length >= 0.8 * epsilon).any()
        assert ((attacked >= 0) & (attacked <= 1)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_raises_the_loss_of_every_image(norm: Norm) -> None:
    model, (images, labels) = build(), images_and_labels(16)
    radius = 0.05 if norm == "linf" else 1.5
    attacked = pgd(
        model,
        images,
        labels,
        epsilon=radius,
        step_size=radius / 4,
        steps=8,
        norm=norm,
        start=images,
    )
    with torch.no_grad():
        before, after = (
            nn.functional.cross_entropy(model(x), labels, reduction="none")
            for x in (images, attacked)
        )
    assert (after > before).all()


def test_linf_pgd_equals_torchattacks_from_the_same_start() -> None:
    model, (images, labels) = build(), images_and_labels()
    attack = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)
    expected = attack(images, labels)
    ours = pgd(model, images, labels, epsilon=8 / 255, step_size=2 / 255, steps=10, start=images)
    torch.testing.assert_close(ours, expected)


def test_l2_pgd_equals_torchattacks_from_the_same_start() -> None:
    model, (images, labels) = build(), images_and_labels()
    attack = torchattacks.PGDL2(model, eps=1.0, alpha=0.2, steps=10, random_start=False)
    expected = attack(images, labels)
    ours = pgd(model, images, labels, epsilon=1.0, step_size=0.2, steps=10, norm="l2", start=images)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_one_step_of_a_quarter_more_than_epsilon_is_fgsm_rs() -> None:
    model, (images, labels) = build(), images_and_labels()
    start = random_start(images, torch.tensor(0.1), generator=torch.Generator().manual_seed(0))
    pixels = start.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(pixels), labels)
    step = 0.125 * torch.autograd.grad(loss, pixels)[0].sign()
    expected = (start + step).clamp(images - 0.1, images + 0.1).clamp(0, 1)
    ours = pgd(model, images, labels, epsilon=0.1, step_size=0.125, steps=1, start=start)
    torch.testing.assert_close(ours, expected)
    assert default_step_size(0.1, 1) == pytest.approx(0.125)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_fills_the_ball_evenly(norm: Norm) -> None:
    images = torch.full((4000, 1, 1, 2), 0.5)
    start = random_start(images, torch.tensor(0.2), norm, torch.Generator().manual_seed(0))
    noise = (start - images).flatten(1) / 0.2
    size = noise.abs().amax(1) if norm == "linf" else noise.norm(dim=1)
    assert size.max() <= 1 + 1e-5
    # in two dimensions half of the ball lies beyond sqrt(1/2) of its radius
    assert float((size > 0.5**0.5).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert noise.mean(0).abs().max() < 0.03


def test_the_same_generator_gives_the_same_attack() -> None:
    model, (images, labels) = build(), images_and_labels()
    first, second, other = (
        pgd(
            model,
            images,
            labels,
            epsilon=0.1,
            step_size=0.03,
            steps=2,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_model_runs_in_eval_mode_without_weight_gradients_and_is_given_back() -> None:
    seen = []

    class Watched(PlainNetwork):
        def forward(self, images: Tensor) -> Tensor:
            wanted = any(parameter.requires_grad for parameter in self.parameters())
            seen.append((self.drop.training, self.norm.training, wanted))
            return super().forward(images)

    model = Watched().train()
    model.head.eval()
    model.stem.weight.requires_grad_(False)
    statistics = model.norm.running_mean.clone()
    images, labels = images_and_labels()
    pgd(model, images, labels, epsilon=0.1, step_size=0.05, steps=2)
    assert seen == [(False, False, False)] * 2
    assert model.training
    assert model.drop.training
    assert not model.head.training
    assert not model.stem.weight.requires_grad
    assert model.head.weight.requires_grad
    assert torch.equal(model.norm.running_mean, statistics)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_exception_in_the_model_leaves_it_as_it_was() -> None:
    class Broken(PlainNetwork):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    model = Broken().train()
    images, labels = images_and_labels()
    with pytest.raises(RuntimeError, match="out of memory"):
        pgd(model, images, labels, epsilon=0.1, step_size=0.05, steps=2)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_custom_objective_is_what_is_raised() -> None:
    model, (images, labels) = build(), images_and_labels()

    def first_logit(logits: Tensor, _: Tensor) -> Tensor:
        return logits[:, 0].sum()

    attacked = pgd(
        model,
        images,
        labels,
        epsilon=0.1,
        step_size=0.03,
        steps=5,
        start=images,
        objective=first_logit,
    )
    with torch.no_grad():
        assert (model(attacked)[:, 0] > model(images)[:, 0]).all()


def test_one_hot_labels_attack_like_class_numbers() -> None:
    model, (images, labels) = build(), images_and_labels()
    soft = nn.functional.one_hot(labels, 10).float()
    settings = {"epsilon": 0.1, "step_size": 0.03, "start": images}
    hard = pgd(model, images, labels, steps=2, **settings)  # type: ignore[arg-type]
    assert torch.equal(hard, pgd(model, images, soft, steps=2, **settings))  # type: ignore[arg-type]


def test_memory_does_not_grow_over_two_hundred_attacks() -> None:
    model, (images, labels) = PlainNetwork(), images_and_labels(2)

    def num_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(item), Tensor) for item in gc.get_objects())

    pgd(model, images, labels, epsilon=0.1, step_size=0.05, steps=1)
    before = num_tensors()
    for _ in range(200):
        pgd(model, images, labels, epsilon=0.1, step_size=0.05, steps=1)
    assert num_tensors() <= before


class Other(nn.Module):
    """Any function as a model."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> object:
        return self.function(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"images: expected float \[B"),
        ({"images": torch.zeros(3, 8, 8)}, r"images: expected float \[B, C, H, W\]"),
        ({"norm": "l1"}, "norm: expected linf or l2, got 'l1'"),
        ({"epsilon": -0.1}, r"epsilon: expected at least 0, got -0\.1"),
        ({"epsilon": "8/x"}, "epsilon: expected a number or a fraction such as 8/255, got '8/x'"),
        ({"step_size": "nan"}, "step_size: expected at least 0, got nan"),
        ({"epsilon": "8"}, r"epsilon: expected 0 to 1, got 8: did you mean 8/255\?"),
        ({"epsilon": [0.1]}, r"epsilon: expected a number, got \[0.1\]"),
        ({"steps": -1}, "steps: expected a whole number of at least 0, got -1"),
        ({"steps": 1.0}, "steps: expected a whole number of at least 0, got 1.0"),
        ({"epsilon": 8}, r"epsilon: expected 0 to 1, got 8: did you mean 8/255\?"),
        (
            {"epsilon": 128, "norm": "l2"},
            r"epsilon: expected .* 55\.43, .* of 3x32x32, got 128: did you mean 128/255",
        ),
        (
            {"step_size": 2},
            r"step_size: expected at most 0\.2, the diameter of the ball, got 2: did you mean",
        ),
        ({"step_size": float("inf")}, "step_size: expected at most .*, got inf"),
        ({"epsilon": float("nan")}, "epsilon: expected at least 0, got nan"),
        ({"epsilon": torch.zeros(2)}, r"epsilon: expected a 0-d tensor on cpu, got float32 \[2\]"),
        (
            {"images": torch.full((2, 3, 8, 8), 255.0)},
            r"images: expected pixels in \[0, 1\], .* 255",
        ),
        ({"images": torch.full((2, 3, 8, 8), -1.0)}, r"images: expected pixels in \[0, 1\], .* -1"),
        ({"images": torch.full((2, 3, 8, 8), torch.nan)}, r"images: expected pixels .* nan"),
        ({"start": torch.rand(2, 3, 32, 32) + 1}, r"start: expected pixels in \[0, 1\]"),
        (
            {"start": torch.rand(1, 3, 32, 32)},
            r"start: expected float32 \[2, 3, 32, 32\] .* like images",
        ),
        ({"labels": torch.tensor([0, 10])}, "labels: expected 10 classes as logits have, got 10"),
        ({"labels": torch.tensor([0, -1])}, "labels: expected class numbers from 0, got -1"),
        ({"labels": torch.tensor([0])}, r"labels: expected int64 \[2\] or probabilities"),
        ({"labels": torch.tensor([0.0, 1.0])}, r"labels: expected int64 \[2\] or probabilities"),
        ({"labels": torch.rand(2, 9)}, r"labels: expected 10 classes .*, got float32 \[2, 9\]"),
        ({"labels": torch.ones(2, 10) * 7}, "labels: expected probabilities, got values from 7"),
        ({"model": PlainNetwork().to("meta")}, "model: expected on cpu like images, got meta"),
        ({"model": None}, "model: expected a torch.nn.Module, got NoneType"),
        ({"model": lambda images: images}, "model: expected a torch.nn.Module, got function"),
        (
            {"model": Other(lambda images: (images,))},
            r"model: expected logits \[2, K\], got tuple",
        ),
        (
            {"model": Other(lambda images: images)},
            r"model: expected logits \[2, K\], got float32 \[2, 3, 32, 32\] on cpu",
        ),
        (
            {"model": Other(lambda images: images.detach().flatten(1))},
            "model: expected logits with a gradient, got some without",
        ),
        ({"labels": torch.tensor([True, False])}, r"labels: expected int64 \[2\] .*, got bool"),
        ({"objective": "dlr"}, "objective: expected a function of logits and labels, got 'dlr'"),
        (
            {"objective": lambda _logits, _labels: 1.0},
            "objective: expected a loss that is a 0-d tensor, got float",
        ),
        (
            {"objective": cross_entropies},
            r"objective: expected a loss that is a 0-d tensor, got float32 \[2\] on cpu",
        ),
        (
            {"objective": lambda _logits, _labels: torch.tensor(1.0)},
            "objective: expected a loss with a gradient, got one without",
        ),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    images, labels = images_and_labels(2)
    settings: dict[str, object] = {"epsilon": 0.1, "step_size": 0.1, "steps": 1, "images": images}
    settings |= {"model": PlainNetwork(), "labels": labels}
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        pgd(**settings | change)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_a_dtype_that_the_model_does_not_take_are_refused(dtype: torch.dtype) -> None:
    images, labels = images_and_labels(2)
    ball = {"epsilon": 0.1, "step_size": 0.1, "steps": 1}
    name = str(dtype).removeprefix("torch.")
    message = f"^images: expected float32 as the model has, got {name}$"
    for model in (PlainNetwork(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))):
        with pytest.raises(ValueError, match=message):
            pgd(model, images.to(dtype), labels, **ball)  # type: ignore[arg-type]
    if dtype != torch.float64:  # a model of the package casts them
        assert pgd(build(), images.to(dtype), labels, **ball).dtype == dtype  # type: ignore[arg-type]


def test_radii_steps_and_labels_may_be_written_as_elsewhere() -> None:
    model, (images, labels) = build(), images_and_labels()
    expected = pgd(model, images, labels, epsilon=8 / 255, step_size=2 / 255, steps=2, start=images)
    for kind in (torch.uint8, torch.int32, torch.int64):
        attacked = pgd(
            model,
            images,
            labels.to(kind),
            epsilon="8/255",
            step_size="2/255",
            steps=np.int64(2),  # type: ignore[arg-type]
            start=images,
        )
        assert torch.equal(attacked, expected)


def test_inference_mode_is_refused_and_no_grad_is_not() -> None:
    model, (images, labels) = build(), images_and_labels(2)
    ball = {"epsilon": 0.1, "step_size": 0.1, "steps": 1}
    message = r"^pgd: expected a call outside of torch\.inference_mode\(\), got one in it: leave it"
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        pgd(model, images, labels, **ball)  # type: ignore[arg-type]
    with torch.no_grad():
        attacked = pgd(model, images, labels, **ball)  # type: ignore[arg-type]
    assert not torch.equal(attacked, images)


def test_values_of_tensors_are_left_alone_where_one_says_so() -> None:
    images, labels = images_and_labels(2)
    settings = {"epsilon": 0.1, "step_size": 0.1, "steps": 1, "check_tensors": False}
    attacked = pgd(PlainNetwork(), images + 2, labels, **settings)  # type: ignore[arg-type]
    assert attacked.max() == 1


def seed_of(number: int) -> int:
    return 1000 + number


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_placed_start_is_the_same_however_images_are_divided(norm: Norm) -> None:
    images = torch.rand(100, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    epsilon = torch.tensor(0.1)
    whole = placed_start(images, epsilon, norm, position=0, seed_of=seed_of)
    for size in (1, 7, 32, 50, 64):
        parts = [
            placed_start(images[i : i + size], epsilon, norm, position=i, seed_of=seed_of)
            for i in range(0, len(images), size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    other = placed_start(images, epsilon, norm, position=1, seed_of=seed_of)
    assert not torch.equal(other, whole)
    noise = (whole - images).flatten(1)
    assert len({tuple(row) for row in noise.tolist()}) == len(images)


def test_a_placed_start_of_no_images_is_none() -> None:
    images = torch.zeros(0, 3, 4, 4)
    start = placed_start(images, torch.tensor(0.1), "linf", position=64, seed_of=seed_of)
    assert start.shape == images.shape
