"""Time of a block and of a step on a GPU, by arithmetic: nothing is timed, and no GPU is needed.

    python -m bench.roofline MODEL BATCH [--gpu h100|h200|a100|b200] [--image-size 224]
        [--steps 10,3,2] [--layer blocks.18.mlp.fc1] [--output FILE.jsonl]

Kernels of a block are read off the code that torch.compile writes for an H100: their bytes, the
operations of products, an estimate of the instructions of the others. `at best` takes each kernel
at the peak rates of the GPU, `expected` at the shares of them in `SHARES`, and a microsecond
between two kernels. A step is K iterations of the attack through all blocks, the blocks below the
selected layer once, and those above it twice forward and backward, with its weight gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import append, origin
from bench.studies.described_gpu import H100, Kernel, Properties
from bench.studies.traffic import PRECISIONS, block_kernels
from safer_fast.config.schema import ModelConfig
from safer_fast.models.build import build_model

Row = dict[str, Any]
GPUS = {
    "h100": H100,
    "h200": replace(H100, name="NVIDIA H200 SXM", bytes_per_s=4.8e12),
    "a100": replace(
        H100,
        name="NVIDIA A100 SXM 80 GB",
        major=8,
        multi_processor_count=108,
        bytes_per_s=2.039e12,
        bf16_per_s=312e12,
        fp8_per_s=0.0,
    ),
    "b200": replace(
        H100,
        name="NVIDIA B200",
        major=10,
        multi_processor_count=148,
        bytes_per_s=8e12,
        bf16_per_s=2250e12,
        fp8_per_s=4500e12,
    ),
}
"""Peak rates as NVIDIA's data sheets have them for dense products; fp8_per_s 0: no FP8."""
SHARES = {"bytes": 0.85, "bf16": 0.65, "fp8": 0.55, "attention": 0.35, "instructions": 0.6}
"""Shares of the peak rates that kernels are expected to reach."""
GAP_S = 1e-6
PASSES = 2
PIXEL_PASSES = 8
"""Times that an iteration goes through fp32 pixels outside the blocks: normalising and its gradient
twice each, and the step on images, pixels and gradient."""
UPDATE_BYTES = 46
"""Bytes of ascent and AdamW for each selected weight: two gradients, two moments and the master
read and written, the compute copy written twice."""


@dataclass(frozen=True)
class Work:
    """Kernels, their bytes, operations and instructions, and the seconds that they take.

    num_needed: operations without the scores that the backward pass of attention computes again.
    """

    num_kernels: float = 0
    num_bytes: float = 0
    num_operations: float = 0
    num_needed: float = 0
    num_instructions: float = 0
    at_best_s: float = 0
    expected_s: float = 0

    def __add__(self, other: Work) -> Work:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(mine + theirs for mine, theirs in pairs))

    def __rmul__(self, times: float) -> Work:
        return Work(*(times * value for value in vars(self).values()))


@dataclass(frozen=True)
class Network:
    """Sizes of a ViT: `width` of a token, `matrix`: weights of the selected layer."""

    depth: int
    width: int
    patch_size: int
    cut: int
    matrix: int


