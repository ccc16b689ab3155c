"""The attack in FP8: values, products, what uses them, and the audit that ends it if it is weak."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from safer_fast.attacks import float8, float8_layers, float8_timing
from safer_fast.attacks.audit import AGREEMENT, MOST_PARTS, RATIO, Audit, Part
from safer_fast.attacks.float8 import LowPrecision, check_float8, choose_precision, fitting
from safer_fast.attacks.float8_layers import (
    FORWARD,
    Float8Linear,
    Float8Mlp,
    Form,
    multiply,
)
from safer_fast.attacks.float8_timing import FORMS, Product, best_form, choose_measured
from safer_fast.attacks.pgd import frozen, pixel_gradient, random_start
from safer_fast.attacks.replayed import ReplayedAttack
from safer_fast.config.command_line import parse_config
from safer_fast.config.schema import AttackConfig, ObjectiveConfig
from safer_fast.kernels.float8 import quantise
from safer_fast.models.arenas import ParameterArenas
from safer_fast.models.families import STEM
from safer_fast.models.robust_model import RobustModel, compile_blocks
from safer_fast.runs.loggers.metrics_file import read_metrics
from safer_fast.runs.resume import find_run
from safer_fast.runtime.cuda_graphs import CudaRecorder, Replays
from safer_fast.runtime.ranks import Ranks, connected
from safer_fast.training.objectives import Objective
from safer_fast.training.trainer import Trainer
from tests.support.cases import named
from tests.support.networks import build, images_and_labels
from tests.support.ranks import FLAGS, together, write_digits
from tests.support.small_runs import SMALL, run

EPSILON, STEP_SIZE = torch.tensor(0.1), torch.tensor(0.04)
LARGEST = torch.finfo(FORWARD).max


def needs_gpu(test: Callable[..., Any]) -> Any:
    """Marks a test that only a GPU with FP8 units can run."""
    has_float8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    skip = pytest.mark.skipif(not has_float8, reason="no CUDA device with FP8")
    return pytest.mark.gpu(skip(test))


HALF_A_STEP = 2.0**-4  # of e4m3's three bits of mantissa, relative


def bf16_model() -> RobustModel:
    """A small ViT whose matrices are bf16, as in training."""
    model = build(compute_dtype=torch.bfloat16)
    model.enable_savings(("patch-order", "class-token"), 32)
    ParameterArenas(model.network, model.layers, torch.bfloat16)
    return model


# -- values


def rows(kind: str, shape: tuple[int, int]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if kind == "outlier":
        x[0, 0] = 1e4
    elif kind == "zero row":
        x[0] = 0
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "huge":
        x *= 1e30
    elif kind == "one value":
        x[:] = -3.0
    return x


def test_values_are_within_half_a_step_of_the_format() -> None:
    kinds = ["normal", "outlier", "zero row", "tiny", "huge", "one value"]
    shapes = [(1, 16), (1, 1), (7, 33), (64, 48), (0, 16)]
    for row in itertools.product(kinds, shapes, [torch.float32, torch.bfloat16]):
        with named(*row):
            assert_within_half_a_step(*row)


def assert_within_half_a_step(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if kind in ("outlier", "zero row") and not shape[0]:
        return
    x = rows(kind, shape).to(dtype)
    values, scales = quantise(x, FORWARD)
    assert (values.dtype, scales.dtype) == (FORWARD, torch.float32)
    assert scales.shape == (shape[0], 1)
    back, exact = values.double() * scales.double(), x.double()
    # below the least normal number steps are as long as there
    error = HALF_A_STEP * torch.maximum(exact.abs(), scales.double() * 2.0**-6)
    assert ((back - exact).abs() <= error * (1 + 1e-6)).all()
    if kind not in ("zero row",) and len(x):
        torch.testing.assert_close(values.float().abs().amax(1), torch.full(shape[:1], LARGEST))
    torch.testing.assert_close(back.abs().amax(1), exact.abs().amax(1), rtol=1e-6, atol=0)


def test_zeros_stay_zeros() -> None:
    values, scales = quantise(torch.zeros(3, 16), FORWARD)
    assert (values.float() == 0).all()
    assert torch.isfinite(scales).all()
    product = multiply(values, scales, values, scales)
    assert (product == 0).all()


@pytest.mark.parametrize("lost", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_lost_is_lost_for_its_row_alone(lost: float) -> None:
    x = torch.randn(3, 16)
    x[1, 5] = lost
    values, scales = quantise(x, FORWARD)
    other, other_scales = quantise(torch.randn(32, 16), FORWARD)
    product = multiply(values, scales, other, other_scales)
    assert product[1].isnan().all()
    assert product[[0, 2]].isfinite().all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (5, 48, 32), (64, 32, 144)])
def test_a_product_is_that_of_its_values(m: int, n: int, k: int, has_bias: bool) -> None:
    left, right, bias, exact = factors(m, n, k, has_bias)
    product = multiply(*left, *right, bias)
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.double(), exact, rtol=2.0**-8, atol=1e-5)
    rescaled = multiply(*left, *right, bias, "rescaled")
    assert rescaled.dtype == torch.bfloat16
    # rounded before the scales and the bias, too: half a step of what is largest
    largest = exact.abs().amax() + (0 if bias is None else bias.abs().amax())
    torch.testing.assert_close(rescaled.double(), exact, rtol=2.0**-8, atol=2.0**-8 * largest)
    unscaled = (left[0].double() @ right[0].double().t()).bfloat16().double()
    wanted = unscaled * left[1] * right[1].t() + (0 if bias is None else bias)
    torch.testing.assert_close(rescaled.double(), wanted, rtol=2.0**-8, atol=1e-6)


@pytest.mark.skipif(
    torch.__version__ < "2.14", reason="this PyTorch has one scale a tensor on a CPU"
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (5, 48, 32), (64, 32, 144)])
def test_a_product_as_the_gpu_is_asked_for_it(m: int, n: int, k: int, has_bias: bool) -> None:
    left, right, bias, exact = factors(m, n, k, has_bias)
    rest = {"scale_a": left[1], "scale_b": right[1].t(), "bias": bias}
    product = torch._scaled_mm(left[0], right[0].t(), **rest, out_dtype=torch.bfloat16)
    torch.testing.assert_close(product.double(), exact, rtol=2.0**-7, atol=1e-2)


def factors(m: int, n: int, k: int, has_bias: bool) -> tuple[Any, Any, Tensor | None, Tensor]:
    """Quantised [m, k] and [n, k] with their scales, a bias [n], and what they give in fp64."""
    generator = torch.Generator().manual_seed(m)
    left = quantise(torch.randn(m, k, generator=generator), FORWARD)
    right = quantise(torch.randn(n, k, generator=generator), FORWARD)
    bias = torch.randn(n, generator=generator).bfloat16() if has_bias else None
    exact = (left[0].double() * left[1]) @ (right[0].double() * right[1]).t()
    if bias is not None:
        exact += bias
    return left, right, bias, exact


@needs_gpu
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (65, 48, 32), (4096, 1024, 1024)])
def test_a_gpu_quantises_and_multiplies_as_the_simulation_does(m: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(m)
    pairs = [torch.randn(size, k, generator=generator).bfloat16() for size in (m, n)]
    simulated = [quantise(x, FORWARD) for x in pairs]
    compiled: Callable[..., Any] = torch.compile(quantise)
    for quantised in (quantise, compiled):
        on_gpu = [quantised(x.cuda(), FORWARD) for x in pairs]
        for (values, scales), (own_values, own_scales) in zip(on_gpu, simulated, strict=True):
            torch.testing.assert_close(scales.cpu(), own_scales, rtol=1e-6, atol=0)
            differing = (values.cpu().float() != own_values.float()).float().mean()
            assert differing < 1e-3  # quotients that lie between two values, rounded otherwise
    for bias in (None, torch.randn(n, generator=generator)):
        product = multiply(*on_gpu[0], *on_gpu[1], None if bias is None else bias.cuda())
        wanted = multiply(*simulated[0], *simulated[1], bias)
        torch.testing.assert_close(product.cpu().float(), wanted.float(), rtol=2.0**-6, atol=0.1)


def test_the_largest_of_a_row_needs_no_clamp() -> None:
    """Every mantissa, in binades from the least scale to the greatest: powers of two are exact."""
    mantissas = torch.arange(2**23, dtype=torch.int32)
    for exponent in (8, 127, 254):  # of 2^-119, where scales are clamped, of 1, of 2^127
        x = (mantissas + (exponent << 23)).view(torch.float32).view(-1, 1)
        values, scales = quantise(x, FORWARD)
        assert (values.float() == LARGEST).all() or exponent == 8
        assert (values.float() <= LARGEST).all()
        assert not values.float().isnan().any()
        largest = x * scales.reciprocal()
        assert (largest <= LARGEST * (1 + 2.0**-21)).all()
        assert (largest.flip(0).to(FORWARD).float() <= LARGEST).all()


# -- layers


def a_layer(bias: bool = True) -> tuple[Float8Linear, nn.Linear, LowPrecision]:
    """A linear layer made one of FP8, the same as it was, and what switches it."""
    torch.manual_seed(0)
    plain = nn.Linear(32, 48, bias=bias).to(torch.bfloat16).requires_grad_(False)
    own = nn.Linear(32, 48, bias=bias).to(torch.bfloat16).requires_grad_(False)
    own.load_state_dict(plain.state_dict())
    weights = LowPrecision(build(), [])
    weights.layers["own"] = Float8Linear.adopt(own, weights)
    return weights.layers["own"], plain, weights


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_as_it_was_where_fp8_is_off_and_near_where_it_is_on(bias: bool) -> None:
    layer, plain, weights = a_layer(bias)
    x = torch.randn(4, 7, 32).bfloat16().requires_grad_()
    assert torch.equal(layer(x), plain(x))
    with weights.used():
        product = layer(x)
    exact = functional.linear(
        x.double(), plain.weight.double(), plain.bias.double() if bias else None
    )
    assert product.dtype == torch.bfloat16
    assert (product.double() - exact).norm() / exact.norm() < 0.05
    slope = torch.randn_like(product)
    (gradient,) = torch.autograd.grad(product, x, slope)
    wanted = slope.double() @ plain.weight.double()
    assert gradient.dtype == x.dtype
    assert (gradient.double() - wanted).norm() / wanted.norm() < 0.05
    assert torch.equal(layer(x), plain(x))


class Kept:
    """The shapes of tensors that are kept for a backward pass."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def keep(self, tensor: Tensor) -> Tensor:
        self.shapes.append(tuple(tensor.shape))
        return tensor


