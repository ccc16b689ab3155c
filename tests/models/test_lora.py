"""Low-rank factors are trained by SAM like weights, and merged into the weights at the end.

With DoRA magnitudes are trained beside them, and the same holds.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from safer_fast import train_model
from safer_fast.attacks.named import ThreatModel
from safer_fast.config.command_line import parse_config
from safer_fast.data import load_data
from safer_fast.evaluation.accuracy import evaluate
from safer_fast.models import lora
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.lora import Adapters
from safer_fast.models.robust_model import RobustModel
from safer_fast.runs.folder import load_run
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.training.trainer import Trainer
from tests.support.kills import State
from tests.support.networks import build, images_and_labels
from tests.support.small_runs import SMALL
from tests.support.steps import make_step, run_step

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="no peft here")

LAYERS = ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.2.mlp.fc1", "head"]
RANK = 3
KINDS = ["lora", "dora"]


def adapted(
    dtype: torch.dtype = torch.float32, rank: int = RANK, seed: int = 1, kind: str = "lora"
) -> tuple[RobustModel, ParameterArenas, Adapters]:
    """A small model with factors beside some layers."""
    model = build(compute_dtype=dtype)
    arenas = ParameterArenas(model.network, model.layers, dtype)
    layers = {name: model.layers[name] for name in LAYERS}
    masters = arenas if kind == "dora" else None
    return model, arenas, Adapters(model.network, layers, rank, dtype, seed, masters)


def stir(factors: Adapters, seed: int = 0) -> None:
    """Set both factors of every layer to values other than zero, and magnitudes to others."""
    master = factors.arenas.master
    noise = torch.randn(master.shape, generator=torch.Generator().manual_seed(seed))
    for name in factors.arenas.places:
        before, drawn = (factors.arenas.view(name, values) for values in (master, noise))
        before.copy_(before * drawn.exp() if name.endswith("m") else 0.1 * drawn)
    factors.arenas.load_compute()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_computes_the_same_until_the_factors_are_trained(
    dtype: torch.dtype, kind: str
) -> None:
    images, _ = images_and_labels()
    with torch.no_grad():
        model, _, factors = adapted(dtype, kind=kind)
        with factors.away():
            expected = model(images)
        assert torch.equal(model(images), expected)
        stir(factors)
        assert not torch.equal(model(images), expected)
        with factors.away():
            assert torch.equal(model(images), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_compute_what_weights_and_factors_do(kind: str) -> None:
    images, _ = images_and_labels()
    with torch.no_grad():
        model, arenas, factors = adapted(kind=kind)
        stir(factors)
        before = arenas.state_dict()
        expected = model(images)
        factors.merge_into(arenas, arenas.master)
        factors.detach()
        arenas.load_compute()
        assert torch.allclose(model(images), expected, atol=1e-5)
    changed = {name for name, value in arenas.state_dict().items() if (value != before[name]).any()}
    assert changed == {f"{name}.weight" for name in LAYERS}
    names = [name for name, _ in model.network.named_parameters()]
    assert names == [name for name, _ in build().network.named_parameters()]


def test_the_product_is_that_of_the_masters_not_of_what_the_network_reads() -> None:
    _, arenas, factors = adapted(torch.bfloat16)
    stir(factors)
    folded = arenas.master.clone()
    factors.merge_into(arenas, folded)
    parts = factors.arenas.state_dict()
    lower, upper = parts["2.A"].double(), parts["2.B"].double()
    weight = arenas.view("blocks.2.mlp.fc1.weight", folded)
    expected = arenas.view("blocks.2.mlp.fc1.weight", arenas.master).double() + upper @ lower
    assert torch.allclose(weight.double(), expected, atol=1e-6)


def test_the_first_factor_depends_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    first = adapted()[2].arenas.master.clone()
    state = torch.get_rng_state()
    layers = build()
    torch.set_rng_state(state)
    factors = Adapters(
        layers.network, {name: layers.layers[name] for name in LAYERS}, RANK, torch.float32, 1
    )
    assert torch.equal(torch.get_rng_state(), state)  # the run draws what it would have drawn
    assert torch.equal(factors.arenas.master, first)
    assert not torch.equal(adapted(seed=2)[2].arenas.master, first)


def textbook(
    model: RobustModel,
    factors: Mapping[str, nn.Parameter],
    images: Tensor,
    labels: Tensor,
    rho: float,
) -> dict[str, Tensor]:
    """The gradients at w + e over the factors of all layers, by autograd and hand."""
    for _ in range(2):
        for parameter in factors.values():
            parameter.requires_grad_(True)
        loss = nn.functional.cross_entropy(model(images), labels)
        gradients = list(torch.autograd.grad(loss, list(factors.values())))
        for parameter in factors.values():
            parameter.requires_grad_(False)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(factors.values(), gradients, strict=True):
                parameter.add_(gradient, alpha=float(rho / norm))
    return dict(zip(factors, gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_sam_perturbs_the_factors_together_and_learns_from_where_they_are_worst(kind: str) -> None:
    rho, rate = 0.2, 0.1
    images, labels = images_and_labels()
    model = build()
    step, arenas = make_step(model, LAYERS, rho=rho)  # its parts are used, its selection is not
    layers = {name: model.layers[name] for name in LAYERS}
    masters = arenas if kind == "dora" else None
    factors = Adapters(model.network, layers, RANK, torch.float32, 1, masters)
    stir(factors)
    selection = factors.selection()
    before = factors.arenas.master.clone()
    step.attack.steps = 0
    optimizer = torch.optim.SGD([part.master for part in selection.ranges], lr=rate)
    for part in selection.ranges:
        part.master.grad = part.gradient
    fast = type(step)(
        model=model,
        selection=selection,
        optimizer=optimizer,
        objective=step.objective,
        sam=step.sam,
        attack=step.attack,
    )
    assert fast.cut == -1  # the patch embedding has factors, too
    run_step(fast, images, labels)
    after = factors.arenas.state_dict()
    factors.arenas.master.copy_(before)
    factors.arenas.load_compute()
    gradients = textbook(model, factors.arenas.parameters, images, labels, rho)
    starts = factors.arenas.state_dict(before)
    assert set(selection.groups) == set(LAYERS)
    assert len(starts) == len(LAYERS) * (3 if kind == "dora" else 2)
    for name, start in starts.items():
        assert torch.allclose(after[name], start - rate * gradients[name], atol=2e-5), name


FLAGS = [
    *SMALL,
    "--amp=bf16",
    "--selection.lora_rank=4",
    "--selection.fraction=0.2",
    "--optim.learning_rate=1e-2",
    "--checkpoint.every_steps=1",
    "--checkpoint.keep=100",
]


@pytest.fixture(scope="module", params=["lora", pytest.param("dora", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    """The adapters of a run."""
    return str(request.param)


@pytest.fixture(scope="module")
def finished(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that other tests only read."""
    folder = tmp_path_factory.mktemp("runs") / kind
    return train_model(parse_config([*FLAGS, f"--selection.adapter={kind}", f"--output={folder}"]))


