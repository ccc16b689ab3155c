"""Several ranks train what one trains; what happens to one of them ends or stops all."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from safer_fast import train
from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import DataConfig
from safer_fast.data import Batch, as_pixels, load_data
from safer_fast.models.build import build_model
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runtime.ranks import Ranks, connected
from safer_fast.selection.scoring import rank_layers
from safer_fast.training.objectives import Targets
from safer_fast.training.step import Step
from safer_fast.training.trainer import Trainer
from tests.support.networks import build, images_and_labels
from tests.support.pictures import encode, photo
from tests.support.ranks import (
    FLAGS,
    Ending,
    Torchrun,
    assert_status,
    together,
    training,
    write_digits,
)

MEASURED = ("time_s", "images_per_second", "data_wait_fraction", "peak_memory_mib", "stage_ms")
MEASURED += ("audit_fraction",)
SGD = ["--optim.name=sgd", "--optim.learning_rate=0.05", "--optim.clip_norm=1"]
DORA = ["--selection.adapter=dora", "--selection.lora_rank=2"]
# Flags, and how far a weight may be from that of one rank after 16 steps of two or three. Measured:
# 1e-8 with SGD, 5e-6 to 3e-5 with AdamW, which divides by the size of a gradient and so magnifies
# the rounding of a small one. Counting images of smaller parts too much gives 2e-3 and 1e-2. Muon's
# limit is for the root mean square of a parameter, measured 3e-5 to 3e-4: directions that gradients
# have next to nothing of are those of their rounding to bf16, and as long as the others.
RUNS: dict[str, tuple[list[str], float]] = {
    "adamw": (["--optim.ema_decay=0.8", "--data.random_erasing=0.5"], 1e-4),
    "sgd, l2": ([*SGD, "--attack.norm=l2", "--attack.epsilon=0.5"], 1e-6),
    "trades": (["--objective.name=trades"], 1e-4),
    "apgd": (["--attack.name=apgd", "--attack.steps=3"], 1e-4),
    "dora, growing images": ([*SGD, *DORA, "--data.resolution_schedule=4@0.5,8"], 1e-6),
    "muon": (["--optim.name=muon"], 1e-3),
}
WITH_BATCH_NORMS = [
    "--model.name=xcit_nano_12_p8_224",
    "--model.arguments={depth: 1, cls_attn_layers: 1}",
    "--model.patch_size=8",
    "--data.image_size=16",
    "--selection.criterion=all",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag of a small set of digits."""
    return f"--data.path={write_digits(tmp_path_factory.mktemp('data') / 'digits.npz')}"


Runs = Callable[..., dict[int, Path]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Runs:
    """Folders of the same run by several numbers of ranks, each trained once."""
    folder, known = tmp_path_factory.mktemp("runs"), set[Path]()

    def run_all(name: str, *numbers: int) -> dict[int, Path]:
        found = {number: folder / f"{name} {number}" for number in numbers}
        missing = {number: out for number, out in found.items() if out not in known}
        flags = [*FLAGS, digits, *RUNS[name][0]]
        teams = [training(number, [*flags, f"--output={out}"]) for number, out in missing.items()]
        for team, out in zip(teams, missing.values(), strict=True):
            first, *others = team.endings()
            assert_status(0, [first, *others])
            assert all(ending.output == "" for ending in others)
            said_in(out).write_text(first.output)
        known.update(missing.values())
        return found

    return run_all


def said_in(folder: Path) -> Path:
    """The file with the output of rank 0 during a run of `runs`."""
    return folder.with_name(f"{folder.name}.txt")


def difference(folder: Path, other: Path, name: str = "model.safetensors") -> float:
    """The largest difference of a weight."""
    weights, others = load_file(folder / name), load_file(other / name)
    return max(float((weights[key] - others[key]).abs().max()) for key in others)


def spread(folder: Path, other: Path) -> float:
    """The largest root mean square of the differences of a parameter."""
    weights, others = (load_file(each / "model.safetensors") for each in (folder, other))
    return max(float((weights[key] - others[key]).square().mean().sqrt()) for key in others)


def events_of(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl, without what is measured."""
    return [
        {key: value for key, value in event.items() if key not in MEASURED}
        for event in read_metrics(folder / "metrics.jsonl")
    ]


def assert_near(actual: Any, expected: Any, where: str = "") -> None:
    """Compare nested values; floats may differ by rounding."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_near(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_near(*pair, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5), where
    else:
        assert actual == expected, where


def assert_same_run(folder: Path, other: Path) -> None:
    """Compare two runs: the bits of the weights, and the lines of the log without times."""
    for name in ("model.safetensors", "best.safetensors"):
        weights, others = load_file(folder / name), load_file(other / name)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in others)
    assert events_of(folder) == events_of(other)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "muon"])