def test_nothing_of_the_input_is_kept_for_the_backward_pass() -> None:
    layer, _, weights = a_layer()
    kept = Kept()
    x = torch.randn(4, 32).bfloat16().requires_grad_()
    with weights.used(), torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        layer(x).sum()
    assert set(kept.shapes) <= {(32, 48), (32, 1)}


def test_an_mlp_joins_quantising_to_gelu_and_is_near_its_layers_in_turn() -> None:
    model = bf16_model()
    weights = LowPrecision(model, fitting(model), ["blocks.0.mlp.fc1", "blocks.1.mlp.fc2"])
    for number in (0, 1, 2):  # the last block computes class tokens alone
        mlp: Any = model.network.blocks[number].mlp
        assert isinstance(mlp, Float8Mlp)
        plain = type(mlp).__mro__[2]
        x = torch.randn(4, 17, 48).bfloat16().requires_grad_()
        slope = torch.randn(4, 17, 48).bfloat16()
        assert torch.equal(mlp(x), plain.forward(mlp, x))
        kept = Kept()
        with frozen(model), weights.used():
            with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
                product = mlp(x)
            in_turn = plain.forward(mlp, x)
            gradients = [torch.autograd.grad(y, x, slope)[0] for y in (product, in_turn)]
        assert product.dtype == torch.bfloat16
        assert gradients[0].dtype == x.dtype
        for own, other in ((product, in_turn), gradients):
            assert (own.double() - other.double()).norm() < 0.03 * other.double().norm()
        # of all that enters, what enters GELU alone
        assert [shape for shape in kept.shapes if shape[0] == 4 * 17] == [(4 * 17, 192)]
    assert type(model.network.blocks[3].mlp).__mro__[0].__name__ == "Mlp"


