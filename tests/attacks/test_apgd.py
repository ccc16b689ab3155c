"""Auto-PGD is that of AutoAttack's library, without waiting for the device."""

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor

from safer_fast import train_model
from safer_fast.attacks.apgd import Climb, checkpoints, climb
from safer_fast.attacks.named import TRAINING_LOSSES, logit_ratios, margins
from safer_fast.attacks.pgd import EachLoss, cross_entropies, frozen
from safer_fast.attacks.replayed import PixelLoss, ReplayedAttack
from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import AttackConfig, ObjectiveConfig
from safer_fast.models.robust_model import RobustModel
from safer_fast.runs.report.page import write_report
from safer_fast.runtime.cuda_graphs import Buffers
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.training.objectives import Objective, divergences
from tests.support.networks import build, images_and_labels
from tests.support.small_runs import TINY
from tests.support.steps import forbidding_host_syncs

EPSILON = {"linf": 0.03, "l2": 0.5}
STEPS = (1, 2, 3, 5, 10, 40)
LOSSES = {"ce": cross_entropies, "dlr": logit_ratios}


def begin() -> tuple[RobustModel, Tensor, Tensor, Tensor]:
    """A model, images, labels and a start."""
    images, labels = images_and_labels(12)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(2)) * 0.02 - 0.01
    return build(), images, labels, (images + noise).clamp(0, 1)


def theirs(
    model: RobustModel,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    norm: str,
    steps: int,
    loss: str = "ce",
) -> tuple[Tensor, Tensor]:
    """Points of the highest loss, and those losses, by AutoAttack's library."""
    names = {"linf": "Linf", "l2": "L2"}
    settings: Any = {"n_iter": steps, "norm": names[norm], "eps": EPSILON[norm], "device": "cpu"}
    library = APGDAttack(model, loss=loss, **settings)
    library.init_hyperparam(images)
    with frozen(model):
        best, _, losses, _ = library.attack_single_run(images, labels, x_init=start)
    return best, losses


def climbed(norm: Any, steps: int, losses: EachLoss = cross_entropies) -> Climb:
    """The state after a climb of ours."""
    model, images, labels, start = begin()
    state = Climb(Buffers(), start, images, torch.tensor(EPSILON[norm]), norm)
    with frozen(model):
        climb(state, model, labels, losses, steps, lambda _, work: work())
    return state


@pytest.mark.parametrize("steps", STEPS)
def test_in_linf_it_is_that_of_the_library_bit_for_bit(steps: int) -> None:
    best, losses = theirs(*begin(), "linf", steps)
    ours = climbed("linf", steps)
    assert torch.equal(ours.best, best)
    assert torch.equal(ours.best_loss, losses)
    if steps == 40:  # or nothing of what is adaptive was compared
        assert len(ours.step_size.unique()) > 1


@pytest.mark.parametrize("steps", STEPS[:-1])
def test_in_l2_it_is_that_of_the_library_up_to_rounding(steps: int) -> None:
    best, losses = theirs(*begin(), "l2", steps)
    ours = climbed("l2", steps)
    torch.testing.assert_close(ours.best, best)
    torch.testing.assert_close(ours.best_loss, losses)


@pytest.mark.filterwarnings("ignore:there are 1 points with zero gradient")  # the label is third
def test_the_ratio_of_logits_is_that_of_the_library() -> None:
    logits = torch.randn(9, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9)
    library = APGDAttack(build(), device="cpu", loss="dlr", norm="Linf", eps=0.03)
    torch.testing.assert_close(logit_ratios(logits, labels), library.dlr_loss(logits, labels))
    best, losses = theirs(*begin(), "linf", 5, "dlr")
    ours = climbed("linf", 5, logit_ratios)
    torch.testing.assert_close(ours.best_loss, losses)
    torch.testing.assert_close(ours.best, best)


@pytest.mark.parametrize("norm", EPSILON)
@pytest.mark.parametrize("savings", [(), ("patch-order", "class-token")], ids=["plain", "savings"])
def test_in_training_it_is_the_same_attack(norm: Any, savings: tuple[str, ...]) -> None:
    model, images, labels, start = begin()
    best, _ = theirs(model, images, labels, start, norm, 5)
    model.enable_savings(savings, 32)
    attack = ReplayedAttack(model, norm=norm, steps=5, kind="apgd", micro_batch=MicroBatch(size=5))
    found = attack(images, labels, torch.tensor(EPSILON[norm]), torch.tensor(0.0), start=start)
    torch.testing.assert_close(found, model.arrange(best), rtol=1e-4, atol=1e-5)
    assert attack.hits[-1] == len(images)
    assert attack.hits[0] >= attack.hits[-2]


