"""Figures of a step equal those that plain PyTorch computes."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from safer_fast.attacks.pgd import cross_entropy, pgd
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.runtime.timing import StepTimer
from safer_fast.training.health import Health, health_figures
from safer_fast.training.objectives import Targets
from tests.support.networks import build, images_and_labels
from tests.support.steps import EPSILON, STEP_SIZE, STEPS, make_step, run_step

LAYER = "blocks.2.mlp.fc1"


def gradient_of(model: RobustModel, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the mean loss with respect to the layer's parameters, flat."""
    parameters = [model.network.get_parameter(name) for name in model.layers[LAYER]]
    for parameter in parameters:
        parameter.requires_grad_(True)
    loss = cross_entropy(model(images), labels) / len(labels)
    gradients = torch.autograd.grad(loss, parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_norm_and_cosine_are_those_of_the_two_gradients() -> None:
    rho = 0.5
    images, labels = images_and_labels()
    plain = build()
    attacked = pgd(
        plain,
        images,
        labels,
        epsilon=EPSILON,
        step_size=STEP_SIZE,
        steps=STEPS,
        generator=torch.Generator().manual_seed(5),
    )
    first = gradient_of(plain, attacked, labels)
    offset = 0
    with torch.no_grad():
        for name in plain.layers[LAYER]:
            parameter = plain.network.get_parameter(name)
            part = first[offset : offset + parameter.numel()]
            parameter.add_(part.view_as(parameter), alpha=rho / float(first.norm()))
            offset += parameter.numel()
    second = gradient_of(plain, attacked, labels)
    step, _ = make_step(build(), [LAYER], rho=rho, clip_norm=1e-3)
    run_step(step, images, labels)
    figures = health_figures(step.health.sums.take(), step.health.is_sharpness_aware)
    cosine = float(torch.dot(first, second) / first.norm() / second.norm())
    assert figures["gradient_norm"] == pytest.approx(float(first.norm()), rel=1e-4)
    assert figures["gradient_cosine"] == pytest.approx(cosine, abs=1e-4)
    assert cosine < 0.999  # else the test could not fail
    assert figures["loss_rise"] > 0


def test_without_a_second_pass_there_is_no_cosine() -> None:
    step, _ = make_step(build(), [LAYER], rho=0.0)
    run_step(step, *images_and_labels())
    figures = health_figures(step.health.sums.take(), step.health.is_sharpness_aware)
    assert figures["gradient_cosine"] is None
    assert figures["gradient_norm"] > 0
    assert figures["loss_rise"] == 0


def test_a_step_that_is_skipped_leaves_the_means_of_the_others() -> None:
    step, _ = make_step(build(), [LAYER])
    images, labels = images_and_labels()
    run_step(step, images, labels)
    alone = health_figures(step.health.sums.take(), is_sharpness_aware=True)
    step, _ = make_step(build(), [LAYER])
    run_step(step, images, labels)
    run_step(step, torch.full_like(images, float("nan")), labels)
    sums = step.health.sums.take()
    assert (sums["taken"], sums["skipped"]) == (1, 1)
    both = health_figures(sums, is_sharpness_aware=True)
    for name in ("gradient_norm", "gradient_cosine"):
        assert both[name] == alone[name] != 0


def count_right(model: RobustModel, images: Tensor, labels: Tensor, start: Tensor) -> list[int]:
    """Numbers of images classified right after 0, 1, ... steps, the last one left out."""
    counts = []
    for steps in range(STEPS):
        attacked = pgd(
            model,
            images,
            labels,
            epsilon=EPSILON,
            step_size=STEP_SIZE,
            steps=steps,
            start=start,
        )
        counts.append(int((model(attacked).argmax(1) == labels).sum()))
    return counts


@pytest.mark.parametrize("size", ["auto", 4])
def test_hits_are_counted_after_every_step_of_the_attack(size: int | str) -> None:
    model = build()
    images, _ = images_and_labels(24)
    labels = model(images).argmax(1)  # so that all are right before the attack
    start = (images + EPSILON * 0.3).clamp(0, 1)
    attack = ReplayedAttack(
        model,
        steps=STEPS,
        micro_batch=MicroBatch(size=size),  # type: ignore[arg-type]
    )
    attack.draw = lambda images, epsilon, norm: start[: len(images)]
    radii = torch.tensor(EPSILON), torch.tensor(STEP_SIZE)
    for chosen in (slice(None), slice(0, 10)):
        counted = torch.zeros(24, dtype=torch.bool)
        counted[chosen] = True
        attack(images, labels, *radii, counted)
        expected = count_right(model, images[chosen], labels[chosen], start[chosen])
        assert attack.hits.tolist() == [*expected, int(counted.sum())]
        assert expected[-1] < expected[0]  # or any place would do
    attack.steps = 0
    attack(images, labels, *radii)
    assert attack.hits.tolist() == [0] * (STEPS + 1)


def test_success_of_the_attack_ends_with_that_of_the_first_pass() -> None:
    health = Health(torch.zeros(65), False, 2)
    health.num_right.fill_(1)
    targets = Targets.alike(torch.zeros(4, dtype=torch.int64))
    health.record(targets, torch.tensor([4.0, 2.0, 4.0]), torch.ones(()), torch.zeros(()))
    figures = health_figures(health.sums.take(), is_sharpness_aware=False)
    assert figures["attack_success"] == [0.0, 0.5, 0.75]
    health.record(targets, torch.zeros(3), torch.ones(()), torch.zeros(()))
    figures = health_figures(health.sums.take(), is_sharpness_aware=False)
    assert figures["attack_success"] is None


def test_the_sums_have_the_shapes_that_are_told_beforehand() -> None:
    step, _ = make_step(build(), [LAYER])
    run_step(step, *images_and_labels())
    sums = step.health.sums
    sums.load(step.health.shapes, sums.values())
    assert sums.take()["right_1"] >= 0


def test_stages_are_timed_one_after_the_other_and_time_between_steps_is_not() -> None:
    stages = StepTimer(torch.device("cpu"))
    started = time.perf_counter()
    for _ in range(2):
        stages.begin()
        time.sleep(0.03)
        stages.end("attack")
        time.sleep(0.01)
        stages.end("update")
        time.sleep(0.05)
    elapsed = time.perf_counter() - started
    taken = stages.take()
    assert taken["attack"] >= 0.06
    assert taken["update"] >= 0.02
    assert sum(taken.values()) <= elapsed - 0.1
    assert stages.take() == {}