def test_an_mlp_of_which_one_layer_is_in_fp8_stays_as_it_is() -> None:
    model = bf16_model()
    LowPrecision(model, [name for name in fitting(model) if not name.endswith("fc2")])
    assert not any(isinstance(module, Float8Mlp) for module in model.modules())
    model = bf16_model()
    model.network.blocks[0].mlp.act = nn.GELU("tanh")
    LowPrecision(model, fitting(model))
    assert not isinstance(model.network.blocks[0].mlp, Float8Mlp)
    assert isinstance(model.network.blocks[1].mlp, Float8Mlp)


def test_only_layers_that_move_are_quantised_again() -> None:
    model = bf16_model()
    weights = LowPrecision(model, fitting(model))
    first, second = list(weights.layers)[:2]
    weights.move([first])
    weights.refresh()
    before = {name: layer.rows.float() for name, layer in weights.layers.items()}
    with torch.no_grad():
        for name in (first, second):
            weights.layers[name].weight.mul_(-1)
    weights.refresh()
    assert torch.equal(weights.layers[first].rows.float(), -before[first])
    assert torch.equal(weights.layers[second].rows.float(), before[second])
    weights.move([second])
    weights.refresh()
    assert torch.equal(weights.layers[second].rows.float(), -before[second])
    with torch.no_grad():
        weights.layers[first].weight.mul_(-1)
    weights.move(None)
    weights.refresh()
    with torch.no_grad():
        weights.layers[first].weight.mul_(-1)
    weights.refresh()
    assert torch.equal(weights.layers[first].rows.float(), -before[first])


def test_large_matrices_of_blocks_are_chosen_and_checkpoints_know_nothing_of_them() -> None:
    model = bf16_model()
    known = set(model.network.state_dict())
    weights = LowPrecision(model, fitting(model, 48 * 100))
    # the last block computes class tokens alone; projections have 48 * 48 elements
    wanted = {f"blocks.{i}.{part}" for i in range(3) for part in ("attn.qkv", "mlp.fc1", "mlp.fc2")}
    assert set(weights.layers) == wanted
    assert set(model.network.state_dict()) == known
    assert fitting(build(), 10**9) == []


# -- the attack


def attack_on(model: RobustModel, weights: LowPrecision | None) -> ReplayedAttack:
    attack = ReplayedAttack(model, steps=4, precision=weights)
    attack.draw = lambda images, epsilon, norm: random_start(
        images, epsilon, norm, torch.Generator().manual_seed(5)
    )
    return attack


