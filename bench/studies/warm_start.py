"""Whether an attack that starts from the last epoch's perturbation needs fewer iterations (ATTA).

    python -m bench.studies.warm_start --start RUN --weights best|last --train FILE [--epochs 4]
        [--epsilon 8/255] [--augmentation none|crop] [--num-images 512] [--output FILE.jsonl]
        [flags of safer_fast.train]

The SAFER stage (or what the flags say) is trained from the weights of RUN. Before each epoch, a
subset of the training images is attacked by PGD-1, 2 and 3, from random starts and from where the
same attack left the image an epoch before (Zheng et al., 2020), kept as int8; with crops and flips
the perturbation is moved along with its image. Strength is the loss over that after PGD-20.
"""

from __future__ import annotations

import argparse
import statistics
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.measure import append, command, origin
from bench.time_to_accuracy import start_flags
from safer_fast.attacks.adaptive import STRONG_STEPS
from safer_fast.attacks.pgd import default_step_size, pgd, random_start
from safer_fast.config.command_line import parse_config
from safer_fast.data import as_pixels, prefetch_to_device
from safer_fast.models.robust_model import RobustModel
from safer_fast.training.trainer import Trainer

PAD = 4
"""Pixels that an image may be shifted by, as `data.augmentation crop` does."""
INT8 = 127


class Way(NamedTuple):
    """An attack: its iterations, the length of one as a share of epsilon, and where it starts."""

    steps: int
    step_size: float
    is_warm: bool

    @property
    def name(self) -> str:
        """A name for its figures."""
        start = "warm" if self.is_warm else "cold"
        return f"{start} PGD-{self.steps}, step {self.step_size:.3g} epsilon"


WAYS = [
    Way(steps, default_step_size(1.0, steps), is_warm) for is_warm in (0, 1) for steps in (1, 2, 3)
]
WAYS.append(Way(1, 0.5, True))


class Crops:
    """Shifts and flips of images in one epoch, and how perturbations are moved along with them."""

    def __init__(self, num_images: int, is_on: bool, generator: torch.Generator) -> None:
        most = 2 * PAD + 1 if is_on else 1
        shape = (num_images, 2)
        self.shifts = torch.randint(most, shape, generator=generator) - (PAD if is_on else 0)
        self.flips = torch.randint(2 if is_on else 1, (num_images,), generator=generator).bool()

    def apply(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], shifted (zeros come in) and flipped."""
        moved = _shifted(images, self.shifts)
        return torch.where(self.flips[:, None, None, None], moved.flip(3), moved)

    def undo(self, images: Tensor) -> Tensor:
        """Move back what `apply` has moved; what left the image is zero."""
        flipped = torch.where(self.flips[:, None, None, None], images.flip(3), images)
        return _shifted(flipped, -self.shifts)


def _shifted(images: Tensor, shifts: Tensor) -> Tensor:
    height, width = images.shape[2:]
    padded = functional.pad(images, (PAD, PAD, PAD, PAD))
    parts = [
        padded[k, :, PAD + down : PAD + down + height, PAD + right : PAD + right + width]
        for k, (down, right) in enumerate(shifts.tolist())
    ]
    return torch.stack(parts)


@command
def main() -> None:
    """Print the mean strength of each way after the first epoch and, if asked, append a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", required=True, help="run folder")
    parser.add_argument("--weights", choices=("best", "last"), default="best")
    parser.add_argument("--train", required=True, help="training images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--epsilon", default="8/255")
    parser.add_argument("--augmentation", choices=("none", "crop"), default="none")
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--output", type=Path)
    arguments, flags = parser.parse_known_args()
    row = measure(arguments, flags)
    print(row["case"])
    for name, values in row["strengths"].items():
        print(
            f"  {name:<36} {statistics.mean(values):.4f}  ({' '.join(f'{v:.4f}' for v in values)})"
        )
    append([row], arguments.output)


def measure(arguments: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Train, and attack the subset before every epoch but the first; return a row."""
    epsilon = float(Fraction(arguments.epsilon))
    with TemporaryDirectory() as folder:
        own = [
            *start_flags(arguments.start, arguments.weights),
            f"--data.path={arguments.train}",
            f"--data.augmentation={arguments.augmentation}",
            f"--attack.epsilon={arguments.epsilon}",
            f"--epochs={arguments.epochs}",
            *flags,
            f"--output={Path(folder) / 'run'}",
        ]
        with Trainer(parse_config(own)) as trainer:
            probe = list(trainer.data.train.probe(arguments.num_images, 0))
            images = torch.cat([as_pixels(part.images)[: part.num_images] for part in probe])
            labels = torch.cat([part.labels[: part.num_images] for part in probe])
            kept = {way: torch.zeros_like(images, dtype=torch.int8) for way in WAYS}
            strengths: dict[str, list[float]] = {way.name: [] for way in WAYS}
            trainer.begin_epoch(1)
            generator, num_steps = torch.Generator().manual_seed(0), 0
            for epoch in range(1, arguments.epochs + 1):
                crops = Crops(len(images), arguments.augmentation == "crop", generator)
                found = _attack_all(trainer.model, images, labels, crops, epsilon, kept, generator)
                for way, strength in found.items():
                    if epoch > 1:
                        strengths[way.name].append(round(strength, 5))
                num_batches = len(trainer.data.train)
                batches = prefetch_to_device(trainer.data.train.epoch(epoch), images.device)
                for index, batch in enumerate(batches):
                    place = trainer.stage, epoch, index, num_batches
                    trainer.learner.take_step(*place, batch, num_steps)
                    num_steps += 1
            return {
                "what": "warm_start",
                "case": f"{arguments.weights} weights of the start, epsilon {arguments.epsilon}, "
                f"augmentation {arguments.augmentation}, {len(images)} images, "
                f"epochs 2 to {arguments.epochs}",
                "layers": trainer.step.selection.names,
                "strengths": strengths,
                **origin(images.device),
            }


def _attack_all(
    model: RobustModel,
    images: Tensor,
    labels: Tensor,
    crops: Crops,
    epsilon: float,
    kept: dict[Way, Tensor],
    generator: torch.Generator,
) -> dict[Way, float]:
    """Strength of each way on the moved images; keep where each leaves them."""
    moved, radius = crops.apply(images), torch.tensor(epsilon)
    cold = random_start(moved, radius, "linf", generator)
    strong = _loss(model, moved, labels, cold, epsilon, STRONG_STEPS, 2.5 / STRONG_STEPS)[0]
    found = {}
    for way in WAYS:
        start = cold
        if way.is_warm:
            perturbation = kept[way].float() * (epsilon / INT8)
            start = (moved + crops.apply(perturbation)).clamp(0, 1)
        loss, attacked = _loss(model, moved, labels, start, epsilon, way.steps, way.step_size)
        found[way] = loss / strong
        perturbation = crops.undo(attacked - moved) * (INT8 / epsilon)
        kept[way] = perturbation.round().clamp(-INT8, INT8).to(torch.int8)
    return found


def _loss(
    model: RobustModel,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
) -> tuple[float, Tensor]:
    """Loss after the attack, and the attacked images."""
    attacked = pgd(
        model,
        images,
        labels,
        epsilon=epsilon,
        step_size=step_size * epsilon,
        steps=steps,
        start=start,
        check_tensors=False,
    )
    with torch.no_grad():
        return float(functional.cross_entropy(model(attacked), labels)), attacked


if __name__ == "__main__":
    main()
