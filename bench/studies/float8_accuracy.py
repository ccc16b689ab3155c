"""A cheaper attack against the exact one: how many images of a run each fools.

    python -m bench.studies.float8_accuracy RUN [RUN ...] [--precision fp8|bf16] [--weights best]
        [--steps 20] [--num-images 1000] [--backward e4m3|e5m2] [--name "CIFAR-10"]
        [--output FILE.jsonl]

Images of the run's test split (validation, where it has none) are attacked twice by PGD from the
same random start, in amp and in `attack.precision`, with every matrix that FP8 can multiply in FP8;
both times the network judges in amp. Sign agreement: pixels whose gradient at the random start has
the same sign in both, of those where it is not 0 in amp. On a machine without a GPU, FP8 is
simulated: the same values, sums in another order.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional

from bench.measure import append, command, origin
from safer_fast.attacks import float8_layers
from safer_fast.attacks.correctness import is_right
from safer_fast.attacks.float8 import LowPrecision, fitting
from safer_fast.attacks.named import attack_spec
from safer_fast.attacks.pgd import frozen, pixel_gradient, placed_start
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.data import as_pixels, load_data
from safer_fast.runs.folder import LoadedRun, load_run
from safer_fast.runtime.seeds import derive_seed

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@command
def main() -> None:
    """Print a line for each run and, if asked, append it as JSON to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folders")
    parser.add_argument("--weights", choices=("best", "last"), default="last")
    parser.add_argument("--steps", type=int, default=20, help="iterations of PGD")
    parser.add_argument("--num-images", type=int, default=1000, help="the first of them")
    parser.add_argument("--batch-size", type=int, default=250, help="most images at a time")
    parser.add_argument("--name", help="what the table calls the data")
    parser.add_argument("--precision", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument(
        "--backward", choices=list(FORMATS), default="e4m3", help="FP8 format of gradients"
    )
    parser.add_argument("--output", type=Path, help="append one JSON line per run to this file")
    arguments = parser.parse_args()
    float8_layers.BACKWARD = FORMATS[arguments.backward]
    for folder in arguments.runs:
        row = accuracy_row(load_run(folder, arguments.weights), arguments)
        print(
            f"{row['case']}: PGD-{arguments.steps} accuracy {row['amp_accuracy']:.4f} in amp, "
            f"{row['own_accuracy']:.4f} in {row['dtype']}, {row['num_images']} images; only the "
            f"one in amp fools {row['only_amp_fools']}, only the other {row['only_own_fools']} "
            f"(p {row['p']:.2g}); gradients in {row['backward']}, sign agreement "
            f"{row['sign_agreement']:.4f}",
            flush=True,
        )
        append([row], arguments.output)


def accuracy_row(run: LoadedRun, arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracies under both attacks, on how many images they part, p of McNemar's exact test."""
    precision = arguments.precision
    low = LowPrecision(run.model, fitting(run.model) if precision == "fp8" else ())
    right: list[tuple[LowPrecision | None, list[Tensor]]] = [(None, []), (low, [])]
    agreements: list[Tensor] = []
    device = run.model.mean.device
    size = min(arguments.batch_size, run.config.batch_size)  # no more than there are to train on
    data = load_data(run.config.data, batch_size=size, seed=0, device=device)
    loader = data.test or data.validation
    for batch in loader.epoch(1, limit=arguments.num_images):
        batch = batch.to(device)
        images, labels = as_pixels(batch.images), batch.labels
        for chosen, found in right:
            attack = attack_on(run, arguments.steps, chosen)
            seed_of = partial(derive_seed, 0, "audit")
            attack.draw = partial(placed_start, position=batch.position, seed_of=seed_of)
            radii = _radii(run, arguments.steps, device)
            adversarial = attack(images, labels, *radii)
            with torch.no_grad():
                right_ones = is_right(run.model(adversarial), labels)
            found.append(right_ones[: batch.num_images])
        start = run.model.arrange(attack.draw(images, radii[0], attack.norm))
        agreements.append(_agreement(run, low, start, labels)[: batch.num_images])
    in_amp, in_own = (torch.cat(found) for _, found in right)
    only_amp, only_own = int((in_own & ~in_amp).sum()), int((in_amp & ~in_own).sum())
    parted = only_amp + only_own
    return {
        "what": "float8",
        "part": "accuracy",
        "implementation": precision,
        "case": f"{run.config.model.name} on {arguments.name or data.name}, {run.weights.name}",
        "dtype": precision,
        "epsilon": float(run.config.attack.epsilon),
        "steps": arguments.steps,
        "num_layers": len(low.layers),
        "backward": arguments.backward if low.layers else "bf16",
        "sign_agreement": round(torch.cat(agreements).mean().item(), 5),
        "num_images": len(in_amp),
        "amp_accuracy": round(in_amp.float().mean().item(), 5),
        "own_accuracy": round(in_own.float().mean().item(), 5),
        "only_amp_fools": only_amp,
        "only_own_fools": only_own,
        "p": binomtest(only_amp, parted).pvalue if parted else 1.0,
        "simulated": device.type != "cuda",
        **origin(device),
    }


def attack_on(run: LoadedRun, steps: int, precision: LowPrecision | None) -> ReplayedAttack:
    """PGD on the run's model."""
    return ReplayedAttack(run.model, norm=run.config.attack.norm, steps=steps, precision=precision)


def _agreement(run: LoadedRun, low: LowPrecision, start: Tensor, labels: Tensor) -> Tensor:
    """The share of each image's pixels whose gradient has the same sign in both precisions: [B]."""
    loss = partial(functional.cross_entropy, reduction="sum")
    with frozen(run.model):
        plain = pixel_gradient(run.model, start, labels, loss).sign().flatten(1)
        with low.used():
            rough = pixel_gradient(run.model, start, labels, loss).sign().flatten(1)
    return ((plain == rough) & (plain != 0)).sum(1) / (plain != 0).sum(1).clamp(min=1)


def _radii(run: LoadedRun, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    epsilon = float(run.config.attack.epsilon)
    step_size = attack_spec(f"pgd-{steps}", epsilon).step_size
    return torch.tensor(epsilon, device=device), torch.tensor(step_size, device=device)


if __name__ == "__main__":
    main()