def test_most_signs_agree_and_the_loss_is_as_high() -> None:
    model = bf16_model()
    images, labels = images_and_labels(64)
    attack = attack_on(model, LowPrecision(model, fitting(model)))
    Audit(attack, AttackConfig(audit_images=64))(0, images, labels, EPSILON, STEP_SIZE)
    assert 0.9 < attack.audited[AGREEMENT] < 1
    assert 0.97 < attack.audited[RATIO] < 1.03
    adversarial = attack(images, labels, EPSILON, STEP_SIZE)
    assert (adversarial - model.arrange(images)).abs().max() <= EPSILON + 1e-6
    plain = attack_on(model, None)(images, labels, EPSILON, STEP_SIZE)
    assert not torch.equal(adversarial, plain)


def test_all_but_the_attack_computes_as_before() -> None:
    model = bf16_model()
    images, labels = images_and_labels()
    loss = partial(functional.cross_entropy, reduction="sum")
    with frozen(model):
        logits, gradient = model(images), pixel_gradient(model, images, labels, loss)
    attack = attack_on(model, LowPrecision(model, fitting(model)))
    attack(images, labels, EPSILON, STEP_SIZE)
    with frozen(model):
        assert torch.equal(model(images), logits)
        assert torch.equal(pixel_gradient(model, images, labels, loss), gradient)


def test_a_switch_is_off_again_after_an_exception() -> None:
    model = bf16_model()
    weights = LowPrecision(model, fitting(model))
    with pytest.raises(RuntimeError), weights.used():
        raise RuntimeError
    assert not weights.is_on


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_attack_is_that_of_eager_code() -> None:
    images, labels = images_and_labels(16)
    gradients = []
    for is_compiled in (False, True):
        model = bf16_model()
        weights = LowPrecision(model, fitting(model))
        if is_compiled:
            compile_blocks(model)
        loss = partial(functional.cross_entropy, reduction="sum")
        with frozen(model), weights.used():
            gradients.append(pixel_gradient(model, model.arrange(images), labels, loss))
        with frozen(model):  # the same blocks, compiled again for bf16
            gradients.append(pixel_gradient(model, model.arrange(images), labels, loss))
    eager, eager_bf16, compiled, compiled_bf16 = gradients
    alike = (eager.sign() == compiled.sign()).float().mean()
    assert alike > 0.9
    assert (eager_bf16.sign() == compiled_bf16.sign()).float().mean() > alike


@needs_gpu
@pytest.mark.parametrize("mode", ["eager", "compiled", "captured"])
def test_an_attack_on_a_gpu_is_near_the_simulated_one(mode: str) -> None:
    images, labels = images_and_labels(64)
    model = bf16_model()
    simulated = attack_on(model, LowPrecision(model, fitting(model)))
    simulated.draw = lambda images, epsilon, norm: images
    wanted = simulated(images, labels, EPSILON, STEP_SIZE).clone()
    model = build(compute_dtype=torch.bfloat16)
    model.enable_savings(("patch-order", "class-token"), 32)
    model.cuda()
    ParameterArenas(model.network, model.layers, torch.bfloat16)
    weights = LowPrecision(model, fitting(model))
    if mode != "eager":
        compile_blocks(model)
    attack = attack_on(model, weights)
    if mode == "captured":
        attack.replays = Replays(CudaRecorder(torch.device("cuda")))
    attack.draw = simulated.draw
    arguments = [value.cuda() for value in (images, labels, EPSILON, STEP_SIZE)]
    for _ in range(3):
        adversarial = attack(*arguments).clone()
    again = attack(*arguments)
    assert torch.equal(adversarial, again)
    assert bool(attack.replays.recorded) == (mode == "captured")
    moved = adversarial.cpu() - model.arrange(images.cuda()).cpu()
    assert (moved.sign() == (wanted - model.cpu().arrange(images)).sign()).float().mean() > 0.9


def test_features_are_narrow_as_long_as_fp8_is_used() -> None:
    model = bf16_model()
    weights = LowPrecision(model, fitting(model))
    images, _ = images_and_labels(2)
    before = model.block(model.prefix(images, STEM), STEM)
    assert before.dtype == torch.float32
    with weights.used():
        features = model.block(model.prefix(images, STEM), STEM)
        assert torch.equal(features, before.bfloat16())
        assert torch.equal(model.prefix(images, 0), features)
        for index in range(model.num_blocks):
            features = model.block(features, index)
            assert features.dtype == torch.bfloat16
        assert model(images).dtype == torch.float32
    assert torch.equal(model.block(model.prefix(images, STEM), STEM), before)


# -- the audit


def spoiled(left: Tensor, _: Tensor, right: Tensor, *rest: Any, **named: Any) -> Tensor:
    """A product that has nothing to do with its factors."""
    generator = torch.Generator().manual_seed(left.shape[0])
    return torch.randn(len(left), len(right), generator=generator).bfloat16()