def test_two_and_three_ranks_train_what_one_trains(name: str, runs: Runs) -> None:
    alone, *others = runs(name, 1, 2, 3).values()
    tolerance = RUNS[name][1]
    (start, *expected) = events_of(alone)
    assert [event["event"] for event in expected].count("selection") == 2
    for folder in others:
        assert difference(folder, alone) < tolerance
        assert difference(folder, alone, "best.safetensors") < tolerance
        (own_start, *events) = events_of(folder)
        assert own_start.keys() == start.keys()
        assert_near(events, expected)


def test_two_and_three_ranks_end_near_one_with_muon(runs: Runs) -> None:
    alone, *others = runs("muon", 1, 2, 3).values()
    chosen = [e["selected"] for e in events_of(alone) if e["event"] == "selection"]
    for folder in others:
        assert spread(folder, alone) < RUNS["muon"][1]
        assert [e["selected"] for e in events_of(folder) if e["event"] == "selection"] == chosen


@pytest.mark.parametrize(("name", "num_ranks"), [("adamw", 2), ("sgd, l2", 3)])
def test_a_mean_of_the_means_of_ranks_would_be_noticed(
    name: str, num_ranks: int, runs: Runs, digits: str, tmp_path: Path
) -> None:
    flags, tolerance = RUNS[name]
    flags = [*FLAGS, digits, *flags, f"--output={tmp_path / 'run'}"]
    assert_status(0, training(num_ranks, flags, mean_of_means).endings())
    assert difference(tmp_path / "run", runs(name, 1)[1]) > 50 * tolerance


def mean_of_means() -> None:
    def mean_weights(ranks: Ranks, weights: Tensor) -> Tensor:
        return weights / ranks.num_ranks

    Ranks.mean_weights = mean_weights  # type: ignore[method-assign]


def test_several_ranks_say_what_one_says(runs: Runs) -> None:
    folders = runs("adamw", 1, 2, 3).values()
    alone, two, three = (said_in(folder).read_text().splitlines() for folder in folders)
    assert len(alone) == len(two) == len(three) > 10
    (data,) = (line for line in alone if line.startswith("data:"))
    assert data in two
    assert data in three


def test_a_dry_run_counts_the_images_of_all_ranks(digits: str) -> None:
    first, second = training(2, [*FLAGS, digits, "--dry-run"]).endings()
    assert_status(0, [first, second])
    assert second.output == ""
    found = re.findall(r"step +([0-9.]+) ms, ([0-9.]+) images/s", first.output)
    assert len(found) == 2
    for milliseconds, images_per_second in found:
        assert float(milliseconds) * float(images_per_second) / 1e3 == pytest.approx(16, rel=0.02)


def test_a_dry_run_takes_fewer_validation_images_than_ranks(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=np.arange(32) % 10)
    few = [f"--data.path={tmp_path / 'few.npz'}", "--data.validation_fraction=0.03"]
    assert_status(0, training(2, [*FLAGS, *few, "--dry-run"]).endings())


def test_memory_that_ends_on_all_ranks_is_said_once(digits: str, tmp_path: Path) -> None:
    flags = [*FLAGS, digits, f"--output={tmp_path / 'run'}"]
    first, second = training(2, flags, end_memory).endings()
    assert_status(0, [first, second])
    assert first.output.count("images at a time") == 1
    assert second.output == ""


def end_memory() -> None:
    """Let more than four images exceed memory."""
    differentiate = Step.differentiate

    def replacement(
        step: Step, features: Sequence[Tensor], targets: Sequence[Targets], is_second: bool = False
    ) -> tuple[Tensor, Tensor]:
        if len(targets[0].labels) > 4:
            raise torch.OutOfMemoryError("more than there is")
        return differentiate(step, features, targets, is_second)

    Step.differentiate = replacement  # type: ignore[method-assign]


# the step