@pytest.mark.slow
def test_a_run_moves_the_weights_of_selected_layers_alone_and_loads_in_plain_timm(
    finished: Path, kind: str
) -> None:
    start = load_file(next((finished / "checkpoints").glob("start-*.safetensors")))
    last = load_file(finished / "model.safetensors")
    events = read_metrics(finished / "metrics.jsonl")
    selections = [set(event["selected"]) for event in events if event["event"] == "selection"]
    changed = {name for name in last if not torch.equal(last[name], start[name])}
    assert changed == {f"{name}.weight" for name in set().union(*selections)}
    assert changed
    ranks = [
        torch.linalg.matrix_rank((last[name] - start[name]).flatten(1), rtol=1e-3).item()
        for name in changed
    ]
    # a magnitude for each row makes the change one of any rank
    assert (max(ranks) <= 4 * len(selections)) is (kind == "lora")
    network = timm.create_model(f"local-dir:{finished}", pretrained=True)
    assert set(network.state_dict()) == set(last)


def test_evaluated_is_what_is_exported(finished: Path) -> None:
    logged = [
        event["accuracy"]
        for event in read_metrics(finished / "metrics.jsonl")
        if (event["event"], event.get("attack")) == ("evaluation", "clean")
        and event["weights"] == "last"
    ]
    loaded = load_run(finished)
    data = load_data(loaded.config.data, batch_size=64, seed=loaded.config.seed)
    assert data.test is not None
    results = evaluate(loaded.model, data.test.epoch(1), ["clean"], ThreatModel("linf", 0.1))
    assert [result.accuracy for result in results] == logged


def test_a_killed_run_is_resumed_bit_for_bit(finished: Path, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in sorted((folder / "checkpoints").glob("step-*"))[-2:]:
        path.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"end"' not in line))
    flags = [f"--selection.adapter={kind}", f"--output={folder}", "--resume=must"]
    train_model(parse_config([*FLAGS, *flags]))
    assert State.of(folder).differences(State.of(finished)) == []


@pytest.mark.slow
def test_a_stop_while_layers_are_scored_leaves_weights_and_factors_as_they_were(
    kind: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, f"--selection.adapter={kind}", f"--output={tmp_path / 'run'}"]
    with Trainer(parse_config(flags)) as trainer:
        for epoch in (1, 2, 3):
            trainer.begin_epoch(epoch)
            trainer.end_epoch(epoch, trainer.train_epoch(epoch))
        engine = trainer.engine
        assert engine.adapters is not None
        images = torch.rand(4, 1, 8, 8)
        with torch.no_grad():
            before = engine.arenas.master.clone(), engine.model(images)
        weights = engine.weights()
        assert not torch.equal(weights, before[0])

        def score_and_stop() -> None:
            assert torch.equal(engine.arenas.master, weights)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), engine.folded():
            score_and_stop()
        assert torch.equal(engine.arenas.master, before[0])
        with torch.no_grad():
            assert torch.equal(engine.model(images), before[1])


def test_without_peft_the_flag_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--selection\.lora_rank: expected the package peft"):
        lora.check_adapters()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.ema_decay=0.9"], r"--optim\.ema_decay: expected none with --selection"),
        (["--selection.norms"], r"--selection\.norms: expected none with --selection"),
        (["--selection.lora_rank=-1"], r"--selection\.lora_rank: expected at least 0"),
        (
            ["--selection.adapter=dora", "--selection.lora_rank=0"],
            r"--selection\.adapter: expected --selection\.lora_rank N with dora, got 0",
        ),
        (["--selection.adapter=vera"], r"--selection\.adapter: expected"),
    ],
)
def test_what_factors_cannot_do_is_a_mistake(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(["--selection.lora_rank=4", *flags])


def test_a_network_that_reads_weights_past_their_modules_is_refused() -> None:
    model = build("eva02_tiny_patch14_224")
    images, _ = images_and_labels(1)
    with pytest.raises(ValueError, match=r"called as modules, got blocks\.0\.attn\.qkv"):
        lora.check_called(model, list(model.layers), images)
    model = build("swin_tiny_patch4_window7_224")
    lora.check_called(model, list(model.layers), images)


@pytest.mark.slow
def test_peft_is_imported_only_where_factors_are_trained() -> None:
    program = "import sys, safer_fast.training.trainer; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