@pytest.mark.slow
def test_a_weak_attack_ends_the_use_of_fp8_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = bf16_model()
    images, labels = images_and_labels(32)
    attack = attack_on(model, LowPrecision(model, fitting(model)))
    said: list[str] = []
    config = AttackConfig(audit_every=2, precision="fp8")
    audit = Audit(attack, config, report=said.append)
    monkeypatch.setattr(float8_layers, "multiply", spoiled)
    audit(1, images, labels, EPSILON, STEP_SIZE)
    assert not attack.audited
    audit(2, images, labels, EPSILON, STEP_SIZE)
    assert attack.audited[RATIO] < 0.98
    assert attack.precision is None
    audit(4, images, labels, EPSILON, STEP_SIZE)
    assert len(said) == 1
    assert said[0].startswith("attack.precision: amp from step 2 on (after the attack in fp8 the ")
    adversarial = attack(images, labels, EPSILON, STEP_SIZE)
    wanted = attack_on(model, None)(images, labels, EPSILON, STEP_SIZE)
    assert torch.equal(adversarial, wanted)


def test_an_audit_that_finds_enough_changes_nothing() -> None:
    model = bf16_model()
    images, labels = images_and_labels(32)
    attack = attack_on(model, LowPrecision(model, fitting(model)))
    state, trades = torch.get_rng_state(), Objective(ObjectiveConfig(name="trades")).attack_loss
    Audit(attack, AttackConfig(audit_ratio=0.5))(0, images, labels, EPSILON, STEP_SIZE, trades)
    assert attack.precision is not None
    assert torch.equal(torch.get_rng_state(), state)
    attack.steps = 0
    attack.audited = {}
    Audit(attack, AttackConfig())(0, images, labels, EPSILON, STEP_SIZE)
    assert not attack.audited


@pytest.mark.parametrize(
    ("ratios", "num_parts", "is_weak"),
    [
        ([1.01], 1, False),
        ([0.9, 1.01, 1.02, 1.02, 1.0], 4, False),  # 0.98 for the first time after four
        ([0.9, 1.07, 0.5], 2, False),
        ([0.97] * 20, MOST_PARTS, True),
        ([0.9] + [0.98] * 20, MOST_PARTS, True),
        ([float("nan")] * 20, MOST_PARTS, True),
    ],
)
def test_a_low_ratio_is_looked_at_again_before_it_counts(
    monkeypatch: pytest.MonkeyPatch, ratios: list[float], num_parts: int, is_weak: bool
) -> None:
    model = bf16_model()
    images, labels = images_and_labels(24)
    attack = attack_on(model, LowPrecision(model, fitting(model)))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def measure(_: Audit, part: Part, *radii: object) -> Tensor:
        seen.append((part.start, part.images, part.labels))
        return torch.tensor([5, 10, 2 * ratios[len(seen) - 1], 2], dtype=torch.float64)

    monkeypatch.setattr(Audit, "_agreement", measure)
    Audit(attack, AttackConfig(audit_images=10))(0, images, labels, EPSILON, STEP_SIZE)
    assert len(seen) == num_parts
    assert attack.audited[AGREEMENT] == 0.5
    wanted = sum(ratios[:num_parts]) / num_parts
    assert attack.audited[RATIO] == pytest.approx(wanted, nan_ok=True)
    assert (attack.precision is None) == is_weak
    for number, (start, part, of_part) in enumerate(seen):
        chosen = slice(number % 3 * 10, number % 3 * 10 + 10)
        assert torch.equal(part, images[chosen])
        assert torch.equal(of_part, labels[chosen])
        assert 0.5 * EPSILON < (start - part).abs().max() <= EPSILON + 1e-6
    noises = [start - part for start, part, _ in seen]
    for first, second in itertools.combinations(noises, 2):
        assert len(first) != len(second) or not torch.equal(first, second)


# -- runs

IN_BF16 = ("--amp=bf16", "--attack.precision=bf16", "--attack.audit_every=3")
IN_FP8 = ("--amp=bf16", "--attack.precision=fp8", "--attack.fp8_from=0", "--attack.audit_every=3")


@pytest.mark.slow
def test_a_run_in_fp8_says_what_its_audits_found(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *IN_FP8, "--optim.ema_decay=0.9")
    events = read_metrics(folder / "metrics.jsonl")
    assert any("simulated" in note for note in events[0]["notes"])
    steps = [event for event in events if event["event"] == "step"]
    audited = [event for event in steps if AGREEMENT in event]
    assert audited
    assert all(0.5 < event[AGREEMENT] <= 1 and 0.5 < event[RATIO] < 2 for event in audited)