LAYERS = ["blocks.1.mlp.fc1", "head"]
STEP = [
    "--selection.warmup_epochs=0",
    "--attack.clean_epochs=0",
    "--attack.epsilon_warmup_epochs=0",
    f"--selection.layers={','.join(LAYERS)}",
    "--sam.rho=0.5",
    "--optim.name=sgd",
]


@dataclass
class Seen:
    """The batch of a rank and its first step; tensors of the selected parameters by name."""

    batch: Batch
    weights: dict[str, Tensor]
    first: dict[str, Tensor]
    perturbed: dict[str, Tensor]
    second: dict[str, Tensor]
    sizes: list[int]
    """Elements of each tensor that is summed up over ranks."""


def first_step(flags: list[str]) -> Seen:
    config = parse_config(flags)
    with connected(wants_gpu=False) as ranks, Trainer(config, ranks) as trainer:
        trainer.begin_epoch(1)
        batch = next(trainer.data.train.epoch(1))
        step, selection = trainer.step, trainer.step.selection
        known = {id(value): name for name, value in step.model.network.named_parameters()}
        names = [known[id(parameter)] for parameter in selection.parameters]
        ascend, update = step.ascend, step.update
        first: dict[str, Tensor] = {}
        perturbed: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}

        def take(tensors: list[Any], into: dict[str, Tensor]) -> None:
            into |= {n: t.detach().clone() for n, t in zip(names, tensors, strict=True)}

        def watched_ascend() -> None:
            take(selection.gradient_views, first)
            ascend()
            take(selection.parameters, perturbed)

        def watched_update(targets: Targets) -> None:
            take(selection.gradient_views, second)
            update(targets)

        step.ascend, step.update = watched_ascend, watched_update  # type: ignore[method-assign]
        weights = trainer.arenas.state_dict()
        with counted_sums() as sizes:
            trainer.take_step(1, 0, len(trainer.data.train), batch)
        return Seen(batch, weights, first, perturbed, second, sizes)


@contextmanager
def counted_sums() -> Iterator[list[int]]:
    """The number of elements of every tensor that goes through an all-reduce."""
    sizes, all_reduce = [], torch.distributed.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *arguments, **settings)

    torch.distributed.all_reduce = counting
    try:
        yield sizes
    finally:
        torch.distributed.all_reduce = all_reduce


@pytest.mark.parametrize(("num_images", "batch_size"), [(62, 20), (4, 3)])
def test_ranks_climb_and_descend_by_the_gradient_of_the_whole_batch(
    num_images: int, batch_size: int, digits: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, *STEP, digits]
    flags += [f"--data.max_images={num_images}", f"--batch-size={batch_size}"]
    steps = {
        number: together(number, first_step, [*flags, f"--output={tmp_path / str(number)}"])
        for number in (1, 2, 3)
    }
    ((alone,), *others) = steps.values()
    for ranks in others:
        assert sum(seen.batch.num_images for seen in ranks) == alone.batch.num_images
        for seen in ranks:
            for kind in ("weights", "first", "perturbed", "second"):
                torch.testing.assert_close(getattr(seen, kind), getattr(alone, kind))
            assert_sums(seen, num_passes=2)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_with_local_sync_each_rank_climbs_by_its_own_gradient(
    num_ranks: int, digits: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, *STEP, digits, "--sam.sync=local", "--attack.steps=0"]
    flags += [f"--output={tmp_path / 'run'}"]
    ranks = together(num_ranks, first_step, flags)
    config = parse_config(flags)
    model = build_model(config.model, num_classes=10, image_size=8, num_channels=1)
    model.network.load_state_dict(ranks[0].weights)
    total = sum(seen.batch.num_images for seen in ranks)
    chosen = [model.network.get_parameter(name) for name in ranks[0].second]
    gradients = [torch.zeros_like(parameter) for parameter in chosen]

    def differentiate(batch: Batch) -> tuple[Tensor, ...]:
        logits = model(as_pixels(batch.images))[: batch.num_images]
        labels = batch.labels[: batch.num_images]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return torch.autograd.grad(losses / total, chosen)

    for seen in ranks:
        own = differentiate(seen.batch)
        length = torch.cat([gradient.flatten() for gradient in own]).norm()
        before = [parameter.detach().clone() for parameter in chosen]
        with torch.no_grad():
            for parameter, gradient in zip(chosen, own, strict=True):
                parameter.add_(gradient, alpha=config.sam.rho / float(length))
        torch.testing.assert_close([*seen.perturbed.values()], [p.detach() for p in chosen])
        for gradient, part in zip(gradients, differentiate(seen.batch), strict=True):
            gradient.add_(part)
        with torch.no_grad():
            for parameter, values in zip(chosen, before, strict=True):
                parameter.copy_(values)
    for seen in ranks:
        torch.testing.assert_close([*seen.second.values()], gradients)
        assert_sums(seen, num_passes=1)


