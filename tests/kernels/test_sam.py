"""The SAM kernels against plain PyTorch; test_triton.py runs this on Triton, too."""

import os

import pytest
import torch
from torch import Tensor

from safer_fast.kernels import perturb_, restore_, sam, sum_squares
from safer_fast.kernels.sam import reference
from tests.support.cases import CASES, Case, named, sam_inputs
from tests.support.closeness import assert_same_bits, assert_sum

SCALE = 0.05
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
on_every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
plain_and_adaptive = pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
plain_and_weighted = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
rounds = pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates to bf16")
compiled = pytest.mark.skipif(INTERPRETED, reason="the compiler does not know the interpreter")


@pytest.fixture(autouse=True, scope="module")
def triton_serves_the_cpu_when_interpreted() -> None:
    """Make every test of this file run the Triton kernels, too."""
    if INTERPRETED:
        sam.sum_squares_op.register_kernel("cpu", sam.sum_squares_cuda)
        sam.perturb_op.register_kernel("cpu", sam.perturb_cuda)
        sam.restore_op.register_kernel("cpu", sam.restore_cuda)


@on_every_device
@plain_and_weighted
def test_sum_squares_agrees_with_fp64(weighted: bool, device: str) -> None:
    for case in CASES:
        with named(case):
            _, master, gradient = sam_inputs(case, torch.float32, device)
            product = gradient.double() * master if weighted else gradient.double()
            result = sum_squares(gradient, master if weighted else None)
            assert result.dtype == torch.float32
            assert result.shape == ()
            # The squares of 1e-22 are no fp32 numbers, and neither is their sum.
            expected = product.square().sum()
            assert_sum(result, expected if case.values != "tiny" else expected.float().double())


