"""The sentinel sees catastrophic overfitting that really happens, and leaves the model alone."""

from dataclasses import replace
from functools import cache
from math import pi
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from safer_fast.attacks.pgd import Norm, default_step_size, pgd, random_start
from safer_fast.evaluation.overfitting import AttackGap, count_right
from tests.support.networks import PlainNetwork, build, images_and_labels
from tests.support.steps import forbidding_host_syncs

EPSILON, NUM_IMAGES = 0.2, 128


@pytest.mark.slow
def test_a_model_trained_with_fgsm_until_only_fgsm_fails_is_catastrophic() -> None:
    gap = gap_of(trained(steps=1), steps=1)
    assert gap.training_attack_accuracy > 0.5
    assert gap.pgd_20_accuracy < 0.2
    assert gap.is_catastrophic


@pytest.mark.slow
def test_its_twin_trained_with_pgd_is_not() -> None:
    gap = gap_of(trained(steps=3), steps=3)
    assert gap.pgd_20_accuracy > 0.5
    assert not gap.is_catastrophic


@pytest.mark.slow
def test_counts_of_parts_add_up_to_those_of_all_images() -> None:
    model, (images, labels) = trained(steps=1), digits(NUM_IMAGES)
    attack: dict[str, Any] = {"epsilon": EPSILON, "step_size": EPSILON, "steps": 1}
    start = random_start(images, torch.tensor(EPSILON), "linf", torch.Generator().manual_seed(0))
    whole = count_right(model, images, labels, start=start, **attack)
    parts = [
        count_right(model, images[part], labels[part], start=start[part], **attack)
        for part in (slice(0, 50), slice(50, None), slice(0, 0))
    ]
    assert parts[-1].tolist() == [0, 0]
    assert torch.equal(torch.stack(parts).sum(0), whole)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.006), ("l2", 0.3)])
def test_counts_are_those_of_pgd_from_the_same_start(norm: Norm, epsilon: float) -> None:
    model, (images, _) = build(), images_and_labels(24)
    labels = model(images).argmax(1)
    start = random_start(images, torch.tensor(epsilon), norm, torch.Generator().manual_seed(0))
    expected = []
    for steps, step_size in ((2, epsilon / 2), (20, default_step_size(epsilon, 20))):
        attacked = pgd(
            model,
            images,
            labels,
            epsilon=epsilon,
            step_size=step_size,
            steps=steps,
            norm=norm,
            start=start,
        )
        expected.append(int((model(attacked).argmax(1) == labels).sum()))
    counts = count_right(
        model,
        images,
        labels,
        epsilon=epsilon,
        step_size=epsilon / 2,
        steps=2,
        norm=norm,
        start=start,
    )
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected
    assert 0 < expected[1] < expected[0] < len(labels)


def test_a_model_whose_gradient_points_past_its_weak_spot_is_catastrophic() -> None:
    class Ripple(nn.Module):
        """Right in the middle of the ball and at its edge, wrong half-way between them."""

        def forward(self, images: Tensor) -> Tensor:
            distance = (images.flatten(1).mean(1) - 0.5) / EPSILON
            return torch.stack([(2 * pi * distance).cos(), 0 * distance], dim=1)

    images, labels = torch.full((8, 1, 4, 4), 0.5), torch.zeros(8, dtype=torch.int64)
    counts = count_right(
        Ripple(),
        images,
        labels,
        epsilon=EPSILON,
        step_size=EPSILON,
        steps=1,
        start=images + EPSILON / 10,
    )
    assert counts.tolist() == [8, 0]
    assert AttackGap.from_counts(counts, 8).is_catastrophic


