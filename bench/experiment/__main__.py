"""The CIFAR-10 experiment: does SAFER make vision transformers more robust? One command, one table.

    python -m bench.experiment --train cifar10-train.parquet --test cifar10-test.parquet
        [--scale full|reduced|small|medium] [--budget-minutes M] [--jobs N] [--seeds N]
        [--models NAMES] [--starts peak,late] [--arms "SAFER;PGD-AT"]
        [--kinds search,select,arm,autoattack] [--folder DIR] [--output FILE.jsonl] [--list]

One adversarial training is shared by all: its weights at the epoch of best validation robust
accuracy are the `peak` start, its last weights, `patience` epochs later, the `late` one. Each arm
trains from a start for the same number of epochs under the same attack; arms of one seed see the
same batches and the same random starts of the attack. Best epochs are chosen on validation images
cut from the training rows; test images are for final figures alone. At scale `medium` a search on
validation images alone goes before a comparison that was fixed in advance. What is done is not done
again, and what was stopped is resumed: give the budget there is, and call again. Where the folder
of runs was lost, the start is trained again, and those arms that AutoAttack waits for; on the same
kind of machine their bits are the same, and their rows are not written twice.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bench.experiment.arms import SCALES, Scale
from bench.experiment.compared_table import compared_tables, search_tables
from bench.experiment.jobs import Jobs
from bench.experiment.pool import Pool
from bench.experiment.table import experiment_tables
from bench.experiment.tasks import RESULTS, STARTS, Results, Task, Wanted, read_rows, tasks_of

KINDS = ("search", "select", "arm", "autoattack")


def main() -> None:
    """Do what is left of the experiment within the budget, and print its table."""
    arguments = _parsed()
    scale: Scale = SCALES[arguments.scale]
    folder = arguments.folder or Path("runs") / f"experiment-{scale.name}"
    wanted = Wanted(
        arguments.models, arguments.starts, arguments.seeds, arguments.arms, arguments.kinds
    )
    tasks = tasks_of(scale, wanted)
    results = Results(arguments.output)
    try:
        data = _split(scale, arguments.train, arguments.test, folder / "data")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    jobs = Jobs(scale, folder, data, results)
    if arguments.list:
        print("\n".join(f"{_state(jobs, task, tasks):5} {task.title}" for task in tasks))
        return
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    failures = Pool(jobs, arguments.jobs, deadline).run(tasks)
    rows = [row for row in read_rows(arguments.output) if row["case"] == scale.name]
    if rows:
        tables = [search_tables, compared_tables] if scale.compared else [experiment_tables]
        print("\n" + "\n".join(table(rows) for table in tables))
    if failures:
        sys.exit(f"{failures} tasks failed; their logs lie in {folder}")


def _state(jobs: Jobs, task: Task, tasks: list[Task]) -> str:
    return "done" if jobs.is_settled(task, tasks) else "-"


def _split(scale: Scale, train: Path, test: Path, folder: Path) -> dict[str, Path]:
    """Files of training, validation and test images, the same for all tasks; made once.

    Validation images are drawn from the training rows with a fixed seed, training images from what
    is left. Test images keep their order.
    """
    files = {name: folder / f"{name}.parquet" for name in ("train", "validation", "test")}
    if all(file.is_file() for file in files.values()):
        return files
    rows, tests = pq.read_table(train), pq.read_table(test)
    count, held = scale.train_images or len(rows) - scale.validation_images, scale.validation_images
    if count + held > len(rows):
        raise ValueError(f"--train: expected {count + held} images or more, got {len(rows)}")
    drawn = np.random.default_rng(0).permutation(len(rows))[: held + count]
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "validation": rows.take(np.sort(drawn[:held])),
        "train": rows.take(np.sort(drawn[held:])),
        "test": tests.slice(0, scale.test_images or len(tests)),
    }
    for name, table in parts.items():
        unfinished = folder / f"{name}.unfinished"
        pq.write_table(table, unfinished)
        os.replace(unfinished, files[name])
    return files


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=_file, required=True, help="CIFAR-10's training rows")
    parser.add_argument("--test", type=_file, required=True, help="CIFAR-10's test rows")
    parser.add_argument("--scale", choices=list(SCALES), default="full", help="how large it is")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="default: none")
    parser.add_argument("--jobs", type=int, default=1, help="tasks at a time, each its own process")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm")
    parser.add_argument("--models", type=_names, help="comma-separated; default: all of the scale")
    parser.add_argument("--starts", type=_names, default=list(STARTS), help="peak, late or both")
    parser.add_argument("--arms", type=lambda text: text.split(";"), help="only these, by ;")
    parser.add_argument("--kinds", type=_names, default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--folder", type=Path, help="of runs; default: runs/experiment-SCALE")
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows are appended to it")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is not")
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    arguments.models = arguments.models or list(scale.models)
    known = {"models": scale.models, "starts": STARTS, "kinds": KINDS}
    for name, values in {**known, "arms": ["start", *scale.arms()]}.items():
        for value in getattr(arguments, name) or []:
            if value not in values:
                parser.error(f"--{name}: expected some of {'; '.join(values)}, got {value!r}")
    for name in ("jobs", "seeds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    return arguments


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, got {text}")
    return Path(text)


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
