"""Speed of the attack in FP8 and in bf16 features: layers, an iteration, a whole step.

    python -m bench.studies.float8 [--model vit_large_patch16_224] [--image-size 224]
        [--patch-size 16] [--batch-sizes 64,128] [--steps 3] [--layers blocks.18.mlp.fc1]
        [--from 2097152] [--compile] [--cuda-graph] [--repeats 5] [--output FILE.jsonl]

amp, bf16 and FP8 (`attack.precision`) alternate in one process, and every figure is the time of amp
over that of the other in the same run. A layer is a norm, its product, and the gradient of the
norm's input, which is also what `attack.fp8_from=auto` times, with scales in the product (fp8) and
in a pass after it (fp8_rescaled): FP8 pays where its ratio is above 1.
What an audit finds stands beside an iteration. On a machine without a GPU FP8 is simulated, and
its times say nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bench.attack import iteration
from bench.implementation import warm_up
from bench.measure import Run, append, check_gpu, origin, quantiles, repeats, timed
from bench.memory import peak_memory_mib
from bench.ours import batch, build, build_robust_model, refuse
from bench.step import prepare, recorder_of
from safer_fast.attacks.audit import AGREEMENT, RATIO, Audit
from safer_fast.attacks.float8 import PAYS_FROM, LowPrecision, fitting
from safer_fast.attacks.float8_layers import Form
from safer_fast.attacks.float8_timing import Product, product_run
from safer_fast.attacks.pgd import frozen
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.schema import SAVINGS, AttackConfig
from safer_fast.models.attention import pin_for
from safer_fast.models.robust_model import RobustModel, compile_blocks
from safer_fast.runtime.cuda_graphs import Replays
from safer_fast.runtime.device import Runtime
from safer_fast.training.objectives import Targets

Row = dict[str, Any]
PRECISIONS = ("amp", "bf16", "fp8")


def main() -> None:
    """Print a line for each figure and, if asked, append it as JSON to a file."""
    arguments = _parsed()
    runtime = prepare(arguments)
    for size in arguments.batch_sizes:
        arguments.batch_size = size
        for part in (layer_rows, iteration_rows, step_rows):
            for row in part(arguments, runtime):
                full = {**_shared(arguments), **row, **origin(runtime.device)}
                print(_line(full), flush=True)
                append([full], arguments.output)


def layer_rows(arguments: argparse.Namespace, runtime: Runtime) -> Iterator[Row]:
    """A row for each shape of matrix in a block."""
    model, _ = build_robust_model(arguments, runtime)
    num_tokens = (arguments.image_size // arguments.patch_size) ** 2 + 1
    shapes = {
        tuple(module.weight.shape): name.rpartition("blocks.")[2].partition(".")[2]
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear) and 0 <= model.block_of(name) < model.num_blocks
    }
    for (outputs, inputs), name in shapes.items():
        product = Product(arguments.batch_size * num_tokens, inputs, outputs)
        forms: dict[str, Form | None] = {"amp": None, "fp8": "rows", "fp8_rescaled": "rescaled"}
        runs = {
            precision: product_run(product, runtime.device, form, arguments.compile)
            for precision, form in forms.items()
        }
        times = _alternate(runs, arguments, runtime)
        yield {"part": "layer", "layer": name, "elements": outputs * inputs, **_compared(times)}


def iteration_rows(arguments: argparse.Namespace, runtime: Runtime) -> Iterator[Row]:
    """One row: an attack iteration, and what audits find on the same images."""
    runs: dict[str, Run] = {}
    found: Row = {}
    for precision in PRECISIONS:
        model, _ = build_robust_model(arguments, runtime)
        pin_for(model, arguments.image_size, arguments.batch_size, "auto")
        if precision != "amp":
            low = _low_precision(model, precision, arguments)
            found |= _audited(model, low, precision, arguments, runtime)
            found["num_layers"] = len(low.layers)
            low.refresh()
            low.switch(True)
        if runtime.is_compiled:
            compile_blocks(model)
        iterate = iteration(model, arguments.batch_size, arguments.image_size, runtime)
        run = _held(model, partial(_replays(runtime), ("attack",), iterate))
        run()
        found[f"{precision}_peak_memory_mib"] = peak_memory_mib(run, runtime.device)
        runs[precision] = run
    times = _alternate(runs, arguments, runtime)
    yield {"part": "iteration", **_compared(times), **found}


def _held(model: nn.Module, run: Run) -> Run:
    """The run on a frozen model."""

    def on_frozen() -> None:
        with frozen(model):
            run()

    return on_frozen


def _low_precision(
    model: RobustModel, precision: str, arguments: argparse.Namespace
) -> LowPrecision:
    least = getattr(arguments, "from")
    return LowPrecision(model, fitting(model, least) if precision == "fp8" else ())


def _audited(
    model: RobustModel,
    low: LowPrecision,
    precision: str,
    arguments: argparse.Namespace,
    runtime: Runtime,
) -> Row:
    """The figures of an audit of an attack."""
    attack = ReplayedAttack(model, steps=arguments.steps, precision=low)
    images, labels, *radii = batch(arguments.batch_size, arguments.image_size, runtime.device)
    Audit(attack, AttackConfig(audit_ratio=0.0))(0, images, labels, *radii)
    return {f"{precision}_{name}": round(attack.audited[name], 5) for name in (AGREEMENT, RATIO)}


def step_rows(arguments: argparse.Namespace, runtime: Runtime) -> Iterator[Row]:
    """One row: a whole step, quantising what it changed included."""
    runs = {}
    for precision in PRECISIONS:
        step, (images, labels, *radii) = build(arguments, runtime)
        if precision != "amp":
            step.attack.precision = _low_precision(step.model, precision, arguments)
            step.attack.precision.move(step.selection.names)
        if runtime.is_compiled:
            compile_blocks(step.model)
        step.replays = step.attack.replays = _replays(runtime)
        runs[precision] = partial(step, images, Targets.alike(labels), *radii)
    times = _alternate(runs, arguments, runtime)
    yield {"part": "step", **_compared(times)}


def _replays(runtime: Runtime) -> Replays:
    return Replays(recorder_of(runtime), refuse)


def _alternate(
    runs: dict[str, Run], arguments: argparse.Namespace, runtime: Runtime
) -> dict[str, list[float]]:
    """Milliseconds of each run, measured in turn, without those of getting ready."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warm_up(runtime.is_captured) + arguments.repeats):
        for name, run in runs.items():
            times[name].append(timed(run, runtime.device)[0])
    return {name: values[-arguments.repeats :] for name, values in times.items()}


