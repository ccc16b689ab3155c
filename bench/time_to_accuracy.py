"""Seconds to the same robust accuracy: ours with audited iterations, ours with PGD-10, and peers.

    python -m bench.time_to_accuracy --start RUN --train FILE --test FILE [--epochs 3]
        [--implementations auto,10,tuned,shipped] [--compile on|off] [--num-test 1000]
        [--attacks NAMES] [--output FILE.jsonl] [flags of safer_fast.train, for all of them]

All train the SAFER stage from the best weights of RUN, on the same batches, at the same learning
rates, with AdamW and SAM of the same radius. Rounds of steps alternate between them, so that a busy
machine slows every one alike. Seconds are those of training, selection and audits: compilation and
warming up, so a first selection and the first round but for its audits, are left out, and so is
evaluation. Peers are torchattacks' PGD and pytorch-optimizer's SAM: as shipped over all weights,
tuned over the layers that ours selects, see `bench.peers`. In the end each is attacked by attacks
that none of them trained against.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch import Tensor
from torch.nn import functional
from torchattacks import PGD
from tqdm import tqdm

from bench.measure import append, command, origin, timed
from bench.others import TORCHS_CHOICE, as_without_us
from safer_fast.attacks.autoattack import LibraryAttacks
from safer_fast.attacks.correctness import is_right
from safer_fast.attacks.named import ThreatModel
from safer_fast.config.attack_names import LIBRARY_ATTACKS
from safer_fast.config.command_line import parse_config
from safer_fast.config.untrusted import load_yaml
from safer_fast.data import Batch, Loader, as_pixels, prefetch_to_device
from safer_fast.evaluation.accuracy import evaluate
from safer_fast.runs.layout import RunFolder
from safer_fast.runtime.micro_batch import MicroBatch
from safer_fast.training.reference import PlainModel
from safer_fast.training.schedule import settings_at
from safer_fast.training.trainer import Trainer

Row = dict[str, Any]
STEPS = 10
IMPLEMENTATIONS = {
    "auto": "ours, attack.steps auto",
    "10": "ours, PGD-10",
    "tuned": "peers tuned, PGD-10",
    "shipped": "peers as shipped, PGD-10",
}
ROUND = 8
"""Steps that one implementation takes in turn."""


class Ours:
    """A run of ours from the start, taken step by step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.iterations = trainer, 0

    def surroundings(self) -> AbstractContextManager[None]:
        """Settings of the process while it works: those of a run of ours."""
        return nullcontext()

    def begin(self) -> None:
        """Enter the SAFER stage: evaluate the start, select layers, compile what that needs."""
        self.trainer.begin_epoch(1)

    def select(self) -> None:
        """Select layers, now that all is compiled."""
        self.trainer.choose(1)

    def step(self, epoch: int, index: int, batch: Batch, num_steps: int) -> None:
        """Learn from a batch."""
        place = self.trainer.stage, epoch, index, len(self.trainer.data.train)
        self.trainer.learner.take_step(*place, batch, num_steps)
        self.iterations += self.trainer.step.attack.steps

    def audit_seconds(self) -> float:
        """Time that audits have taken since the last call."""
        return self.trainer.engine.audit.take_seconds()

    def weights(self) -> Tensor:
        """All weights, flat as the masters."""
        return self.trainer.arenas.master


class Peer:
    """The same training made of torchattacks and pytorch-optimizer.

    trainer: a run of ours, whose start, selection, schedule and batches are taken over.
    """

    def __init__(self, trainer: Trainer, is_tuned: bool, is_compiled: bool) -> None:
        self.trainer, self.is_tuned, self.is_compiled = trainer, is_tuned, is_compiled
        self.iterations = 0

    def surroundings(self) -> AbstractContextManager[None]:
        """Settings of the process while it works: those of a process of its own."""
        return as_without_us(self.trainer.runtime, TORCHS_CHOICE)

    def begin(self) -> None:
        """Copy the network and its start; tuned: freeze what ours has not selected."""
        config, model, arenas = self.trainer.config, self.trainer.model, self.trainer.arenas
        autocast = torch.bfloat16 if config.amp == "bf16" else None
        self.model = PlainModel(model, torch.float32, autocast).eval()
        network = self.model.network
        network.load_state_dict(arenas.state_dict(), strict=False)
        if self.is_tuned:
            self._freeze(set(model.names_of(self.trainer.step.selection.parameters)))
        self.trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        epsilon, optim = float(config.attack.epsilon), config.optim
        self.attack = PGD(self.model, eps=epsilon, alpha=2.5 * epsilon / STEPS, steps=STEPS)
        self.optimizer = SAM(
            list(self.trained.values()),
            torch.optim.AdamW,
            rho=config.sam.rho,
            use_gc=False,
            lr=optim.learning_rate,
            weight_decay=optim.weight_decay,
        )

    def select(self) -> None:
        """Nothing: it trains all weights, or what ours has selected, at no cost to itself."""

    def step(self, epoch: int, index: int, batch: Batch, num_steps: int) -> None:
        """Learn from a batch at the learning rate that ours has."""
        place = self.trainer.stage, epoch, index, len(self.trainer.data.train)
        for group in self.optimizer.param_groups:
            group["lr"] = settings_at(self.trainer.config, *place).learning_rate
        images, labels = as_pixels(batch.images), batch.labels
        self._require_gradients(not self.is_tuned)
        attacked = self.attack(images, labels)
        self._require_gradients(True)
        for take in (self.optimizer.first_step, self.optimizer.second_step):
            loss: Any = functional.cross_entropy(self.model(attacked), labels)
            loss.backward()
            take(zero_grad=True)
        self.iterations += STEPS

    def audit_seconds(self) -> float:
        """None: it audits nothing."""
        return 0.0

    def weights(self) -> Tensor:
        """All weights, flat as the masters; what was frozen is what it was."""
        trained = {name: parameter.detach().float() for name, parameter in self.trained.items()}
        arenas = self.trainer.arenas
        return arenas.vector_of({**arenas.state_dict(), **trained})

    def _freeze(self, selected: set[str]) -> None:
        """Train these parameters alone; store other matrices in bf16; compile if ours do."""
        network = self.model.network
        layers = {name for own in self.trainer.model.layers.values() for name in own}
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in selected)
            if self.trainer.config.amp == "bf16" and name in layers - selected:
                parameter.data = parameter.data.bfloat16()
        if self.is_compiled:
            for block in network.get_submodule("blocks").children():
                block.compile(dynamic=False)

    def _require_gradients(self, does: bool) -> None:
        for parameter in self.trained.values():
            parameter.requires_grad_(does)