def test_without_a_second_pass_the_gradient_is_summed_once(digits: str, tmp_path: Path) -> None:
    flags = [*FLAGS, *STEP, digits, "--sam.rho=0", f"--output={tmp_path / 'run'}"]
    for seen in together(2, first_step, flags):
        assert_sums(seen, num_passes=1)


def assert_sums(seen: Seen, num_passes: int) -> None:
    """Check that ranks summed the number of images and, for each pass, the selected gradients."""
    number, *gradients = seen.sizes
    assert number == 1
    assert len(gradients) == num_passes
    num_selected = sum(gradient.numel() for gradient in seen.second.values())
    assert all(num_selected < size < num_selected + 400 for size in gradients)


# scores of layers


CRITERIA: tuple[str, ...] = (
    "sharpness",
    "least-sharp",
    "gradient-norm",
    "criticality",
    "random",
)


def scores(sizes: list[int]) -> dict[str, dict[str, float]]:
    """Scores by each criterion, on batches of these sizes, of which this rank has a part."""
    with connected(wants_gpu=False) as ranks:
        batches = []
        for images, labels in zip(
            *(v.split(sizes) for v in images_and_labels(sum(sizes))), strict=True
        ):
            first, end = (
                len(labels) * rank // ranks.num_ranks for rank in (ranks.rank, ranks.rank + 1)
            )
            batches.append((images[first:end], labels[first:end]))
        model = build()
        return {
            criterion: rank_layers(
                model,
                batches,
                criterion=criterion,
                attack=brighter,
                generator=torch.Generator().manual_seed(3),
                ranks=ranks,
            )
            for criterion in CRITERIA
        }


def brighter(_: nn.Module, images: Tensor, __: Tensor) -> Tensor:
    return (images + 0.05).clamp(max=1)


# of the second batch of one image, and of a probe of two, some rank has nothing
@pytest.mark.parametrize("sizes", [[7], [6, 1], [2]], ids=str)
def test_scores_are_those_of_one_rank_and_the_same_on_all(sizes: list[int]) -> None:
    (alone,) = together(1, scores, sizes)
    assert list(alone) == list(CRITERIA)
    for num_ranks in (2, 3):
        first, *others = together(num_ranks, scores, sizes)
        assert all(other == first for other in others)
        for criterion in CRITERIA:
            assert first[criterion] == pytest.approx(alone[criterion], rel=1e-4, abs=1e-7)
        assert first["random"] == alone["random"]


# what goes wrong on one rank