def main() -> None:
    """Print a line for a block, an iteration and steps in each precision; append rows to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="name of a ViT in timm")
    parser.add_argument("batch", type=_number, help="images of a step")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="whose rates are taken")
    parser.add_argument("--image-size", type=_number, default=224, help="edge in pixels")
    parser.add_argument("--steps", type=_numbers, default=[10, 3, 2], help="of PGD, with commas")
    parser.add_argument("--layer", help="selected; default: the MLP three quarters up the network")
    parser.add_argument("--output", type=Path, help="append one JSON line per result to this file")
    arguments = parser.parse_args()
    try:
        network = sizes_of(arguments.model, arguments.image_size, arguments.layer)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    for row in predict(network, arguments):
        print(line_of(row), flush=True)
        append([row], arguments.output)


def predict(network: Network, arguments: argparse.Namespace) -> Iterable[Row]:
    """Rows of a block, an iteration of the attack, and steps, in each precision of the GPU."""
    gpu, batch, size = GPUS[arguments.gpu], arguments.batch, arguments.image_size
    case = f"{arguments.model}, {size}/{network.patch_size}, batch {batch}"
    facts = {"what": "roofline", "gpu": gpu.name, **origin(torch.device("cpu"))}
    layer = arguments.layer or _default_layer(network.depth)
    rest = _outside_blocks(network, batch, size, gpu)
    training: list[Work] = []
    for precision in PRECISIONS:
        if precision == "fp8" and not gpu.fp8_per_s:
            continue
        kernels = block_kernels(precision, arguments.model, size, batch)
        passes = [work_of(part, gpu) for part in kernels]  # forward, gradient of the input
        training = training or passes
        block = passes[0] + passes[1]
        attack = network.depth * block + rest
        sam = _sam_passes(network, batch, size, training, gpu)
        parts: list[tuple[str, str, int | None, Work]] = [
            ("block", case, None, block),
            ("iteration", case, None, attack),
        ]
        for steps in arguments.steps:
            name = f"{case}, PGD-{steps}, rho 0.05"
            parts.append(("step", name, steps, steps * attack + sam))
        for part, name, steps, work in parts:
            row = {"part": part, "implementation": precision, "dtype": "bf16", "case": name}
            row |= {"steps": steps, "layers": [layer], "shares": SHARES}
            yield facts | row | _figures(work, batch, gpu)


def work_of(kernels: Sequence[Kernel], gpu: Properties) -> Work:
    """The sums over kernels, each of which is bound by bytes, operations or instructions."""
    total = Work()
    for kernel in kernels:
        peak = gpu.fp8_per_s if kernel.dtype == "fp8" else gpu.bf16_per_s
        of = "attention" if "attention" in kernel.name else kernel.dtype or "bf16"
        amounts = kernel.num_bytes, kernel.num_operations, kernel.num_instructions
        rates = gpu.bytes_per_s, peak, gpu.instructions_per_s
        shares = SHARES["bytes"], SHARES[of], SHARES["instructions"]
        at_best = max(a / rate for a, rate in zip(amounts, rates, strict=True))
        expected = max(a / (r * s) for a, r, s in zip(amounts, rates, shares, strict=True))
        again = kernel.num_operations / 5 if "attention_backward" in kernel.name else 0
        num_bytes, num_operations, num_instructions = amounts
        needed = num_operations, num_operations - again
        total += Work(1, num_bytes, *needed, num_instructions, at_best, expected + GAP_S)
    return total


def sizes_of(model: str, image_size: int, layer: str | None) -> Network:
    """Sizes of the model; raises ValueError for one without blocks, or without the layer."""
    with torch.device("meta"):  # no weights are drawn
        built = build_model(ModelConfig(name=model), num_classes=1000, image_size=image_size)
    embedding = getattr(built.network, "patch_embed", None)
    if not built.num_blocks or embedding is None or not hasattr(embedding, "proj"):
        raise ValueError(f"model: expected a ViT, got {model}")
    layer = layer or _default_layer(built.num_blocks)
    if layer not in built.layers:
        raise ValueError(f"--layer: expected a layer of {model}, got {layer}")
    width, _, patch_size, _ = embedding.proj.weight.shape
    names = built.layers[layer]
    matrix = sum(built.network.get_parameter(name).numel() for name in names)
    return Network(built.num_blocks, width, patch_size, max(built.block_of(layer), 0), matrix)


def line_of(row: Row) -> str:
    """The row as a line."""
    amounts = f"{row['gigabytes']:8.2f} GB {row['teraflop']:7.2f} TFLOP "
    amounts += f"{row['tera_instructions']:6.3f} T instructions"
    return (
        f"{row['case']:<62} {row['part']:<9} {row['implementation']:<4} {row['num_kernels']:6.0f} "
        f"kernels {amounts}  at best {row['at_best_ms']:8.2f} ms  expected "
        f"{row['expected_ms']:8.2f} ms, MFU {row['expected_mfu']:6.1%}"
    )


def _figures(work: Work, batch: int, gpu: Properties) -> Row:
    return {
        "num_kernels": round(work.num_kernels),
        "gigabytes": round(work.num_bytes / 1e9, 3),
        "teraflop": round(work.num_operations / 1e12, 3),
        "needed_teraflop": round(work.num_needed / 1e12, 5),
        "tera_instructions": round(work.num_instructions / 1e12, 4),
        "at_best_ms": round(work.at_best_s * 1e3, 3),
        "expected_ms": round(work.expected_s * 1e3, 3),
        "expected_images_per_second": round(batch / work.expected_s, 1),
        "expected_mfu": round(work.num_needed / work.expected_s / gpu.bf16_per_s, 4),
    }


def _outside_blocks(network: Network, batch: int, size: int, gpu: Properties) -> Work:
    """An iteration below and above the blocks: pixels, and the patch embedding twice."""
    pixels = batch * 3 * size**2
    tokens = batch * (size // network.patch_size) ** 2
    operations = 2 * tokens * network.width * 3 * network.patch_size**2
    embedding = Kernel("mm", 2 * pixels + 4 * tokens * network.width, operations, "bf16")
    return work_of([Kernel("pixels", PIXEL_PASSES * 4 * pixels), embedding, embedding], gpu)


def _sam_passes(
    network: Network, batch: int, size: int, block: Sequence[Work], gpu: Properties
) -> Work:
    """Prefix, both passes through the suffix with the selected layer's weight gradient, update."""
    forward, backward = block
    num_above = network.depth - network.cut
    tokens = batch * ((size // network.patch_size) ** 2 + 1)
    weight = Kernel("mm", 10 * tokens * network.width, 2 * tokens * network.matrix, "bf16")
    suffix = num_above * (forward + backward) + work_of([weight], gpu)
    update = work_of([Kernel("update", UPDATE_BYTES * network.matrix)], gpu)
    return network.cut * forward + PASSES * suffix + update


def _default_layer(depth: int) -> str:
    return f"blocks.{3 * depth // 4}.mlp.fc1"


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