@command
def main() -> None:
    """Train all, print a table and, if asked, append one JSON line per implementation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--start", required=True, help="run folder whose best weights are the start"
    )
    parser.add_argument("--train", required=True, help="training images, as --data.path takes them")
    parser.add_argument("--test", required=True, help="test images")
    parser.add_argument("--epochs", type=int, default=3, help="of the SAFER stage")
    parser.add_argument("--implementations", type=_implementations, default=list(IMPLEMENTATIONS))
    parser.add_argument("--compile", choices=("on", "off"), default="off")
    parser.add_argument("--num-test", type=int, default=1000, help="test images that are attacked")
    parser.add_argument("--attacks", default="clean,pgd-50,autoattack", help="that judge")
    parser.add_argument("--output", type=Path, help="append one JSON line for each to this file")
    arguments, flags = parser.parse_known_args()
    rows = measure(arguments, flags)
    print(table(rows))
    append(rows, arguments.output)


def measure(arguments: argparse.Namespace, flags: Sequence[str]) -> list[Row]:
    """A row for each implementation, all trained in turn. flags: of safer_fast.train."""
    with TemporaryDirectory() as folder, ExitStack() as stack:

        def trainer(name: str, *more: str) -> Trainer:
            own = _flags(arguments, Path(folder) / name, *flags, *more)
            return stack.enter_context(Trainer(parse_config(own)))

        host = trainer("host", f"--attack.steps={STEPS}", "--runtime.compile=off")
        host.begin_epoch(1)
        contestants: dict[str, Ours | Peer] = {}
        for name in arguments.implementations:
            if name in ("auto", "10"):
                own = f"--attack.steps={name}", f"--runtime.compile={arguments.compile}"
                contestants[name] = Ours(trainer(name, *own))
            else:
                contestants[name] = Peer(host, name == "tuned", arguments.compile == "on")
        seconds = race(host, contestants)
        about = _about(arguments, host)
        return [
            about
            | {
                "implementation": IMPLEMENTATIONS[name],
                "seconds": round(seconds[name], 2),
                "speed_of_ours": round(seconds[name] / seconds["auto"], 3),
                "iterations": contestant.iterations,
                "accuracies": accuracies(host, contestant.weights(), arguments),
                "num_images": arguments.num_test,
            }
            for name, contestant in contestants.items()
        ]


def race(host: Trainer, contestants: Mapping[str, Ours | Peer]) -> dict[str, float]:
    """Train all on the batches of `host`, in turn; return the seconds of each.

    Seconds are those of training: of selecting layers, once all is warm, and of all rounds. The
    first round of each counts as long as its later ones are on average, and as long as its audits
    took besides: the search that a phase begins with is in it.
    """
    device, data = host.runtime.device, host.data.train
    places = [(epoch, index) for epoch in range(1, host.config.epochs + 1) for index in _all(data)]
    if len(places) <= ROUND:
        raise ValueError(
            f"expected more than {ROUND} steps, of which the first {ROUND} are not timed, got "
            f"{len(places)}: give more images or epochs"
        )
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    begun: dict[str, float] = {}
    for name, contestant in contestants.items():
        with contestant.surroundings():
            contestant.begin()
            begun[name] = timed(contestant.select, device)[0] / 1e3
    batches = (
        batch
        for epoch in range(1, host.config.epochs + 1)
        for batch in prefetch_to_device(data.epoch(epoch), device)
    )
    rounds = tqdm(range(0, len(places), ROUND), desc="rounds", mininterval=10)
    for first in rounds:
        held = list(islice(batches, ROUND))
        for name, contestant in contestants.items():
            with contestant.surroundings():
                run = partial(_take_round, contestant, places[first : first + ROUND], held, first)
                spent[name].append(timed(run, device)[0] / 1e3)
            if not first:
                begun[name] += contestant.audit_seconds()
    return {
        name: begun[name] + sum(times[1:]) * len(places) / (len(places) - ROUND)
        for name, times in spent.items()
    }


def _take_round(
    contestant: Ours | Peer, places: Sequence[tuple[int, int]], batches: Sequence[Batch], first: int
) -> None:
    for number, ((epoch, index), batch) in enumerate(zip(places, batches, strict=True), first):
        contestant.step(epoch, index, batch, number)


def _all(data: Loader) -> range:
    return range(len(data))


def accuracies(host: Trainer, weights: Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """Accuracy on test images under each attack, by the model of `host` with these weights."""
    attacks: list[str] = []
    library: list[str] = []
    for name in arguments.attacks.split(","):
        (library if name in LIBRARY_ATTACKS else attacks).append(name)
    config, model, test = host.config, host.model, host.data.test
    assert test is not None
    threat = ThreatModel(config.attack.norm, float(config.attack.epsilon))
    batches = [batch.to(host.runtime.device) for batch in test.epoch(1, limit=arguments.num_test)]
    with host.engine.reading(weights):
        found = {each.attack: each.accuracy for each in evaluate(model, batches, attacks, threat)}
        for name in library:
            suite = LibraryAttacks(model, threat.norm, host.data.num_classes, MicroBatch("test"))
            right = sum(_num_right(suite, name, batch, threat.epsilon) for batch in batches)
            found[name] = right / sum(batch.num_images for batch in batches)
    return {name: round(found[name], 5) for name in arguments.attacks.split(",")}


def _num_right(suite: LibraryAttacks, name: str, batch: Batch, epsilon: float) -> int:
    images, labels = as_pixels(batch.images)[: batch.num_images], batch.labels[: batch.num_images]
    with torch.no_grad():
        is_clean = is_right(suite.model(images), labels)
    images, labels = images[is_clean], labels[is_clean]
    attacked = suite(name, images, labels, epsilon, seed=0)
    with torch.no_grad():
        return int(is_right(suite.model(attacked), labels).sum())


def _flags(arguments: argparse.Namespace, output: Path, *flags: str) -> list[str]:
    """Flags of a run of the SAFER stage; those of the user come last."""
    return [
        *start_flags(arguments.start),
        f"--data.path={arguments.train}",
        f"--data.test_path={arguments.test}",
        "--data.augmentation=none",
        f"--epochs={arguments.epochs}",
        *flags,
        f"--output={output}",
    ]


def start_flags(folder: str, weights: str = "best") -> list[str]:
    """Flags of a SAFER stage in bf16 that starts from these weights of a run, and selects once."""
    run = RunFolder(Path(folder))
    model = load_yaml(run.config.read_text())["model"] | {"checkpoint": str(run.weights(weights))}
    return [
        "--amp=bf16",
        *(f"--model.{name}={_as_flag(value)}" for name, value in model.items()),
        "--data.num_workers=0",
        "--selection.warmup_epochs=0",
        "--selection.every_epochs=0",
        "--attack.clean_epochs=0",
        "--attack.epsilon_warmup_epochs=0",
        "--optim.warmup_epochs=0",
    ]


def _as_flag(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _about(arguments: argparse.Namespace, host: Trainer) -> Row:
    """Facts that all rows share."""
    config = host.config
    num_weights = sum(parameter.numel() for parameter in host.model.parameters())
    return {
        "what": "time_to_accuracy",
        "case": f"{config.model.name}, {num_weights:,} weights, {config.epochs} epochs on "
        f"{host.data.train.num_images:,} images of {host.data.image_size} pixels, "
        f"batch {config.batch_size}, {config.attack.norm}, epsilon {config.attack.epsilon:.4g}",
        "layers": host.step.selection.names,
        "dtype": config.amp,
        "compiled": arguments.compile == "on",
        "rho": config.sam.rho,
        "seed": config.seed,
        **origin(host.runtime.device),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    first = rows[0]
    lines = [f"{first['case']}; trains {', '.join(first['layers'])}; {first['device']}"]
    for row in rows:
        found = ", ".join(f"{name} {100 * value:.1f}" for name, value in row["accuracies"].items())
        lines.append(
            f"  {row['implementation']:<26} {row['seconds']:>8.1f} s  auto is "
            f"{row['speed_of_ours']:.2f}x  {found} % of {row['num_images']}"
        )
    return "\n".join(lines)


def _implementations(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in IMPLEMENTATIONS]:
        expected = ", ".join(IMPLEMENTATIONS)
        raise argparse.ArgumentTypeError(f"expected some of {expected}, got {unknown[0]}")
    return ["auto", *(name for name in names if name != "auto")]


if __name__ == "__main__":
    main()
