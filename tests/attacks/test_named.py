"""Attacks by name are rows of one table; a loss of one's own is an attack beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from safer_fast import register_attack
from safer_fast.attacks import named
from safer_fast.attacks.masking import has_gradients, starts_at_random, suspicions
from safer_fast.attacks.named import LOSSES, ThreatModel, attack_spec
from safer_fast.attacks.pgd import pgd, placed_start
from safer_fast.config.attack_names import (
    ATTACKS,
    LIBRARY_ATTACKS,
    check_attack_name,
    facts_of,
    num_attack_steps,
)
from safer_fast.data import Batch
from safer_fast.evaluation.accuracy import evaluate
from safer_fast.runtime.seeds import derive_seed
from tests.support.networks import build, images_and_labels


@pytest.fixture
def _as_before() -> Iterator[None]:
    """The table has its own rows alone afterwards."""
    attacks, losses = dict(ATTACKS), dict(LOSSES)
    yield
    for table, rows in ((ATTACKS, attacks), (LOSSES, losses)):
        table.clear()
        table.update(rows)  # type: ignore[arg-type]


def smallest(logits: Tensor, labels: Tensor) -> Tensor:
    """Lowers the logit of the class."""
    return -logits.gather(1, labels[:, None]).sum()


def test_every_gradient_attack_of_the_table_has_a_loss() -> None:
    own = [facts for facts in ATTACKS.values() if facts.loss and not facts.is_library]
    assert {facts.loss for facts in own} == set(LOSSES)
    assert LIBRARY_ATTACKS == ("apgd-ce", "apgd-dlr", "square", "autoattack")


@pytest.mark.parametrize(
    ("name", "loss", "steps"),
    [
        ("clean", "", 0),
        ("fgsm", "cross-entropy", 1),
        ("pgd-7", "cross-entropy", 7),
        ("pgd-007", "cross-entropy", 7),
        ("cw", "margin", 30),
        ("cw-5", "margin", 5),
        ("apgd-ce", "cross-entropy", 100),
        ("square", "none", 5000),
    ],
)
def test_a_name_has_a_loss_and_steps(name: str, loss: str, steps: int) -> None:
    facts = facts_of(name)
    assert facts is not None
    assert (facts.loss, num_attack_steps(name)) == (loss, steps)
    check_attack_name(name, "--attacks", LIBRARY_ATTACKS)


@pytest.mark.parametrize(
    "name", ["pgd", "pgd-0", "pgd-", "pgd-x", "pgd--1", "fgsm-3", "square", "apgd-ce", "mine-3", ""]
)
def test_other_names_are_refused_in_one_line(name: str) -> None:
    message = r"^--evaluation\.attacks: expected clean, fgsm, pgd-K \(such as pgd-20\), cw, cw-K, "
    with pytest.raises(ValueError, match=message + "got "):
        check_attack_name(name, "--evaluation.attacks")


@pytest.mark.usefixtures("_as_before")
def test_a_registered_loss_is_an_attack_like_pgd() -> None:
    register_attack("low", smallest)
    check_attack_name("low-3", "--attacks")
    with pytest.raises(ValueError, match=r"expected clean, [^\n]*, low-K, got 'low'"):
        check_attack_name("low", "--attacks")
    assert attack_spec("low-3", 0.3)[:3] == attack_spec("pgd-3", 0.3)[:3]
    assert has_gradients("low-3")
    assert starts_at_random("low-3")

    images, labels = images_and_labels(12)
    model = build()
    labels[:8] = model(images[:8]).argmax(1)
    (found,) = evaluate(model, [Batch(images, labels)], ["low-3"], ThreatModel("linf", 0.02))

    def seed_of(number: int) -> int:
        return derive_seed(0, "evaluation low-3", number)

    start = placed_start(images, torch.tensor(0.02), "linf", position=0, seed_of=seed_of)
    size = attack_spec("low-3", 0.02).step_size
    attacked = pgd(
        model,
        images,
        labels,
        epsilon=0.02,
        step_size=size,
        steps=3,
        start=start,
        objective=smallest,
    )
    right = (model(images).argmax(1) == labels) & (model(attacked).argmax(1) == labels)
    assert found.accuracy == right.double().mean().item()
    assert found.num_zero_gradients == 0


@pytest.mark.usefixtures("_as_before")
def test_a_registered_attack_that_leaves_less_is_a_sign_of_masked_gradients() -> None:
    register_attack("low", smallest, steps=20)
    place = {"weights": "last", "split": "test", "epsilon": 0.1, "num_images": 1000}
    rows = [{**place, "attack": n, "accuracy": a} for n, a in (("pgd-20", 0.5), ("low", 0.4))]
    assert [bool(reasons) for reasons in suspicions(rows)] == [True, False]


@pytest.mark.parametrize("name", ["pgd", "fgsm", "square", "low-3", "Low", "", "3low"])
def test_names_that_are_taken_or_unclear_are_not_registered(name: str) -> None:
    before = dict(named.LOSSES)
    with pytest.raises(ValueError, match=r"^name: expected "):
        register_attack(name, smallest)
    with pytest.raises(ValueError, match=r"^steps: expected at least 1, got 0$"):
        register_attack("low", smallest, steps=0)
    with pytest.raises(ValueError, match=r"^loss: expected a function of .*, got 'margin'$"):
        register_attack("low", "margin")  # type: ignore[arg-type]
    assert before == named.LOSSES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("linff", 0.1), r"^norm: expected linf, l2 or l1, got 'linff', did you mean linf\?$"),
        (("l2", -1), r"^epsilon: expected a radius of at least 0, got -1$"),
        (("l2", float("nan")), r"^epsilon: expected a radius of at least 0, got nan$"),
    ],
    ids=str,
)
def test_balls_that_are_none_are_refused(values: tuple[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named.ThreatModel(*values)  # type: ignore[arg-type]