@pytest.mark.slow
@pytest.mark.parametrize("precise", [IN_BF16, IN_FP8], ids=["bf16", "fp8"])
def test_a_cheaper_attack_is_repeated_and_goes_on_bit_for_bit(
    tmp_path: Path, precise: tuple[str, ...]
) -> None:
    precise = (*precise, "--evaluation.sentinel_images=0")
    whole = run(tmp_path / "whole", *precise)
    flags = [*SMALL, *precise, f"--output={tmp_path / 'run'}", "--resume=auto"]
    config = parse_config(flags)
    with Trainer(config) as trainer:
        for epoch in trainer.epochs():
            if epoch == 4:
                break
            trainer.begin_epoch(epoch)
            trainer.end_epoch(epoch, trainer.train_epoch(epoch))
        trainer.stop("a test")
    from safer_fast import train_model

    train_model(config)
    for name in ("model.safetensors", "best.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    figures = [
        [
            (event["step"], event["loss"], event.get(AGREEMENT), event.get(RATIO))
            for event in read_metrics(folder / "metrics.jsonl")
            if event["event"] == "step"
        ]
        for folder in (whole, tmp_path / "run")
    ]
    assert figures[0] == figures[1]


def test_a_run_that_fell_back_stays_so_when_it_goes_on(tmp_path: Path) -> None:
    flags = [*SMALL, *IN_FP8, f"--output={tmp_path / 'run'}", "--resume=auto"]
    config = parse_config(flags)
    with Trainer(config) as trainer:
        trainer.begin_epoch(1)
        trainer.end_epoch(1, trainer.train_epoch(1))
        trainer.engine.audit.load_state_dict({AGREEMENT: 0.9, RATIO: 0.5})
        trainer.begin_epoch(2)
        trainer.train_epoch(2)
        trainer.stop("a test")
    ranks = Ranks()
    with Trainer(config, ranks, find_run(config, ranks)) as trainer:
        assert trainer.engine.attack.precision is None
        assert trainer.engine.attack.audited == {AGREEMENT: 0.9, RATIO: 0.5}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("peft") is None, reason="no peft here")
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_run_of_factors_in_fp8_multiplies_with_the_weights_that_they_were_merged_into(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh = LowPrecision.refresh
    num_copies: list[int] = []

    def checked(weights: LowPrecision) -> None:
        refresh(weights)
        for layer in weights.layers.values():
            values, scales = quantise(layer.weight, FORWARD)
            assert torch.equal(layer.rows.float(), values.float())
            assert torch.equal(layer.row_scales, scales)
        num_copies.append(len(weights.layers))

    monkeypatch.setattr(LowPrecision, "refresh", checked)
    factors = (
        f"--selection.adapter={adapter}",
        "--selection.lora_rank=4",
        "--selection.fraction=0.2",
        "--optim.learning_rate=1e-2",
    )
    folder = run(tmp_path / "run", *IN_FP8, "--evaluation.sentinel_images=0", *factors)
    events = read_metrics(folder / "metrics.jsonl")
    assert [event["event"] for event in events].count("selection") == 2
    assert num_copies
    assert set(num_copies) == {16}  # of 4 blocks
    audited = [event[RATIO] for event in events if RATIO in event]
    assert audited
    assert all(0.5 < ratio < 2 for ratio in audited)


# -- several ranks


@dataclass
class Audited:
    """Figures and weights after a rank's first step in FP8."""

    figures: dict[str, float]
    is_in_float8: bool
    weights: dict[str, Tensor]


def audited_step(flags: list[str], weak_rank: int | None) -> Audited:
    """The first step of a run; on one rank, products may have nothing to do with their factors."""
    if weak_rank == int(os.environ["RANK"]):
        float8_layers.multiply = spoiled
    with connected(wants_gpu=False) as ranks, Trainer(parse_config(flags), ranks) as trainer:
        trainer.begin_epoch(1)
        batch = next(trainer.data.train.epoch(1))
        trainer.take_step(1, 0, len(trainer.data.train), batch)
        attack = trainer.engine.attack
        return Audited(attack.audited, attack.precision is not None, trainer.arenas.state_dict())


RANKS = [
    *FLAGS,
    *IN_FP8,
    "--selection.warmup_epochs=0",
    "--attack.clean_epochs=0",
    "--attack.epsilon_warmup_epochs=0",
    "--optim.name=sgd",
    "--optim.learning_rate=0.05",
]


BETWEEN = 0.9985
"""Ratios in this step: 0.99996 with FP8, 0.997 where one of two ranks attacks at random."""


def test_two_ranks_find_in_their_audit_what_one_finds(tmp_path: Path) -> None:
    flags = [*RANKS, f"--data.path={write_digits(tmp_path / 'digits.npz')}"]
    (alone,) = together(1, audited_step, [*flags, f"--output={tmp_path / '1'}"], None)
    first, second = together(2, audited_step, [*flags, f"--output={tmp_path / '2'}"], None)
    assert first.figures == second.figures
    assert first.figures == pytest.approx(alone.figures, abs=0.02)
    assert first.figures[RATIO] > BETWEEN
    assert alone.is_in_float8
    assert first.is_in_float8
    assert second.is_in_float8
    for name, weight in alone.weights.items():
        torch.testing.assert_close(first.weights[name], weight, rtol=0, atol=2e-3)
        assert torch.equal(first.weights[name], second.weights[name])


def test_an_attack_that_is_weak_on_one_rank_ends_the_use_of_fp8_on_all(tmp_path: Path) -> None:
    flags = [*RANKS, f"--data.path={write_digits(tmp_path / 'digits.npz')}"]
    # of two sums, one is of an attack that goes anywhere
    flags += [f"--output={tmp_path / 'run'}", f"--attack.audit_ratio={BETWEEN}"]
    ranks = together(2, audited_step, flags, 1)
    assert ranks[0].figures == ranks[1].figures
    assert not any(seen.is_in_float8 for seen in ranks)
    for name, weight in ranks[0].weights.items():
        assert torch.equal(weight, ranks[1].weights[name])


# -- where it cannot be had


def test_a_gpu_without_fp8_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    message = r"^--attack\.precision: expected amp [^\n]+, got fp8 on NVIDIA A100 \(8\.0\)$"
    with pytest.raises(ValueError, match=message):
        check_float8(torch.device("cuda"))
    check_float8(torch.device("cpu"))


@needs_gpu
def test_a_gpu_with_fp8_is_taken() -> None:
    check_float8(torch.device("cuda"))


def test_a_gpu_whose_products_torch_lacks_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX PRO 5000")
    asked: list[tuple[Tensor, ...]] = []

    def refuse(*factors: Tensor) -> Tensor:
        asked.append(factors)
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nwhen calling\n")

    monkeypatch.setattr(float8, "multiply", refuse)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.full(size, 1.0))
    message = r"^--attack\.precision: expected amp [^\n]+ 5000 \(CUDA error: CUBLAS\w+\)$"
    with pytest.raises(ValueError, match=message):
        check_float8(torch.device("cuda"))
    ((left, left_scales, right, right_scales, bias),) = asked
    assert left.dtype == right.dtype == FORWARD
    assert left_scales.shape == right_scales.shape == (len(left), 1)
    assert bias.shape == (len(right),)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attack.precision=fp8"], "--attack.precision: expected amp with --amp off, got fp8"),
        (["--attack.precision=bf16"], "--attack.precision: expected amp with --amp off, got bf16"),
        (["--attack.audit_every=0"], "--attack.audit_every: expected at least 1, got 0"),
        (["--attack.audit_ratio=2"], "--attack.audit_ratio: expected a share from 0 to 1, got 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(parse_config(flags))


# -- which matrices


def timed(monkeypatch: pytest.MonkeyPatch, least_outputs: int) -> list[Product]:
    """Matrices of so many outputs or more gain, the others lose; the calls that are made."""
    calls: list[Product] = []

    def measure(product: Product, *_: Any) -> dict[Form, float]:
        calls.append(product)
        speed = 1.3 if product.outputs >= least_outputs else 0.9
        return {"rows": speed, "rescaled": 0.8 if product.inputs < 100 else 1.2}

    monkeypatch.setattr(float8_timing, "measure", measure)
    return calls


def test_matrices_that_are_not_faster_stay_as_they_are_and_each_shape_is_timed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, file = timed(monkeypatch, 150), tmp_path / "cache.json"
    first, again = (choose_measured(bf16_model(), 32, 6, False, file) for _ in range(2))
    num_tokens = (32 // 8) ** 2 + 1
    assert calls == [
        Product(6 * num_tokens, 48, 48),
        Product(6 * num_tokens, 48, 144),
        Product(6 * num_tokens, 48, 192),
        Product(6 * num_tokens, 192, 48),
    ]
    assert first == again
    assert {name.rpartition("mlp.")[2] for name in first.names} == {"fc1", "fc2"}
    assert {name.rpartition("mlp.")[2] for name in first.rescaled} == {"fc2"}
    speeds = {"48 x 48": 0.9, "144 x 48": 0.9, "192 x 48": 1.3, "48 x 192 rescaled": 1.2}
    assert first.speeds == speeds
    assert str(first).startswith(f"attack in FP8 ({len(first.names)} matrices, 48 x 48 0.90, ")
    choose_measured(bf16_model(), 32, 7, False, file)
    choose_measured(bf16_model(), 32, 7, True, file)
    assert len(calls) == 12


def test_where_nothing_is_faster_the_times_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8_timing, "measure", lambda *_: dict.fromkeys(FORMS, 0.9))
    choice = choose_measured(bf16_model(), 32, 6, False, tmp_path / "cache.json")
    assert choice.names == []
    assert choice.why_none().startswith("no matrix of a block is faster: 48 x 48 0.90, ")


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_product_is_timed_in_both_precisions(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8_timing, "SECONDS", 0.01)
    before = torch.get_rng_state()
    speeds = float8_timing.measure(Product(64, 48, 96), torch.device("cpu"), is_compiled)
    assert tuple(speeds) == FORMS
    assert all(0.001 < speed < 1000 for speed in speeds.values())
    assert torch.equal(torch.get_rng_state(), before)  # what follows draws as ever


@needs_gpu
def test_a_gpu_multiplies_large_matrices_faster_in_fp8() -> None:
    product = Product(2**15, 1024, 4096)
    speeds = float8_timing.measure(product, torch.device("cuda"), is_compiled=True)
    assert best_form(speeds)[1] > 1


def test_another_form_must_be_faster_by_a_margin() -> None:
    assert best_form({"rows": 1.0, "rescaled": 1.04}) == ("rows", 1.0)
    assert best_form({"rows": 1.0, "rescaled": 1.06}) == ("rescaled", 1.06)


def test_a_run_that_goes_on_keeps_the_layers_that_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*SMALL, "--amp=bf16", "--attack.precision=fp8", f"--output={tmp_path / 'run'}"]
    config, ranks = parse_config([*flags, "--resume=auto"]), Ranks()
    monkeypatch.setattr("safer_fast.training.engine.PAYS_FROM", 0)
    with Trainer(config) as trainer:
        first = trainer.engine.float8
        assert first is not None
        assert first.names == list(trainer.engine.attack.precision.layers)
        trainer.begin_epoch(1)
        trainer.train_epoch(1)
        trainer.stop("a test")
    monkeypatch.setattr("safer_fast.training.engine.PAYS_FROM", 10**9)
    with Trainer(config, ranks, find_run(config, ranks)) as trainer:
        assert trainer.engine.float8 == first


