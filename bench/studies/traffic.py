"""Bytes and operations of an attack iteration on one block on a GPU, by precision.

    python -m bench.studies.traffic [--model vit_large_patch16_224] [--image-size 224]
        [--batch-size 128] [--from 2097152] [--output FILE.jsonl]

Read off the code that torch.compile writes for an H100, which needs no GPU: kernels, their bytes,
the operations of matrix products and attention. No time is measured. `at best` is the time that the
H100's rates allow, each kernel bound by its bytes or its operations, and the ratio of two such
times is what a perfect machine would gain: real kernels reach some two thirds of these rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.measure import append, origin
from bench.studies.described_gpu import H100, Kernel, compiled_kernels
from safer_fast.attacks import float8_layers
from safer_fast.attacks.float8 import PAYS_FROM, LowPrecision, fitting
from safer_fast.attacks.float8_layers import Float8Linear
from safer_fast.config.schema import ModelConfig
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.build import build_model
from safer_fast.models.families import STEM
from safer_fast.models.robust_model import RobustModel

Row = dict[str, Any]
PRECISIONS = ("amp", "bf16", "fp8")
QUANTISING = {"abs", "amax", "clamp", "eq", "mul", "ne", "reciprocal", "scalar_tensor", "where"}
QUANTISING |= {
    "_scaled_mm",
    "_to_copy",
    "_unsafe_view",
    "clone",
    "permute",
    "t",
    "transpose",
    "view",
}
"""Operations of a kernel that does nothing but quantise rows, and of views on the way."""
OWN = "safer_fast."
"""Namespace of our own ops, which are kernels as they are."""


def main() -> None:
    """Print kernels and sums for each precision and, if asked, append the sums to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--from", type=int, default=PAYS_FROM, dest="least", help="attack.fp8_from")
    parser.add_argument("--output", type=Path, help="append one JSON line per precision")
    arguments = parser.parse_args()
    times = {}
    for precision in PRECISIONS:
        kernels = block_kernels(
            precision,
            arguments.model,
            arguments.image_size,
            arguments.batch_size,
            arguments.least,
        )
        row = _row(kernels, precision, arguments)
        times[precision] = row["at_best_ms"]
        _print(row, kernels)
        append([row], arguments.output)
    gains = [f"{times['amp'] / times[name]:.2f} in {name}" for name in PRECISIONS[1:]]
    print(f"at best times as fast: {', '.join(gains)}")


def block_kernels(
    precision: str, model: str, image_size: int, batch_size: int, least: int = PAYS_FROM
) -> list[list[Kernel]]:
    """Forward and backward kernels of the model's first block under attack.

    precision: as `attack.precision`. least: elements of the smallest matrix in FP8.
    """
    network = _block_model(model, image_size)
    block = network.blocks[0]
    feature_dtype = torch.float32  # as position embeddings are, of which features are sums
    if precision != "amp":
        low = LowPrecision(network, fitting(network, least) if precision == "fp8" else ())
        low.switch(True)
        feature_dtype = torch.bfloat16
        _register_copies(block)
    with torch.no_grad():
        tokens = network.block(torch.zeros(1, 3, image_size, image_size), STEM)
    x = torch.zeros(batch_size, *tokens.shape[1:], dtype=feature_dtype)
    with (
        patch.object(functional, "layer_norm", _norm_in_fp32),
        patch.object(float8_layers, "simulated_product", float8_layers.gpu_product),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        return compiled_kernels(block, x)


def work(kernel: Kernel) -> list[str]:
    """Operations of a kernel, sorted, with those of quantising as one word."""
    if OWN in kernel.name:
        return [kernel.name.partition(OWN)[2].partition(".")[0]]
    operations = set(kernel.name.split())
    if "amax" not in operations:
        return sorted(operations - {"_to_copy", "clone", "permute", "view"})
    return [*sorted(operations - QUANTISING), "quantise"]


def _block_model(name: str, image_size: int) -> RobustModel:
    """The model with two blocks, of which the first is as any but the last; stored in bf16."""
    model = build_model(
        ModelConfig(name=name, arguments={"depth": 2}),
        num_classes=1000,
        image_size=image_size,
        compute_dtype=torch.bfloat16,
    )
    ParameterArenas(model.network, model.layers, torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _register_copies(block: nn.Module) -> None:
    """Make quantised weights buffers of their modules: tracing takes those as inputs."""
    for module in block.modules():
        if isinstance(module, Float8Linear):
            for name in ("rows", "row_scales", "columns", "column_scales"):
                value = module.__dict__.pop(name)
                module.register_buffer(name, value)


def _norm_in_fp32(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Layer norm in fp32, as autocast runs it on a GPU and not on a CPU."""
    return _layer_norm(x.float(), *arguments, **named)


_layer_norm = functional.layer_norm


def _row(kernels: Sequence[Sequence[Kernel]], precision: str, arguments: Any) -> Row:
    every = [kernel for part in kernels for kernel in part]
    return {
        "what": "traffic",
        "implementation": precision,
        "case": f"{arguments.model}, {arguments.image_size} pixels, batch {arguments.batch_size}",
        "num_float8": sum(kernel.dtype == "fp8" for kernel in every),
        "dtype": precision,
        "gpu": H100.name,
        "num_kernels": len(every),
        "megabytes": round(sum(kernel.num_bytes for kernel in every) / 1e6),
        "outside_products": round(
            sum(kernel.num_bytes for kernel in every if not kernel.is_product) / 1e6
        ),
        "teraflop": round(sum(kernel.num_operations for kernel in every) / 1e12, 3),
        "at_best_ms": round(sum(kernel.seconds(H100) for kernel in every) * 1e3, 3),
        **origin(torch.device("cpu")),
    }


def _print(row: Row, kernels: Sequence[Sequence[Kernel]]) -> None:
    print(f"{row['case']}, {row['dtype']}")
    for title, part in zip(("forward", "backward"), kernels, strict=True):
        print(f"  {title}")
        for kernel in part:
            flops = f"{kernel.num_operations / 1e9:6.0f} GFLOP" if kernel.is_product else " " * 12
            does = ", ".join(work(kernel)) or "cast"
            print(f"    {kernel.num_bytes / 1e6:6.0f} MB {flops}  {does}")
    print(
        f"  {row['num_kernels']} kernels, {row['megabytes']} MB ({row['outside_products']} outside "
        f"products), {row['teraflop']:.2f} TFLOP; at best {row['at_best_ms']:.3f} ms on an "
        f"{row['gpu']}"
    )


if __name__ == "__main__":
    main()