def break_images(rank: int, calls: tuple[int, ...]) -> None:
    """In these steps the second half of the batch is not finite, which of two ranks one has."""
    call, count = Step.__call__, 0

    def replacement(step: Step, images: Tensor, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count in calls and rank == own_rank():
            images = images.clone()
            images[0 if rank else len(images) // 2 :] *= float("nan")
        call(step, images, *arguments)

    Step.__call__ = replacement  # type: ignore[method-assign]


def own_rank() -> int:
    return int(os.environ["RANK"])


def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_by_all(
    digits: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, digits, "--optim.name=sgd"]
    calls = (3, 4, 10)
    teams = {
        number: training(
            number,
            [*flags, f"--output={tmp_path / str(number)}"],
            partial(break_images, number - 1, calls),
        )
        for number in (1, 2)
    }
    for team in teams.values():
        assert_status(0, team.endings())
    alone, two = (events_of(tmp_path / str(number)) for number in teams)
    assert_near(two[1:], alone[1:])
    skipped = [event["skipped_steps"] for event in two if event["event"] == "epoch"]
    assert skipped == [2, 0, 1, 0]
    assert difference(tmp_path / "2", tmp_path / "1") < RUNS["sgd, l2"][1]


def test_batch_norms_forget_a_batch_that_is_skipped(digits: str, tmp_path: Path) -> None:
    flags = [*FLAGS, *WITH_BATCH_NORMS, digits, f"--output={tmp_path / 'run'}"]
    assert_status(0, training(2, flags, partial(break_images, 1, (3, 10))).endings())
    events = events_of(tmp_path / "run")
    skipped = [event["skipped_steps"] for event in events if event["event"] == "epoch"]
    assert skipped == [1, 0, 1, 0]


def test_too_many_skipped_steps_stop_all_ranks_with_one_line(digits: str, tmp_path: Path) -> None:
    flags = [*FLAGS, digits, "--runtime.max_skipped_steps=2", f"--output={tmp_path / 'run'}"]
    endings = training(2, flags, partial(break_images, 1, (3, 4))).endings()
    assert_one_error("runtime.max_skipped_steps: ", endings)


def assert_one_error(expected: str, endings: list[Ending]) -> None:
    """Check that all ranks ended with status 2, and one of them said why."""
    assert_status(2, endings)
    lines = [line for ending in endings for line in ending.output.splitlines()]
    errors = [line for line in lines if "rror" in line]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert expected in errors[0]


def test_ranks_whose_weights_differ_stop_with_one_line(digits: str, tmp_path: Path) -> None:
    flags = [*FLAGS, digits, f"--output={tmp_path / 'run'}"]
    endings = training(3, flags, partial(move_a_weight, 2)).endings()
    assert_one_error("the weights of ranks 0 and 2 differ at epoch 2", endings)


def move_a_weight(rank: int) -> None:
    """Move a weight of this rank by one bit in the fifth step."""
    take_step, count = Trainer.take_step, 0

    def replacement(trainer: Trainer, *arguments: Any) -> float:
        nonlocal count
        count += 1
        if count == 5 and rank == own_rank():
            trainer.arenas.master.view(torch.int32)[7] ^= 1
        return take_step(trainer, *arguments)

    Trainer.take_step = replacement  # type: ignore[method-assign]


@pytest.mark.parametrize("changed", ["labels", "rows", "classes"])
def test_ranks_with_other_data_end_before_the_first_step_with_one_line(
    changed: str, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    for rank in range(3):
        labels = np.arange(80) % 4
        if rank == 1:
            labels = {"labels": labels[::-1], "rows": labels[:76], "classes": labels % 3}[changed]
        (tmp_path / str(rank)).mkdir()
        np.savez(tmp_path / str(rank) / "set.npz", images=images[: len(labels)], labels=labels)
    flags = [*FLAGS, "--data.path=set.npz", f"--output={tmp_path / 'run'}"]
    endings = training(3, flags, partial(in_own_folder, tmp_path)).endings()
    assert_one_error("--data.path: expected the same images, labels and classes on all", endings)
    assert sum("got other ones on rank 1 than on rank 0" in e.output for e in endings) == 1
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_settings_end_before_the_first_step_with_one_line(
    digits: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, digits, f"--output={tmp_path / 'run'}"]
    endings = training(2, flags, other_seed).endings()
    assert_one_error("--config: expected the same settings on all ranks, got other ones", endings)
    assert not (tmp_path / "run").exists()


def other_seed() -> None:
    """Give rank 1 another seed, as a machine with another command has."""
    if own_rank() == 1:
        parse = train.parse_config
        train.parse_config = lambda words: parse([*words, "--seed=7"])


def in_own_folder(root: Path) -> None:
    os.chdir(root / str(own_rank()))


def write_photos(folder: Path, bad: set[int]) -> None:
    """Training and validation images whose labels are their rows, of which some cannot be read."""
    files = [b"no image" if n in bad else encode(photo(8, 8, n), "png") for n in range(40)]
    table = pa.table({"image": pa.array(files, pa.binary()), "label": range(40)})
    for split in ("train", "validation"):
        pq.write_table(table, folder / f"{split}.parquet")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_image_that_one_rank_cannot_read_ends_all_with_one_line(
    rank: int, tmp_path: Path
) -> None:
    write_photos(tmp_path, set())
    config = DataConfig(path=str(tmp_path), backend="torch", num_workers=0, image_size=8)
    _, second = load_data(config, batch_size=20, seed=0, rank=rank, num_ranks=2).train.epoch(1)
    row = int(second.labels[3])
    write_photos(tmp_path, {row})
    flags = [*FLAGS, f"--data.path={tmp_path}", "--data.backend=torch", "--data.num_workers=0"]
    endings = training(2, [*flags, "--data.image_size=8", f"--output={tmp_path / 'run'}"]).endings()
    assert_one_error(f"expected an image, got an unreadable one: row {row} of", endings)


def test_an_image_that_all_ranks_leave_out_is_named_once(tmp_path: Path) -> None:
    write_photos(tmp_path, {17})
    flags = [*FLAGS, f"--data.path={tmp_path}", "--data.image_size=8", "--data.bad_images=skip"]
    endings = training(2, [*flags, f"--output={tmp_path / 'run'}"]).endings()
    assert_status(0, endings)
    lines = [line for ending in endings for line in ending.output.splitlines()]
    assert len([line for line in lines if "row 17 of" in line and "train.parquet" in line]) == 1
    epochs = [event for event in events_of(tmp_path / "run") if event["event"] == "epoch"]
    assert [event["skipped_images"] for event in epochs] == [0, 0, 0, 0]


# stopping and resuming


def signal_before(method: str, call: int, ranks: tuple[int, ...], times: int = 1) -> None:
    """Before the `call`-th call of a method of the trainer these ranks get SIGTERM; each rank says
    where it stops."""
    original, stop, count = getattr(Trainer, method), Trainer.stop, 0

    def replacement(trainer: Trainer, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        for _ in range(times if count == call and own_rank() in ranks else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *arguments)

    def saying(trainer: Trainer, reason: str) -> None:
        print("stops after", trainer.progress.num_steps)
        stop(trainer, reason)

    setattr(Trainer, method, replacement)
    Trainer.stop = saying  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("num_ranks", "method", "call", "signalled"),
    [
        (2, "take_step", 10, (0,)),
        (3, "take_step", 10, (0, 1, 2)),
        (2, "choose", 2, (1,)),
        (2, "_log_final_accuracies", 2, (1,)),
    ],
)
def test_a_signal_to_any_rank_stops_all_after_the_same_step(
    num_ranks: int,
    method: str,
    call: int,
    signalled: tuple[int, ...],
    digits: str,
    tmp_path: Path,
    runs: Runs,
) -> None:
    folder = tmp_path / "run"
    flags = [*FLAGS, *RUNS["adamw"][0], digits, f"--output={folder}"]
    endings = training(num_ranks, flags, partial(signal_before, method, call, signalled)).endings()
    assert_status(143, endings)
    lines = [line for ending in endings for line in ending.output.splitlines()]
    assert len({line for line in lines if line.startswith("stops after")}) == 1
    assert len([line for line in lines if line.startswith("SIGTERM: stopped after")]) == 1
    assert all(ending.output.count("\n") == 1 for ending in endings[1:])
    assert_status(0, training(num_ranks, [*flags, "--resume=must"]).endings())
    assert_same_run(folder, runs("adamw", num_ranks)[num_ranks])


def test_a_signal_that_comes_again_from_torchrun_is_the_same_one(
    digits: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, digits, f"--output={tmp_path / 'run'}"]
    endings = training(2, flags, partial(signal_before, "take_step", 5, (0, 1), 2)).endings()
    assert_status(143, endings)
    assert "SIGTERM: stopped after step" in endings[0].output
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    before: int, after: int, digits: str, tmp_path: Path, runs: Runs
) -> None:
    folder = tmp_path / "run"
    flags = [*FLAGS, *RUNS["adamw"][0], digits, f"--output={folder}"]
    endings = training(before, flags, partial(signal_before, "take_step", 10, (0,))).endings()
    assert_status(143, endings)
    endings = training(after, [*flags, "--resume=must"]).endings()
    assert_status(0, endings)
    assert f"resumed with other rounding: ranks {before}, now {after}" in endings[0].output
    alone = runs("adamw", 1)[1]
    assert difference(folder, alone) < RUNS["adamw"][1]
    assert_near(events_of(folder)[1:], events_of(alone)[1:])


def test_batch_norms_go_on_with_the_same_statistics(digits: str, tmp_path: Path) -> None:
    flags = [*FLAGS, *WITH_BATCH_NORMS, digits]
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    team = training(2, [*flags, f"--output={undisturbed}"])
    flags += [f"--output={folder}"]
    endings = training(2, flags, partial(signal_before, "take_step", 10, (1,))).endings()
    assert_status(143, endings)
    assert_status(0, training(2, [*flags, "--resume=must"]).endings())
    assert_status(0, team.endings())
    assert_same_run(folder, undisturbed)


def test_a_run_that_has_finished_is_left_as_it_is_and_said_to_be_once(
    digits: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, digits, f"--output={tmp_path / 'run'}", "--epochs=3", "--resume=auto"]
    assert_status(0, training(2, flags).endings())
    before = events_of(tmp_path / "run")
    first, second = training(2, flags).endings()
    assert_status(0, [first, second])
    assert first.output.startswith("finished already")
    assert second.output == ""
    assert events_of(tmp_path / "run") == before


# what a user gets wrong


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--batch-size=2"], "--batch-size: expected at least one image for each of 3 ranks"),
        (["--evaluation.batch_size=2"], "--evaluation.batch_size: expected at least one image for"),
        (["--data.max_images=2"], "data.path: expected at least one training image for each of 3"),
        (["--data.path=nothing"], "nothing"),
        (["--model.checkpoint=nothing"], "nothing"),
        (["--resume=must"], "--resume: expected a run with checkpoints for must"),
        ([], "--output: expected a new or empty folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_all_ranks_with_one_line(
    flags: list[str], expected: str, digits: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path if not flags else tmp_path / "run"
    endings = training(3, [*FLAGS, digits, f"--output={output}", *flags]).endings()
    assert_one_error(expected, endings)


def late(rank: int) -> None:
    """Delay this rank, the last to begin."""
    if rank == own_rank():
        time.sleep(1)


def one_gpu() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--unknown=3"], "error: unknown flag --unknown"),
        ([], "error: --nproc-per-node: expected at most 1 processes"),
    ],
    ids=["flag", "gpus"],
)
def test_a_mistake_is_told_before_torchrun_ends_the_rank_that_tells(
    flags: list[str], expected: str
) -> None:
    team = training(2, flags, one_gpu, partial(late, 0))
    (ended, *_) = wait([process.sentinel for process in team.processes], 60)
    assert ended == team.processes[0].sentinel
    first, second = team.endings(0)
    assert first.status == 2
    assert first.output.startswith(expected)
    assert first.output.count("\n") == 1
    assert second.output == ""


def test_ranks_that_are_started_anew_do_not_look_for_those_that_have_ended(
    digits: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, digits, f"--output={tmp_path / 'run'}", "--resume=auto"]
    team = training(2, flags, partial(signal_before, "take_step", 5, (0,)))
    assert_status(143, team.endings())
    assert_status(0, training(2, flags, partial(late, 0), store=team.store).endings(30))


# torchrun itself


LONG = ["--epochs=12", "--selection.every_epochs=4", "--evaluation.every_epochs=12"]


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint."""
    names = [path.stem for path in (folder / "checkpoints").glob("step-*.safetensors")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def further(torchrun: Torchrun, folder: Path, num_steps: int = 5) -> None:
    """Wait for some more steps."""
    last, deadline = newest_step(folder), time.monotonic() + 60
    while newest_step(folder) < last + num_steps:
        assert time.monotonic() < deadline, torchrun.output()
        assert torchrun.process.poll() is None, torchrun.output()
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for the ranks")
def test_torchrun_goes_on_after_a_kill_and_after_a_signal_with_the_same_bits(
    digits: str, tmp_path: Path
) -> None:
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    flags = [*FLAGS, *LONG, digits]
    team = training(2, [*flags, f"--output={undisturbed}"])
    options = ["--nproc-per-node=2", "--max-restarts=1"]
    flags += [f"--output={folder}", "--resume=auto", "--checkpoint.every_steps=1"]
    with Torchrun(tmp_path / "first.txt", options, flags) as torchrun:
        further(torchrun, folder)
        os.kill(torchrun.ranks()[1], signal.SIGKILL)
        further(torchrun, folder)
        torchrun.process.terminate()
        ending = torchrun.ending()
    assert ending.output.count("SIGTERM: stopped after step") == 1, ending.output
    assert ending.status == 1
    with Torchrun(tmp_path / "second.txt", options, flags) as torchrun:
        ending = torchrun.ending()
    assert ending.status == 0, ending.output
    assert_status(0, team.endings())
    assert_same_run(folder, undisturbed)


def test_a_mistake_is_told_once_under_torchrun(tmp_path: Path) -> None:
    with Torchrun(tmp_path / "output.txt", ["--nproc-per-node=2"], ["--unknown=3"]) as torchrun:
        ending = torchrun.ending()
    assert ending.status == 1
    assert ending.output.count("error: unknown flag --unknown") == 1
