"""A batch in parts is the batch at once, and memory that ends only makes the parts smaller."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from safer_fast.attacks.named import ThreatModel
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.data import Batch
from safer_fast.evaluation.accuracy import evaluate
from safer_fast.models.robust_model import RobustModel
from safer_fast.runtime.micro_batch import MicroBatch
from tests.support.networks import build, images_and_labels
from tests.support.steps import assert_near_fp64, make_step, run_step


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["pgd-at", "trades", "mart"])
@pytest.mark.parametrize(("attacked", "trained"), [(2, 6), (6, 2), (4, 4), (1, 1)])
def test_steps_in_parts_are_as_near_to_fp64_as_textbook_pytorch(
    objective: str, attacked: int, trained: int
) -> None:
    assert_near_fp64(
        "vit_tiny_patch16_224",
        ["blocks.2.mlp.fc1"],
        2,
        objective=objective,
        fast={"attack_micro_batch": attacked, "micro_batch": MicroBatch(size=trained)},
    )


def test_gradients_of_parts_add_up_to_those_of_the_batch() -> None:
    found = []
    for size in (6, 4, 1):
        step, _ = make_step(build(), None, micro_batch=MicroBatch(size=size), rho=0.0)
        step.attack.steps = 0
        images, labels = images_and_labels()
        run_step(step, images, labels)
        found.append(torch.cat([view.flatten() for view in step.selection.gradient_views]))
        assert step.health.sums.take()["images"] == 6
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-4, atol=1e-6)


@contextmanager
def memory_for(model: RobustModel, num_images: int, with_gradients: bool = False) -> Iterator[None]:
    """Runs out of memory whenever more images than that go through the network.

    `with_gradients`: only where activations are kept for a backward pass.
    """
    suffix = model.suffix

    def limited(features: Tensor, cut: int) -> Tensor:
        is_kept = features.requires_grad or not with_gradients
        if len(features) > num_images and is_kept:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")
        return suffix(features, cut)

    model.suffix = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.suffix


def test_a_step_survives_running_out_of_memory_and_learns_the_same() -> None:
    lines: list[str] = []
    released: list[bool] = []
    images, labels = images_and_labels()

    def release() -> bool:
        released.append(True)
        return False

    def micro_batch(flag: str) -> MicroBatch:
        return MicroBatch(flag, "auto", release, lines.append)

    def run(num_images: int) -> dict[str, Tensor]:
        step, arenas = make_step(
            build(), ["blocks.2.mlp.fc1"], micro_batch=micro_batch("runtime.train_micro_batch")
        )
        step.attack.micro_batch = micro_batch("runtime.attack_micro_batch")
        with memory_for(step.model, num_images):
            for _ in range(3):
                run_step(step, images, labels)
        return arenas.state_dict()

    plenty, little = run(6), run(2)
    for name, weights in plenty.items():
        torch.testing.assert_close(little[name], weights, rtol=1e-3, atol=1e-5)
    assert lines == [
        f"runtime.{phase}_micro_batch: {size} images at a time, {tried} do not fit in memory"
        for phase in ("attack", "train")
        for size, tried in ((3, 6), (2, 3))
    ]
    assert len(released) == 4


def test_memory_that_can_be_freed_is_freed_before_the_parts_get_smaller() -> None:
    held, tried, lines = [2], list[int](), list[str]()

    def work(size: int) -> None:
        tried.append(size)
        if size + sum(held) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def release() -> bool:
        had = bool(held)
        held.clear()
        return had

    batches = MicroBatch("train", "auto", release, lines.append)
    batches.run(8, work)
    assert (tried, lines) == ([8, 8], [])
    batches.run(16, work)
    assert tried == [8, 8, 16, 8]
    assert lines == ["train: 8 images at a time, 16 do not fit in memory"]
    held.append(2)
    MicroBatch("train", 8, release, lines.append).run(8, work)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4, "expected auto or a smaller number, got 4 images at once"),
        ("auto", "expected a smaller model or image, got 1 images at once"),
    ],
)
def test_memory_that_does_not_suffice_is_one_clear_line(size: Any, expected: str) -> None:
    def work(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    batches = MicroBatch("runtime.attack_micro_batch", size, report=lambda line: None)
    with pytest.raises(ValueError, match=r"^runtime\.attack_micro_batch: ") as error:
        batches.run(8, work)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_no_traceback_keeps_memory_while_less_is_tried() -> None:
    import weakref

    held: list[weakref.ref[Tensor]] = []

    def work(size: int) -> None:
        assert not any(reference() is not None for reference in held)
        tensor = torch.ones(size)
        held.append(weakref.ref(tensor))
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    MicroBatch(report=lambda line: None).run(8, work)
    assert len(held) == 3


def test_a_batch_smaller_than_the_parts_is_taken_at_once() -> None:
    sizes: list[int] = []
    MicroBatch(size=8).run(5, sizes.append)
    assert sizes == [5]


def test_evaluation_survives_running_out_of_memory_with_the_same_figures() -> None:
    images, labels = images_and_labels(12)
    lines: list[str] = []
    results = []
    for num_images in (12, 4):
        batches = iter([Batch(images[:4], labels[:4]), Batch(images[4:], labels[4:])])
        model, at_once = build(), MicroBatch("evaluation", report=lines.append)
        with memory_for(model, num_images, with_gradients=True):
            results.append(
                evaluate(
                    model,
                    batches,
                    ["clean", "fgsm", "pgd-3"],
                    ThreatModel("linf", 0.03),
                    attack=ReplayedAttack(model, micro_batch=at_once),
                    attacks_wrong=True,
                )
            )
    assert results[0] == results[1]
    assert lines == ["evaluation: 4 images at a time, 8 do not fit in memory"]