def _compared(times: dict[str, list[float]]) -> Row:
    """Times of all, and how many times as fast as amp the others are."""
    of = {name: quantiles(values) for name, values in times.items()}
    amp = of.pop("amp")
    row: Row = {"amp_ms": amp}
    for name, values in of.items():
        row |= {f"{name}_ms": values, f"{name}_speed": round(amp["p50_ms"] / values["p50_ms"], 3)}
    return row


def _shared(arguments: argparse.Namespace) -> Row:
    return {
        "what": "float8",
        "implementation": "fp8",
        "case": f"{arguments.model}, {arguments.image_size}/{arguments.patch_size}, "
        f"batch {arguments.batch_size}, PGD-{arguments.steps}",
        "dtype": "fp8",
        "compiled": arguments.compile,
        "captured": arguments.cuda_graph,
        "layers": arguments.layers.split(","),
        "fp8_from": getattr(arguments, "from"),
    }


def _line(row: Row) -> str:
    what = f"{row['part']} {row.get('layer', '')}".strip()
    words = [f"{row['case']}, {what:<16} amp {row['amp_ms']['p50_ms']:9.3f} ms"]
    for name in (*PRECISIONS[1:], "fp8_rescaled"):
        if f"{name}_ms" not in row:
            continue
        words.append(
            f"{name} {row[f'{name}_ms']['p50_ms']:9.3f} ms {row[f'{name}_speed']:.2f} times as fast"
        )
        if f"{name}_{RATIO}" in row:
            alike, ratio = row[f"{name}_{AGREEMENT}"], row[f"{name}_{RATIO}"]
            words.append(f"signs {alike:.1%}, loss {ratio:.3f}")
    return "  ".join(words)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_large_patch16_224", help="name in timm")
    parser.add_argument("--image-size", type=int, default=224, help="edge in pixels")
    parser.add_argument("--patch-size", type=int, default=16, help="edge of a patch in pixels")
    parser.add_argument("--batch-sizes", type=_sizes, default=[64, 128], help="with commas")
    parser.add_argument("--steps", type=int, default=3, help="iterations of PGD")
    parser.add_argument("--rho", type=float, default=0.05, help="radius of SAM; 0: one pass")
    parser.add_argument("--layers", default="blocks.18.mlp.fc1", help="selected, with commas")
    parser.add_argument("--from", type=int, default=PAYS_FROM, help="least elements for FP8")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--cuda-graph", action="store_true", help="replay from CUDA graphs")
    parser.add_argument("--repeats", type=repeats, default=5, help="measurements of each")
    parser.add_argument("--output", type=Path, help="append one JSON line per result to this file")
    arguments = parser.parse_args()
    check_gpu(parser, "--cuda-graph", arguments.cuda_graph)
    arguments.amp, arguments.savings = "bf16", ",".join(SAVINGS)
    return arguments


def _sizes(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
