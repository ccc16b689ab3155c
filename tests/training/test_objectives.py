"""The training losses are the formulas of their papers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from safer_fast.config.schema import ObjectiveConfig
from safer_fast.training.objectives import Objective, Targets, divergences


def logits_and_labels() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    adversarial, clean = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64) * 3
    return adversarial, clean, torch.randint(5, (7,), generator=generator)


def test_pgd_at_is_cross_entropy_with_label_smoothing() -> None:
    adversarial, _, labels = logits_and_labels()
    objective = Objective(ObjectiveConfig(label_smoothing=0.1))
    smooth = torch.full((7, 5), 0.1 / 5, dtype=torch.float64)
    smooth[torch.arange(7), labels] += 0.9
    expected = -(smooth * adversarial.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(objective.loss(adversarial, Targets.alike(labels)), expected)
    assert not objective.needs_clean


def test_trades_adds_the_divergence_from_the_clean_prediction() -> None:
    adversarial, clean, labels = logits_and_labels()
    objective = Objective(ObjectiveConfig(name="trades", beta=2.5))
    p, q = clean.softmax(1), adversarial.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    expected = functional.cross_entropy(clean, labels) + 2.5 * kl
    assert objective.needs_clean
    torch.testing.assert_close(
        objective.loss(torch.cat([adversarial, clean]), Targets.alike(labels)), expected
    )


def test_the_attack_of_trades_raises_that_divergence() -> None:
    adversarial, clean, _ = logits_and_labels()
    loss = Objective(ObjectiveConfig(name="trades")).attack_loss
    assert loss.against_clean
    raised = loss.function(adversarial, clean)
    torch.testing.assert_close(raised, divergences(adversarial, clean).sum())
    assert float(loss.function(clean, clean)) == pytest.approx(0, abs=1e-12)


def test_mart_boosts_the_margin_and_weighs_by_doubt() -> None:
    adversarial, clean, labels = logits_and_labels()
    objective = Objective(ObjectiveConfig(name="mart", beta=5.0))
    expected = torch.zeros((), dtype=torch.float64)
    for a, c, label in zip(adversarial.softmax(1), clean.softmax(1), labels, strict=True):
        runner_up = max(float(a[k]) for k in range(5) if k != label)
        boosted = -a[label].log() - torch.log(torch.tensor(1.0001 - runner_up + 1e-12))
        kl = (c * (c.log() - a.log())).sum()
        expected += boosted + 5.0 * kl * (1.0000001 - c[label])
    actual = objective.loss(torch.cat([adversarial, clean]), Targets.alike(labels))
    torch.testing.assert_close(actual, expected / 7, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["pgd-at", "trades"])
def test_soft_labels_count_like_class_numbers(name: str) -> None:
    adversarial, clean, labels = logits_and_labels()
    objective = Objective(ObjectiveConfig(name=name))  # type: ignore[arg-type]
    logits = torch.cat([adversarial, clean]) if objective.needs_clean else adversarial
    soft = functional.one_hot(labels, 5).double()
    losses = [objective.loss(logits, Targets.alike(target)) for target in (soft, labels)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", ["pgd-at", "trades", "mart"])
def test_images_that_only_fill_a_batch_up_change_nothing(name: str) -> None:
    adversarial, clean, labels = logits_and_labels()
    objective = Objective(ObjectiveConfig(name=name))  # type: ignore[arg-type]

    def loss(num_images: int, targets: Targets) -> Tensor:
        both = [adversarial[:num_images], clean[:num_images]]
        return objective.loss(torch.cat(both[: 1 + objective.needs_clean]), targets)

    weights = torch.tensor([0.25] * 4 + [0.0] * 3)
    torch.testing.assert_close(
        loss(7, Targets(labels, weights)), loss(4, Targets.alike(labels[:4]))
    )


def test_only_images_that_count_are_counted() -> None:
    logits = torch.eye(4)
    targets = Targets(torch.tensor([0, 1, 3, 3]), torch.tensor([0.5, 0.5, 0, 0]))
    assert int(targets.num_images()) == 2
    assert int(targets.num_right(logits)) == 2
    assert int(Targets.alike(targets.labels).num_right(logits)) == 3
    assert int(Targets(logits, targets.weights).num_right(logits)) == 2  # soft labels


def test_parts_of_targets_keep_their_weights_in_the_whole() -> None:
    first, second = Targets.alike(torch.arange(5)).split(3)
    assert first.labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(torch.cat([first.weights, second.weights]), torch.full((5,), 0.2))