def test_gradients_that_vanish_blind_both_attacks() -> None:
    class Stairs(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            level = (images.flatten(1).mean(1) * 10).round()
            return torch.stack([level, 10 - level], dim=1)

    images, labels = torch.full((8, 1, 4, 4), 0.6), torch.zeros(8, dtype=torch.int64)
    counts = count_right(
        Stairs(), images, labels, epsilon=EPSILON, step_size=EPSILON, steps=1, start=images
    )
    assert counts.tolist() == [8, 8]


def test_the_model_is_given_back_as_it_was() -> None:
    model, (images, labels) = PlainNetwork().train(), images_and_labels()
    model.head.eval()
    model.stem.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    pixels = images.clone()
    counts = [
        count_right(
            model, images, labels, epsilon=0.1, step_size=0.05, steps=2, start=images
        ).tolist()
        for _ in range(2)
    ]
    assert counts[0] == counts[1]
    assert [module.training for module in model.modules()] == modes
    assert not model.stem.weight.requires_grad
    assert model.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(images, pixels)


def test_counting_never_waits_for_the_device() -> None:
    model, (images, labels) = build(), images_and_labels()
    with forbidding_host_syncs():
        count_right(model, images, labels, epsilon=0.1, step_size=0.1, steps=1, start=images)


@pytest.mark.parametrize(
    ("training", "strong", "is_catastrophic"),
    [(128, 0, True), (96, 31, True), (96, 32, False), (14, 0, True), (12, 0, False), (0, 0, False)],
)
def test_a_gap_is_catastrophic_under_a_third_and_from_a_tenth_on(
    training: int, strong: int, is_catastrophic: bool
) -> None:
    gap = AttackGap.from_counts(torch.tensor([training, strong]), NUM_IMAGES)
    assert gap == AttackGap(training / NUM_IMAGES, strong / NUM_IMAGES, NUM_IMAGES)
    assert gap.is_catastrophic == is_catastrophic
    assert not replace(gap, pgd_20_accuracy=gap.training_attack_accuracy).is_catastrophic


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"epsilon": 0.0}, r"epsilon: expected above 0, got 0\.0"),
        ({"labels": torch.zeros(6, 10)}, r"labels: expected int64 \[B\], got torch.float32 \[6, 1"),
    ],
)
def test_where_nothing_attacks_there_is_nothing_to_watch(
    change: dict[str, Any], message: str
) -> None:
    images, labels = images_and_labels()
    settings = {"labels": labels, "epsilon": 0.1, "step_size": 0.1, "steps": 1, "start": images}
    with pytest.raises(ValueError, match=message):
        count_right(PlainNetwork(), images, **settings | change)


def test_a_gap_over_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="num_images: expected at least 1, got 0"):
        AttackGap.from_counts(torch.zeros(2, dtype=torch.int64), 0)


def digits(num_images: int) -> tuple[Tensor, Tensor]:
    """Digits drawn four times as large: FGSM overfits on pixels of which neighbours are alike."""
    data = load_digits()
    images = torch.tensor(data.images[:num_images] / 16).float()[:, None]
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)  # [B, 1, 32, 32]
    return images, torch.tensor(data.target[:num_images])


def training_attack(steps: int) -> dict[str, Any]:
    """FGSM from the image itself, or PGD."""
    step_size = EPSILON if steps == 1 else default_step_size(EPSILON, steps)
    return {"epsilon": EPSILON, "step_size": step_size, "steps": steps}


def gap_of(model: nn.Module, steps: int) -> AttackGap:
    images, labels = digits(NUM_IMAGES)
    counts = count_right(model, images, labels, start=images, **training_attack(steps))
    return AttackGap.from_counts(counts, len(images))


@cache
def trained(steps: int, num_epochs: int = 20) -> nn.Module:
    """The single layer of convolutions in which Andriushchenko and Flammarion (2020) found it."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 32 * 32, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    images, labels = digits(500)
    attack = training_attack(steps)
    for epoch in range(num_epochs):
        share = min(max(epoch - 1, 0) / 3, 1)  # two clean epochs, then a ramp
        radii = {name: attack[name] * share for name in ("epsilon", "step_size")}
        for batch in torch.randperm(len(images)).split(16):
            clean, wanted = images[batch], labels[batch]
            attacked = pgd(model, clean, wanted, start=clean, **attack | radii)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(attacked), wanted).backward()
            optimizer.step()
    return model