def test_it_never_waits_for_the_device() -> None:
    model, images, labels, start = begin()
    attack = ReplayedAttack(model, steps=10, kind="apgd")
    radii = torch.tensor(0.03), torch.tensor(0.01)
    with forbidding_host_syncs():
        attack(images, labels, *radii, start=start)


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(2) == {0: 1, 1: 1}
    assert list(checkpoints(100)) == [21, 40, 56, 69, 79, 86, 92, 98]


@pytest.mark.parametrize("name", ["trades", *TRAINING_LOSSES])
def test_losses_of_images_are_those_that_pgd_raises_summed(name: str) -> None:
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    labels, clean = torch.arange(6), logits.roll(1, 0)
    is_trades = name == "trades"
    objective = ObjectiveConfig(name="trades" if is_trades else "pgd-at")
    loss = Objective(objective, "objective" if is_trades else name).attack_loss
    targets = clean if loss.against_clean else labels
    each = loss.of_each(logits, targets)
    assert each.shape == (6,)
    torch.testing.assert_close(each.sum(), loss.function(logits, targets))
    alone = [loss.function(logits[i : i + 1], targets[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(each, torch.stack(alone))


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
@pytest.mark.parametrize("losses", [margins, logit_ratios, divergences])
def test_another_loss_is_raised_too(kind: Any, losses: EachLoss) -> None:
    model, images, labels, start = begin()
    loss = PixelLoss.of(losses, against_clean=losses is divergences)
    attack = ReplayedAttack(model, steps=5, kind=kind)
    radii = torch.tensor(0.03), torch.tensor(0.01)
    with torch.no_grad():
        targets = model(images) if loss.against_clean else labels
        before = losses(model(start), targets)
    found = attack(images, labels, *radii, loss=loss, start=start).clone()
    with torch.no_grad():
        after = losses(model(found), targets)
    assert after.sum() > before.sum()
    if kind == "apgd":  # which keeps the worst point of each image
        assert (after >= before).all()


def test_the_loss_that_settings_name_takes_the_place_of_that_of_the_objective() -> None:
    hint = get_args(get_type_hints(AttackConfig)["loss"])
    assert hint == ("objective", *TRAINING_LOSSES)
    for name in ("pgd-at", "trades", "mart"):
        loss = Objective(ObjectiveConfig(name=name), "margin").attack_loss
        assert loss == TRAINING_LOSSES["margin"]
        assert not loss.against_clean


def test_a_sum_over_images_is_refused_in_one_line() -> None:
    model, images, labels, start = begin()
    attack = ReplayedAttack(model, steps=2, kind="apgd")
    loss = PixelLoss.of(lambda logits, labels: cross_entropies(logits, labels).sum())
    with pytest.raises(ValueError, match="needs the loss of each image"):
        attack(images, labels, torch.tensor(0.03), torch.tensor(0.01), loss=loss, start=start)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--attack.name=apgd"],
            "--attack.steps: expected a number with --attack.name apgd, got auto",
        ),
        (
            ["--attack.name=apgd", "--attack.steps=2", "--attack.step_size=2/255"],
            "--attack.step_size: expected none with --attack.name apgd, which begins at 2 epsilon, "
            "got 0.00784314",
        ),
        (
            ["--attack.loss=dlr", "--data.mixup=0.2"],
            "--data.mixup: expected 0 with --attack.loss dlr, whose labels are class numbers, "
            "got 0.2",
        ),
        (
            ["--attack.loss=other"],
            "--attack.loss: expected one of objective, cross-entropy, margin, dlr, got other",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r"attack|mixup") as error:
        parse_config(flags)
    assert str(error.value) == message


def test_an_objective_of_embeddings_has_a_loss_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"--attack.loss: expected objective with .* fare") as one:
        Objective(ObjectiveConfig(name="fare"), "margin")
    assert str(one.value).endswith("which has no logits, got margin")


def test_a_run_names_its_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--data.max_images=32", "--selection.criterion=all", "--sam.rho=0"]
    flags += ["--attack.name=apgd", "--attack.steps=2", "--attack.loss=margin"]
    folder = train_model(parse_config([*flags, f"--output={tmp_path / 'run'}"]))
    assert re.search(
        r"attack: +APGD-2, linf, epsilon 0.1, raising the margin", capsys.readouterr().out
    )
    report = write_report([folder]).read_text()
    assert "APGD-2, linf, 0.1, raising the margin" in report
    assert "APGD-AT on digits" in report


def test_two_classes_have_no_third_logit(tmp_path: Path) -> None:
    images = np.zeros((8, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", images=images, labels=np.arange(8) % 2)
    flags = [*TINY, "--attack.loss=dlr", f"--data.path={tmp_path / 'two.npz'}"]
    with pytest.raises(ValueError, match=r"^attack.loss: expected margin for data of 2 classes"):
        train_model(parse_config([*flags, f"--output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()