@on_every_device
@in_every_dtype
@plain_and_weighted
def test_a_long_sum_is_as_accurate(
    dtype: torch.dtype, weighted: bool, device: str, monkeypatch
) -> None:
    num_elements = 200_003 if INTERPRETED else 25_000_003
    if INTERPRETED:
        # So that a sum of this length needs several blocks of partial sums, too.
        monkeypatch.setattr("safer_fast.kernels.sam.cuda.TOTAL_BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(num_elements, generator=generator).to(dtype).to(device)
    weight = x.float() if weighted else None
    product = x.double().square() if weighted else x.double()
    assert_sum(sum_squares(x, weight), product.square_().sum())


@on_every_device
@in_every_dtype
@plain_and_adaptive
def test_perturb_equals_the_reference_to_the_bit(
    dtype: torch.dtype, adaptive: bool, device: str
) -> None:
    scale = torch.tensor(SCALE, device=device)
    for case in CASES:
        with named(case):
            expected = perturbed_by_reference(case, dtype, adaptive)
            compute, master, gradient = sam_inputs(case, dtype, device)
            assert perturb_(compute, master, gradient, scale, adaptive) is compute
            assert_same_bits(compute, expected)


def perturbed_by_reference(case: Case, dtype: torch.dtype, adaptive: bool) -> Tensor:
    """The expected result of perturb_."""
    expected, master, gradient = sam_inputs(case, torch.float32)
    reference.perturb_(expected, master, gradient, torch.tensor(SCALE), adaptive)
    return cast(expected, dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as torch does; Triton's interpreter instead truncates to bf16."""
    if INTERPRETED and dtype == torch.bfloat16:
        x = (x.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32)
    return x.to(dtype)


def test_perturb_is_the_formula() -> None:
    master = torch.tensor([1.0, -2.0, 3.0])
    gradient = torch.tensor([4.0, 4.0, -4.0])
    compute = perturb_(torch.zeros(3), master, gradient, 0.5)
    assert compute.tolist() == [3.0, 0.0, 1.0]
    compute = perturb_(torch.zeros(3), master, gradient, 0.5, adaptive=True)
    assert compute.tolist() == [3.0, 6.0, -15.0]


@rounds
@on_every_device
@pytest.mark.parametrize(
    ("value", "rounded"),
    [(1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-20, 1 + 2**-7)],
    ids=["tie down", "tie up", "above the tie"],
)
def test_weights_round_to_the_nearest_even(value: float, rounded: float, device: str) -> None:
    compute = torch.zeros(32, dtype=torch.bfloat16, device=device)
    master = torch.full((32,), value, device=device)
    perturb_(compute, master, torch.zeros_like(master), SCALE)
    assert compute.tolist() == [rounded] * 32
    assert restore_(compute.zero_(), master).tolist() == [rounded] * 32


@rounds
@on_every_device
@in_every_dtype
def test_perturb_and_restore_keep_every_nan(dtype: torch.dtype, device: str) -> None:
    # The largest payload: rounding the bits without care would carry into the sign and give zero.
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)
    master = payloads.view(torch.float32).repeat(8).to(device)
    compute = torch.zeros(32, dtype=dtype, device=device)
    perturb_(compute, master, torch.zeros_like(master), SCALE)
    assert compute.isnan().all()
    assert restore_(compute.zero_(), master).isnan().all()


@on_every_device
@in_every_dtype
def test_restore_gives_back_the_very_same_weights(dtype: torch.dtype, device: str) -> None:
    for case in CASES:
        with named(case):
            compute, master, gradient = sam_inputs(case, dtype, device)
            # What is not dense in memory is torch's own copy.
            expected = master.to(dtype) if case.layout == "strided" else cast(master, dtype)
            perturb_(compute, master, gradient, SCALE)
            assert restore_(compute, master) is compute
            assert_same_bits(compute, expected)


@on_every_device
@pytest.mark.parametrize("dtype", [pytest.param(DTYPES[1], marks=rounds), DTYPES[2]], ids=str)
def test_restore_casts_as_torch_does_around_every_tie(dtype: torch.dtype, device: str) -> None:
    # Every sign, exponent and leading bits, above the ties of bf16 and fp16 and their neighbours.
    ties = [(1 << bit) + near for bit in range(12, 16) for near in (-1, 0, 1)]
    bits = (torch.arange(-(1 << 15), 1 << 15) << 16)[:, None] + torch.tensor([0, *ties, 0xFFFF])
    master = bits.flatten().to(torch.int32).view(torch.float32)
    expected = master.to(dtype)
    compute = restore_(torch.zeros_like(expected, device=device), master.to(device))
    assert_same_bits(compute, expected)
    assert_same_bits(compute.signbit() & ~compute.isnan(), expected.signbit() & ~expected.isnan())


@plain_and_adaptive
def test_master_and_gradient_are_left_alone(adaptive: bool) -> None:
    compute, master, gradient = sam_inputs(Case("mutation", (1040,)), torch.bfloat16)
    before = master.clone(), gradient.clone()
    perturb_(compute, master, gradient, SCALE, adaptive)
    restore_(compute, master)
    sum_squares(gradient, master)
    assert_same_bits(master, before[0])
    assert_same_bits(gradient, before[1])


def test_fp64_runs_through_in_fp64() -> None:
    compute, master, gradient = sam_inputs(Case("fp64", (1040,)), torch.float64)
    master, gradient = master.double(), gradient.double()
    scale = torch.tensor(SCALE)
    perturb_(compute, master, gradient, scale)
    assert_same_bits(compute, master + scale.double() * gradient)
    assert_same_bits(restore_(compute, master), master)
    assert_same_bits(restore_(compute.half(), master), master.half())
    assert_same_bits(restore_(compute, master.float()), master.float().double())
    assert_sum(sum_squares(gradient, master), (gradient * master).square().sum())


def test_a_weight_in_half_precision_runs_the_reference() -> None:
    _, master, gradient = sam_inputs(Case("half", (1040,)), torch.float32)
    weight = master.bfloat16()
    assert_sum(sum_squares(gradient, weight), (gradient.double() * weight).square().sum())


def test_a_mixture_of_layouts_is_written_back_to_the_original() -> None:
    case = Case("layouts", (2, 3, 8, 10))
    compute, master, gradient = sam_inputs(case, torch.bfloat16)
    expected = perturb_(compute, master, gradient, SCALE)
    mixed = torch.empty(2, 10, 8, 3, dtype=torch.bfloat16).transpose(1, 3)
    perturb_(mixed, master.contiguous(memory_format=torch.channels_last), gradient, SCALE)
    assert_same_bits(mixed, expected)
    assert_same_bits(restore_(mixed, master), master.bfloat16())
    sums = [sum_squares(gradient, weight) for weight in (master, master.transpose(2, 3).mT)]
    assert_same_bits(sums[0], sums[1])


def test_strides_of_dimensions_with_one_element_do_not_matter() -> None:
    compute, master, gradient = sam_inputs(Case("every other row", (2, 17)), torch.float32)
    expected = perturb_(compute[:1].clone(), master[:1].clone(), gradient[:1].clone(), SCALE)
    assert_same_bits(perturb_(compute[:1], master[::2], gradient[::2], SCALE), expected)
    assert_same_bits(restore_(compute[:1], master[::2]), master[:1])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    compute, master, gradient = sam_inputs(Case("threads", (300_007,)), torch.bfloat16)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        perturbed = perturb_(compute.clone(), master, gradient, SCALE)
        restored = restore_(compute.clone(), master)
        results.append((sum_squares(gradient), sum_squares(gradient, master), perturbed, restored))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_sum_on_the_gpu_is_the_same_bits_every_time() -> None:
    x = torch.randn(5_000_011, device="cuda")
    first = sum_squares(x)
    for _ in range(20):
        assert_same_bits(sum_squares(x), first)


def test_a_stale_backward_raises() -> None:
    for update in (lambda c, m, g: perturb_(c, m, g, SCALE), lambda c, m, _: restore_(c, m)):
        compute, master, gradient = sam_inputs(Case("stale", (16,)), torch.float32)
        weight = torch.ones(16, requires_grad=True)
        loss = (compute * weight).sum()
        update(compute, master, gradient)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_that_requires_grad_may_be_perturbed_and_restored() -> None:
    compute, master, gradient = sam_inputs(Case("leaf", (16,)), torch.float32)
    parameter = torch.nn.Parameter(compute)
    perturb_(parameter, master, gradient, SCALE)
    restore_(parameter, master)
    assert_same_bits(parameter.detach(), master)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda t: perturb_(t, t, torch.rand(5), 1.0), r"gradient must have the shape .*\(5,\)"),
        (lambda t: perturb_(t, t.int(), t, 1.0), "master must be floating point, got torch.int32"),
        (lambda t: perturb_(t, t, t, torch.rand(1)), r"scale must be a float .* shape \(1,\)"),
        (lambda t: perturb_(t, t.to("meta"), t, 1.0), "master must be on the device of compute"),
        (lambda t: restore_(t, torch.rand(5)), r"master must have the shape .*\(4,\), got \(5,\)"),
        (lambda t: restore_(t.long(), t), "compute must be floating point, got torch.int64"),
        (lambda t: sum_squares(t.int()), "x must be floating point, got torch.int32"),
        (lambda t: sum_squares(t, torch.rand(5)), r"weight must have the shape .*\(4,\), got"),
    ],
)
def test_arguments_that_do_not_fit_are_named(run, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(torch.rand(4))


@plain_and_adaptive
def test_opcheck_finds_nothing(adaptive: bool) -> None:
    compute, master, gradient = sam_inputs(Case("opcheck", (2, 17)), torch.bfloat16)
    tensors = compute, master, gradient, torch.tensor(SCALE)
    torch.library.opcheck(sam.perturb_op, (*tensors, adaptive))
    torch.library.opcheck(sam.restore_op, (compute, master))
    torch.library.opcheck(sam.sum_squares_op, (gradient, master) if adaptive else (gradient,))


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_ascent_is_one_graph_and_gives_the_same_bits(backend: str) -> None:
    compute, master, gradient = sam_inputs(Case("compiled", (2, 17)), torch.bfloat16)

    def ascend_and_restore(compute, master, gradient):
        norm = sum_squares(gradient, master).sqrt()
        perturbed = perturb_(compute, master, gradient, SCALE / norm, adaptive=True)
        # Used, not just cloned: torch 2.15 drops a clone of what any custom_op mutated, and returns
        # what the next mutation leaves there.
        used = 2 * perturbed.float()
        return used, restore_(compute, master)

    expected = ascend_and_restore(compute.clone(), master, gradient)
    run = torch.compile(ascend_and_restore, fullgraph=True, backend=backend)
    results = run(compute, master, gradient)
    assert_same_bits(results[0], expected[0])
    assert_same_bits(results[1], expected[1])
    assert_same_bits(compute, master.bfloat16())
