"""How accurate a model is, clean and under attack; `python -m safer_fast.evaluate RUN`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safer_fast.command_configs import EvaluateConfig
from safer_fast.command_line import new_parser, parse, run, with_underscores
from safer_fast.validation import check_attack_name

if TYPE_CHECKING:  # torch is imported when there is something to compute: --help does not wait
    import torch

    from safer_fast.data import Batch, Loader
    from safer_fast.distributed import Ranks
    from safer_fast.micro_batch import MicroBatch
    from safer_fast.network import RobustModel
    from safer_fast.run_folder import LoadedRun


@dataclass(frozen=True)
class ThreatModel:
    """The ball that attacks stay in."""

    norm: Any
    epsilon: float


@dataclass(frozen=True)
class Accuracy:
    """Share of `num_images` images that are classified rightly under an attack."""

    attack: str
    epsilon: float
    accuracy: float
    num_images: int


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

    clean: no attack. fgsm: one step of epsilon from the image itself (Goodfellow et al., 2015).
    pgd-K: K steps of 2.5 epsilon / K from a random start (Madry et al., 2018), one restart. Every
    attack runs in the model's own precision, with gradients of the cross-entropy, on as many images
    at a time as `micro_batch` says; default: a batch, or less where memory ends. Random starts
    depend on the seed, the attack and an image's position, not on how images are divided.
    """
    import torch

    from safer_fast.data import as_pixels
    from safer_fast.data.seeds import derive_seed
    from safer_fast.distributed import Ranks
    from safer_fast.micro_batch import MicroBatch

    micro_batch, ranks = micro_batch or MicroBatch("--batch-size"), ranks or Ranks()
    device = model.mean.device
    counts = torch.zeros(len(attacks) + 1, dtype=torch.int64, device=device)
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        # padding goes along, so that all batches have one shape
        images, labels = as_pixels(batch.images), batch.labels
        for index, name in enumerate(attacks):
            place = partial(derive_seed, seed, f"evaluation {name}"), batch.position
            attacked = attack_by_name(name, model, images, labels, threat, place, micro_batch)
            with torch.no_grad():
                is_right = model(attacked).argmax(1) == labels
                counts[index] += is_right[: batch.num_images].sum()
        counts[-1] += batch.num_images
    *num_right, num_images = ranks.sum_(counts).tolist()
    if not num_images:
        raise ValueError("data.path: expected an image that can be read to evaluate on, got none")
    return [
        Accuracy(name, 0.0 if name == "clean" else threat.epsilon, count / num_images, num_images)
        for name, count in zip(attacks, num_right, strict=True)
    ]


def attack_by_name(
    name: str,
    model: RobustModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    threat: ThreatModel,
    place: tuple[Callable[[int], int], int],
    micro_batch: MicroBatch,
) -> torch.Tensor:
    """Images [B, C, H, W] after the attack `name`: clean, fgsm or pgd-K.

    place: seeds and position of the images, see `placed_start`.
    """
    import torch

    from safer_fast.attack import default_step_size, pgd, placed_start

    if name == "clean":
        return images
    radius, norm = threat.epsilon, threat.norm
    if name == "fgsm":
        start, steps, step_size = images, 1, radius
    else:
        steps = int(name.removeprefix("pgd-"))
        step_size = default_step_size(radius, steps)
        seed_of, position = place
        largest = torch.full((), radius).to(images)
        start = placed_start(images, largest, norm, position=position, seed_of=seed_of)
    attacked = torch.empty_like(images)

    def attack_in_parts(size: int) -> None:
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            attacked[part] = pgd(
                model,
                images[part],
                labels[part],
                epsilon=radius,
                step_size=step_size,
                steps=steps,
                norm=norm,
                start=start[part],
            )

    micro_batch.run(len(images), attack_in_parts)
    return attacked


def main(arguments: Sequence[str]) -> None:
    """`python -m safer_fast.evaluate RUN [flags]`: prints a table, appends to metrics.jsonl."""
    parser = new_parser("evaluate", "Measure clean and robust accuracy of a run.")
    parser.add_class_arguments(EvaluateConfig, None, skip={"run"})
    parser.add_argument("run", type=str, metavar="RUN", help="run folder")
    words = [word.replace("--data.path", "--path", 1) for word in with_underscores(arguments)]
    config = parse(parser, words, EvaluateConfig)
    for name in config.attacks:
        check_attack_name(name, "--attacks")
    for flag, value in (("--batch-size", config.batch_size), ("--num-images", config.num_images)):
        if value is not None and value < 1:
            raise ValueError(f"{flag}: expected at least 1, got {value}")
    evaluate_run(config)


def evaluate_run(config: EvaluateConfig) -> list[Accuracy]:
    """Evaluates a run folder; the figures are appended to its metrics.jsonl and printed.

    Under torchrun the processes share the images. Raises ValueError for a folder that is no run and
    for data that does not fit its model.
    """
    from safer_fast.distributed import connected
    from safer_fast.run_folder import load_run
    from safer_fast.run_log import RunLog

    folder = Path(config.run)
    with connected(config.device != "cpu") as ranks:
        loaded = load_run(folder, config.weights, config.device, ranks.local_rank)
        own = loaded.config.attack.epsilon
        radius = float(own if config.epsilon is None else config.epsilon)
        threat = ThreatModel(loaded.config.attack.norm, radius)
        split, loader = _evaluation_data(config, loaded, ranks)
        log = RunLog(folder, ranks)
        batches = loader.epoch(1, limit=config.num_images)
        bar = log.bar(batches, len(loader) if config.num_images is None else None, "evaluating")
        results = evaluate(
            loaded.model, iter(bar), config.attacks, threat, seed=config.seed, ranks=ranks
        )
        rows = [{"split": split, "weights": config.weights, **vars(result)} for result in results]
        for row in rows:
            log.write("evaluation", epoch=loaded.config.epochs, step=0, **row)
        log.close()
        log.say(accuracy_table(rows))
    return results


def _evaluation_data(config: EvaluateConfig, loaded: LoadedRun, ranks: Ranks) -> tuple[str, Loader]:
    """The name of the split and its loader: the data given, else the run's own."""
    from safer_fast.data import load_data, load_evaluation_data

    settings = loaded.config
    if config.path is not None:
        data = load_evaluation_data(
            config.path,
            settings.data,
            batch_size=config.batch_size,
            num_classes=len(loaded.class_names),
            num_channels=loaded.num_channels,
            image_size=loaded.image_size,
            class_names=loaded.class_names,
            device=loaded.model.mean.device,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
        )
        return Path(config.path).stem, data
    own = load_data(
        settings.data,
        batch_size=settings.batch_size,
        seed=settings.seed,
        evaluation_batch_size=config.batch_size,
        device=loaded.model.mean.device,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
    )
    return ("validation", own.validation) if own.test is None else ("test", own.test)


def accuracy_table(accuracies: Sequence[Mapping[str, Any]]) -> str:
    """Lines of text, one for each weights, split and attack."""
    lines = [
        f"{'weights':<8} {'split':<11} {'attack':<8} {'epsilon':>7} {'accuracy':>8} {'images':>7}"
    ]
    lines += [
        f"{row['weights']:<8} {row['split']:<11} {row['attack']:<8} {row['epsilon']:>7.4f} "
        f"{row['accuracy']:>8.4f} {row['num_images']:>7}"
        for row in accuracies
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
