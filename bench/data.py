"""Images per second of every data backend, beside timm's and torchvision's loaders, in one run.

    python -m bench.data [--photos FILE] [--small FILE] [--parts photos,small,training]
        [--workers 1,2] [--repeats 3] [--batch-size 64] [--images N] [--small-images 10000]
        [--output FILE.jsonl] [--training-images 96 and others, see --help]

photos: training (random resized crop, flip) and evaluation (short side 256, centre crop) at 224
pixels. small: 32 pixels, crop with padding 4 and flip. training: whether a real run waits.
A measurement is an epoch, from asking for its first batch until the last is on the device, with the
start of the workers where a loader starts them in every epoch; the first epoch is not counted.
Epochs of all loaders alternate. This process computes on one thread, beside its workers; CPU
seconds are those of both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cpu_time import cpu_seconds
from bench.data_peers import SMALL_SIZE, Pipeline, Setting, ours, timm, torchvision, with_rows
from bench.data_training import print_training, training_row
from bench.measure import append, origin, quantiles, repeats, some_of, wait
from safer_fast.config.schema import DataConfig
from safer_fast.data import load_data
from safer_fast.data.dali.request import one_thread

Row = dict[str, Any]
PARTS = ("photos", "small", "training")
BESIDE = Path(__file__).parents[2] / "shared" / "data"
BASES = {
    "ratio_torch": "safer_fast torch",
    "ratio_timm": "timm create_loader",
    "ratio_timm_uint8": "timm create_loader, uint8",
}
TARGETS = [
    (224, "safer_fast dali", "ratio_torch_per_core", 2.0, "dali, times torch per core"),
    (224, "safer_fast torch", "ratio_timm", 0.95, "torch, times timm as shipped"),
    (224, "safer_fast torch", "ratio_timm_uint8", 0.95, "torch, times timm without normalising"),
    (32, "safer_fast device", "ratio_torch", 20.0, "device, times torch"),
]


@dataclass(frozen=True)
class Epoch:
    """Images and seconds of an epoch. cpu_s: None where the system does not count them."""

    num_images: int
    elapsed_s: float
    cpu_s: float | None


def main() -> None:
    """Print a table for each part and, if asked, append one JSON line per row to a file."""
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_no_dali(arguments.needed[arguments.parts[0]], device)
    if reason is not None:
        print(f"safer_fast dali: skipped: {reason}")
    arguments.backends = ["torch"] if reason else ["torch", "dali"]
    with tempfile.TemporaryDirectory() as name:
        for part in PARTS:
            if part in arguments.parts:
                for rows in MEASURES[part](arguments, device, Path(name)):
                    append(rows, arguments.output)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; end with status 2 where a file that is needed is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = Path(os.environ.get("SAFER_FAST_TEST_DATA", BESIDE))
    photos, small = folder / "photos-256.parquet", folder / "cifar10-train.parquet"
    parser.add_argument("--photos", type=Path, default=photos, help="parquet of large JPEGs")
    parser.add_argument("--small", type=Path, default=small, help="parquet of images of 32 pixels")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help="with commas")
    parser.add_argument("--workers", type=_numbers, default=[1, 2], help="with commas")
    parser.add_argument("--repeats", type=repeats, default=3, help="measured epochs of each")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch")
    parser.add_argument("--images", type=int, help="photos of an epoch, repeated if need be")
    parser.add_argument("--small-images", type=int, default=10000, help="an epoch that is streamed")
    parser.add_argument("--training-model", default="vit_small_patch16_224", help="name in timm")
    parser.add_argument("--training-images", type=int, default=96, help="repeated if need be")
    parser.add_argument("--training-batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--training-epochs", type=int, default=2, help="epochs of each run")
    parser.add_argument("--training-steps", type=int, default=3, help="iterations of PGD")
    parser.add_argument("--output", type=Path, help="append one JSON line per row to this file")
    arguments = parser.parse_args()
    arguments.needed = {
        "photos": arguments.photos,
        "small": arguments.small,
        "training": arguments.photos,
    }
    for part in arguments.parts:
        if not (file := arguments.needed[part]).is_file():
            flag = "--small" if part == "small" else "--photos"
            parser.error(f"{flag}: expected a parquet file, got none: {file}")
    return arguments


def why_no_dali(file: Path, device: torch.device) -> str | None:
    """Why DALI does not load this file here, or None where it does."""
    path = str(file)
    config = DataConfig(path=path, validation_path=path, image_size=SMALL_SIZE, backend="dali")
    try:
        load_data(config, batch_size=1, seed=0, device=device)
    except ValueError as error:
        return str(error)
    return None


def measure_photos(
    arguments: argparse.Namespace, device: torch.device, folder: Path
) -> Iterator[list[Row]]:
    """Rows of training and then of evaluation at 224 pixels."""
    file = arguments.photos
    if arguments.images is not None:
        file = with_rows(file, arguments.images, folder / "photos.parquet")
    setting = Setting(file, arguments.batch_size, device)
    for is_training in (True, False):
        pipelines = []
        for workers in arguments.workers:
            for backend in arguments.backends:
                pipelines.append(ours(setting, backend, workers, is_training=is_training))
            if is_training:
                pipelines.append(timm(setting, workers))
            if is_training and device.type == "cpu":
                pipelines.append(timm(setting, workers, is_normalised=False))
            pipelines.append(torchvision(setting, workers, is_training=is_training))
        how = "training (random resized crop, flip)" if is_training else "evaluation (centre crop)"
        case = f"{arguments.photos.stem}, {how} at 224 pixels, batch {arguments.batch_size}"
        yield measure(case, pipelines, arguments, device)


def measure_small(
    arguments: argparse.Namespace, device: torch.device, folder: Path
) -> Iterator[list[Row]]:
    """Rows of training at 32 pixels; a set on the device is gone through as a whole."""
    whole = Setting(arguments.small, arguments.batch_size, device)
    file = with_rows(arguments.small, arguments.small_images, folder / "small.parquet")
    streamed = Setting(file, arguments.batch_size, device)
    pipelines = [ours(whole, "device", max(arguments.workers), size=SMALL_SIZE)]
    for workers in arguments.workers:
        for backend in arguments.backends:
            pipelines.append(ours(streamed, backend, workers, size=SMALL_SIZE))
        pipelines.append(torchvision(streamed, workers, size=SMALL_SIZE))
    case = (
        f"{arguments.small.stem}, training (crop, flip) at 32 pixels, batch {arguments.batch_size}"
    )
    yield measure(case, pipelines, arguments, device)


def measure_training(
    arguments: argparse.Namespace, device: torch.device, folder: Path
) -> Iterator[list[Row]]:
    """A row for a run with each backend."""
    for backend in arguments.backends:
        row = training_row(arguments, backend, folder)
        print_training(row)
        yield [row]


MEASURES: dict[str, Callable[[argparse.Namespace, torch.device, Path], Iterator[list[Row]]]] = {
    "photos": measure_photos,
    "small": measure_small,
    "training": measure_training,
}


def measure(
    case: str, pipelines: list[Pipeline], arguments: argparse.Namespace, device: torch.device
) -> list[Row]:
    """Rows of pipelines whose epochs alternate, printed as a table."""
    epochs: list[list[Epoch]] = [[] for _ in pipelines]
    with one_thread():
        for number in range(1, 2 + arguments.repeats):
            for pipeline, measured in zip(pipelines, epochs, strict=True):
                measured.append(run_epoch(pipeline, number, device))
    rows = [
        {
            "what": "data",
            "implementation": pipeline.name,
            "case": case,
            "num_workers": pipeline.num_workers,
            "batch_size": arguments.batch_size,
            **figures(measured[1:]),
            "torch_threads": 1,
            **origin(device),
        }
        for pipeline, measured in zip(pipelines, epochs, strict=True)
    ]
    rows = [row | ratios(row, rows) for row in rows]
    print_rows(rows)
    return rows


def run_epoch(pipeline: Pipeline, number: int, device: torch.device) -> Epoch:
    """Go through an epoch and do nothing with its batches."""
    cpu_before, started = cpu_seconds(), time.perf_counter()
    num_images = sum(len(images) for images in pipeline.epoch(number))
    wait(device)
    elapsed, cpu_after = time.perf_counter() - started, cpu_seconds()
    if cpu_before is None or cpu_after is None:
        return Epoch(num_images, elapsed, None)
    return Epoch(num_images, elapsed, cpu_after - cpu_before)


def figures(epochs: list[Epoch]) -> Row:
    """The fields of a row that are measured, from epochs of the same number of images."""
    times = quantiles([epoch.elapsed_s * 1e3 for epoch in epochs])
    num_images = epochs[0].num_images
    # a short epoch can end within one tick of the clock that counts CPU seconds
    shares = [num_images / epoch.cpu_s for epoch in epochs if epoch.cpu_s]
    return {
        "num_images": num_images,
        **times,
        "images_per_second": round(num_images / times["p50_ms"] * 1e3, 1),
        "images_per_core_second": round(statistics.median(shares), 1) if shares else None,
    }


def ratios(row: Row, rows: list[Row]) -> Row:
    """Speed as a multiple of our torch backend's and of timm's, in all and per core.

    They are taken with the same number of workers, or as fast as they are where none has it.
    """
    found: Row = {}
    for key, name in BASES.items():
        others = [other for other in rows if other["implementation"] == name]
        others = [other for other in others if other["num_workers"] == row["num_workers"]] or others
        other = max(others, key=lambda other: other["images_per_second"], default={})
        for suffix, field in (("", "images_per_second"), ("_per_core", "images_per_core_second")):
            own, base = row[field], other.get(field)
            found[key + suffix] = round(own / base, 3) if own and base else None
    return found


def print_rows(rows: list[Row]) -> None:
    """The rows as a table, and what was aimed at."""
    print(f"{rows[0]['case']}, {rows[0]['device']}; this process on one thread")
    for row in rows:
        low, high = (row["num_images"] / row[name] * 1e3 for name in ("p80_ms", "p20_ms"))
        print(
            f"  {row['implementation']:<26}{row['num_workers']:>3} workers"
            f"{row['images_per_second']:>10.1f} images/s ({low:.0f} to {high:.0f})"
            f"{_shown(row['images_per_core_second']):>10} per core second;  times torch "
            f"{_shown(row['ratio_torch'])}, per core {_shown(row['ratio_torch_per_core'])};  "
            f"times timm {_shown(row['ratio_timm'])}, per core {_shown(row['ratio_timm_per_core'])}"
        )
    for size, name, field, least, words in TARGETS:
        own = [row for row in rows if row["implementation"] == name]
        values = [row[field] for row in own if f"at {size} pixels" in row["case"] and row[field]]
        if values:
            verdict = "reached" if min(values) >= least else "missed"
            shown = ", ".join(f"{value:.2f}" for value in values)
            print(f"  target: {words}: at least {least}: {shown}: {verdict}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _parts(text: str) -> list[str]:
    return some_of(PARTS, text).split(",")


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers above 0, got {text}")
    return numbers


if __name__ == "__main__":
    main()