def test_a_model_without_large_matrices_is_attacked_in_bf16(tmp_path: Path) -> None:
    flags = [*SMALL, "--amp=bf16", "--attack.precision=fp8", f"--output={tmp_path / 'run'}"]
    with Trainer(parse_config(flags)) as trainer:
        precision = trainer.engine.attack.precision
        assert precision is not None
        assert not precision.layers
        assert any("attack in FP8: off, in bf16" in note for note in trainer.engine.notes)


# -- features in bf16 alone


@pytest.mark.slow
def test_an_attack_in_bf16_is_nearly_that_in_amp(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *IN_BF16)
    events = read_metrics(folder / "metrics.jsonl")
    assert "attack in bf16 (audited every 3 steps)" in events[0]["speed"]
    assert not any("FP8" in note for note in events[0]["notes"])
    audited = [event for event in events if event["event"] == "step" and AGREEMENT in event]
    assert audited
    assert all(0.97 < event[AGREEMENT] <= 1 for event in audited)
    assert all(event[RATIO] == pytest.approx(1, abs=0.02) for event in audited)


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "num_blocks", "was_amp", "chosen"),
    [
        ("auto", "cuda", torch.bfloat16, 4, False, "bf16"),
        ("auto", "cuda", torch.bfloat16, 4, True, "amp"),
        ("auto", "cuda", torch.bfloat16, 0, False, "amp"),  # features are inside the network
        ("auto", "cuda", torch.float32, 4, False, "amp"),
        ("auto", "cpu", torch.bfloat16, 4, False, "amp"),
        ("amp", "cuda", torch.bfloat16, 4, False, "amp"),
        ("bf16", "cpu", torch.bfloat16, 4, True, "bf16"),
        ("fp8", "cuda", torch.bfloat16, 4, True, "fp8"),
    ],
)
def test_auto_is_bf16_on_a_gpu_alone(
    wanted: Any, device: str, dtype: torch.dtype, num_blocks: int, was_amp: bool, chosen: str
) -> None:
    mean = SimpleNamespace(device=torch.device(device))
    model: Any = SimpleNamespace(mean=mean, compute_dtype=dtype, num_blocks=num_blocks)
    assert choose_precision(wanted, model, was_amp) == chosen


