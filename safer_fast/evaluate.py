"""How accurate a model is, clean and under attack; `python -m safer_fast.evaluate RUN`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from safer_fast import ranges
from safer_fast.command_configs import EvaluateConfig
from safer_fast.command_line import new_parser, parse, run, with_underscores
from safer_fast.conversion import converted
from safer_fast.masking import has_gradients, starts_at_random, suspicions
from safer_fast.messages import cut
from safer_fast.validation import LIBRARY_ATTACKS, check_attack_name, check_ranges

if TYPE_CHECKING:  # torch is imported when there is something to compute: --help does not wait
    import torch

    from safer_fast.data import Batch
    from safer_fast.distributed import Ranks
    from safer_fast.gradient_watch import Watch
    from safer_fast.micro_batch import MicroBatch
    from safer_fast.network import RobustModel


@dataclass(frozen=True)
class ThreatModel:
    """The ball that attacks stay in."""

    norm: Any
    epsilon: float


@dataclass(frozen=True)
class Accuracy:
    """Share of `num_images` images that are classified rightly under an attack.

    loss: mean cross-entropy of the attacked images, None where it is not finite. num_not_finite:
    images whose logits are not finite then; they are not right. num_zero_gradients: images whose
    gradient was zero or not finite at an iteration, None without gradients. start_accuracy: what
    its random start alone leaves, None without. gradient_masking: signs that the attack failed for
    want of gradients (masking.py); with any the accuracy is an `upper_bound` of the robust one.
    """

    attack: str
    epsilon: float
    accuracy: float
    num_images: int
    loss: float | None = None
    num_not_finite: int = 0
    num_zero_gradients: int | None = None
    start_accuracy: float | None = None
    gradient_masking: Sequence[str] = ()
    upper_bound: bool = False


def evaluate(
    model: RobustModel,
    batches: Iterator[Batch],
    attacks: Sequence[str],
    threat: ThreatModel,
    *,
    seed: int = 0,
    micro_batch: MicroBatch | None = None,
    ranks: Ranks | None = None,
) -> list[Accuracy]:
    """The accuracy under each attack over the batches, over those of all ranks.

    What training looks at: an image is right if the prediction on the attacked image is. (The
    command counts it only if it is right without an attack too, as RobustBench does.) clean: no
    attack; fgsm, pgd-K, cw, cw-K: see `climb_of`, one restart. Every attack runs in the model's own
    precision on as many images at a time as `micro_batch` says; default: a batch, or less where
    memory ends. Random starts depend on the seed, the attack and an image's position, not on how
    images are divided.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from safer_fast.answers import has_finite, is_right
    from safer_fast.data import as_pixels
    from safer_fast.data.seeds import derive_seed
    from safer_fast.distributed import Ranks
    from safer_fast.gradient_watch import Watch
    from safer_fast.micro_batch import MicroBatch

    micro_batch, ranks = micro_batch or MicroBatch("--batch-size"), ranks or Ranks()
    device = model.mean.device
    # of each attack: images that are right, losses, images with logits that are not finite, without
    # a gradient, right at the start; float64 counts exactly
    sums = torch.zeros(5, len(attacks) + 1, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        # padding goes along, so that all batches have one shape
        images, labels, counted = as_pixels(batch.images), batch.labels, slice(batch.num_images)
        for index, name in enumerate(attacks):
            place = partial(derive_seed, seed, f"evaluation {name}"), batch.position
            watch = Watch(len(images), device)
            attacked = attack_by_name(
                name, model, images, labels, threat, place, micro_batch, watch
            )
            with torch.no_grad():
                logits = model(attacked)
                losses = cross_entropy(logits, labels, reduction="none")
                sums[0, index] += is_right(logits, labels)[counted].sum()
                sums[1, index] += losses[counted].double().sum()
                flags = ~has_finite(logits), watch.blind, watch.starts_right
                sums[2:, index] += torch.stack(flags)[:, counted].sum(1)
        sums[:, -1] += batch.num_images
    *columns, (num_images, *_) = ranks.sum_(sums).T.tolist()
    if not num_images:
        raise ValueError("data.path: expected an image that can be read to evaluate on, got none")
    figures = zip(attacks, columns, strict=True)
    return _judged([_accuracy(name, threat, found, num_images) for name, found in figures])


def _accuracy(name: str, threat: ThreatModel, sums: Sequence[float], num_images: float) -> Accuracy:
    num_right, loss, num_broken, num_blind, num_starts = sums
    return Accuracy(
        name,
        0.0 if name == "clean" else threat.epsilon,
        num_right / num_images,
        int(num_images),
        loss / num_images if math.isfinite(loss) else None,
        int(num_broken),
        int(num_blind) if has_gradients(name) else None,
        num_starts / num_images if starts_at_random(name) else None,
    )


def _judged(accuracies: Sequence[Accuracy]) -> list[Accuracy]:
    """With the signs of gradient masking in them."""
    found = suspicions([vars(accuracy) for accuracy in accuracies])
    return [
        replace(accuracy, gradient_masking=tuple(reasons), upper_bound=bool(reasons))
        for accuracy, reasons in zip(accuracies, found, strict=True)
    ]


def attack_by_name(
    name: str,
    model: RobustModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    threat: ThreatModel,
    place: tuple[Callable[[int], int], int],
    micro_batch: MicroBatch,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Images [B, C, H, W] after the attack `name`: clean, or one that `climb_of` knows.

    place: seeds and position of the images, see `placed_start`. watch: has what was noticed of the
    images afterwards.
    """
    import torch

    from safer_fast.attack import finite_pixels, pgd, placed_start
    from safer_fast.attack_suite import climb_of
    from safer_fast.gradient_watch import Watch

    if name == "clean":
        return images
    radius, norm = threat.epsilon, threat.norm
    climb, start = climb_of(name, radius), images
    if climb.is_random:
        seed_of, position = place
        largest = torch.full((), radius).to(images)
        start = placed_start(images, largest, norm, position=position, seed_of=seed_of)
    attacked = torch.empty_like(images)

    def attack_in_parts(size: int) -> None:
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            own = Watch(len(images[part]), images.device)
            attacked[part] = pgd(
                model,
                images[part],
                labels[part],
                epsilon=radius,
                step_size=climb.step_size,
                steps=climb.steps,
                norm=norm,
                start=start[part],
                objective=climb.loss,
                check_tensors=False,
                watch=own,
            )
            if watch is not None:
                watch.put(part, own)

    micro_batch.run(len(images), attack_in_parts)
    return finite_pixels(attacked, images)


def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.evaluate RUN [flags]`: prints tables, appends to metrics.jsonl."""
    parser = new_parser("evaluate", "Measure clean and robust accuracy of a run.")
    parser.add_class_arguments(EvaluateConfig, None, skip={"run"})
    parser.add_argument("run", type=str, metavar="RUN", help="run folder")
    words = with_underscores(arguments)
    for name in ("path", "image_column", "label_column"):
        words = [word.replace(f"--data.{name}", f"--{name}", 1) for word in words]
    words = [f"{word}=true" if word == "--fresh" else word for word in words]
    evaluate_run(parse(parser, words, EvaluateConfig))


def evaluate_run(config: EvaluateConfig) -> list[Accuracy]:
    """Evaluates a run folder; the figures are appended to its metrics.jsonl and printed.

    An image is right under an attack if it is right without one and after it. What was measured
    before is not measured again. Under torchrun the processes share the images. SIGINT and SIGTERM
    end it with SystemExit. Raises ValueError for a folder that is no run and for data and settings
    that do not fit its model.
    """
    config = converted(config)
    _check(config)
    from safer_fast.evaluation_run import measure_run

    rows = measure_run(config)
    names = [field.name for field in fields(Accuracy)]
    return [Accuracy(**{name: row[name] for name in names}) for row in rows]


def _check(config: EvaluateConfig) -> None:
    """Raises ValueError for settings that fit no run."""
    if not config.attacks:
        raise ValueError("--attacks: expected at least one attack, got none")
    for name in config.attacks:
        check_attack_name(name, "--attacks", LIBRARY_ATTACKS)
    check_ranges(config, ranges.EVALUATE)
    if config.source is None and config.source_weights != "last":
        raise ValueError(
            f"--source-weights: expected --source beside it, got only {cut(config.source_weights)}"
        )
    for name in ("image_column", "label_column"):
        if (column := getattr(config, name)) is not None and config.path is None:
            raise ValueError(f"--data.{name}: expected --data.path beside it, got only {column}")


if __name__ == "__main__":
    run(main, goes_on=True)