def test_a_run_of_auto_on_a_cpu_is_that_of_amp_and_resumes_one(tmp_path: Path) -> None:
    flags = [*SMALL, "--amp=bf16", f"--output={tmp_path / 'run'}"]
    with Trainer(parse_config([*flags, "--attack.precision=amp"])) as trainer:
        trainer.begin_epoch(1)
        trainer.train_epoch(1)
        trainer.stop("a test")
    config, ranks = parse_config([*flags, "--resume=must"]), Ranks()
    assert config.attack.precision == "auto"
    found = find_run(config, ranks)
    with Trainer(config, ranks, found) as trainer:
        assert trainer.engine.precision == "amp"
        assert trainer.engine.attack.precision is None
        assert not [note for note in trainer.engine.notes if "precision" in note]
    refused = parse_config([*flags, "--resume=must", "--attack.precision=bf16"])
    with pytest.raises(ValueError, match=r"attack\.precision amp, not bf16"):
        Trainer(refused, ranks, find_run(refused, ranks))


def test_only_the_attack_is_in_bf16(tmp_path: Path) -> None:
    """Steps of attacks that go nowhere are those of amp, bit for bit."""
    weights = []
    for name in ("amp", "bf16"):
        flags = [*SMALL, "--amp=bf16", f"--attack.precision={name}", "--attack.step_size=0"]
        with Trainer(parse_config([*flags, f"--output={tmp_path / name}"])) as trainer:
            trainer.begin_epoch(1)
            trainer.train_epoch(1)
            weights.append(trainer.arenas.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
