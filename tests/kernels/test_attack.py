"""The attack steps against plain PyTorch; test_triton.py runs this on Triton, too."""

import os

import pytest
import torch
from torch import Tensor

from safer_fast.kernels import attack, l2_step_, linf_step_
from safer_fast.kernels.attack import reference
from tests.support.cases import CASES, VALUES, Case, attack_inputs, named
from tests.support.closeness import assert_elementwise, assert_same_bits

STEP_SIZE, EPSILON = 0.03, 0.1
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
on_every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
for_each_step = pytest.mark.parametrize("step_", [linf_step_, l2_step_])
compiled = pytest.mark.skipif(INTERPRETED, reason="the compiler does not know the interpreter")


@pytest.fixture(autouse=True, scope="module")
def triton_serves_the_cpu_when_interpreted() -> None:
    """Make every test of this file run the Triton kernels, too."""
    if INTERPRETED:
        attack.linf_step_op.register_kernel("cpu", attack.linf_step_cuda)
        attack.l2_step_op.register_kernel("cpu", attack.l2_step_cuda)


def scalars(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Step size and epsilon where the trainer keeps them: on the device."""
    return torch.tensor(STEP_SIZE, device=device), torch.tensor(EPSILON, device=device)


@on_every_device
def test_linf_step_equals_the_reference_to_the_bit(device: str) -> None:
    for case in CASES:
        with named(case):
            expected, images, gradient = attack_inputs(case)
            reference.linf_step_(expected, images, gradient, *scalars())
            adversarial, images, gradient = attack_inputs(case, device)
            assert linf_step_(adversarial, images, gradient, *scalars(device)) is adversarial
            assert_same_bits(adversarial, expected)


@on_every_device
def test_l2_step_agrees_with_the_reference(device: str) -> None:
    for case in CASES:
        with named(case):
            expected, images, gradient = attack_inputs(case)
            reference.l2_step_(expected, images, gradient, *scalars())
            adversarial, images, gradient = attack_inputs(case, device)
            assert l2_step_(adversarial, images, gradient, *scalars(device)) is adversarial
            assert_elementwise(adversarial, expected)


@on_every_device
@for_each_step
def test_a_step_agrees_with_the_same_step_in_fp64(step_, device: str) -> None:
    adversarial, images, gradient = attack_inputs(Case("fp64", (4, 3, 40, 41)), device)
    expected = adversarial.double()
    step_(expected, images.double(), gradient.double(), *scalars(device))
    assert_elementwise(step_(adversarial, images, gradient, *scalars(device)), expected)


def test_linf_step_is_the_formula() -> None:
    adversarial = torch.tensor([0.50, 0.50, 0.59, 0.41, 0.99, 0.01, 0.5])
    images = torch.tensor([0.50, 0.50, 0.50, 0.50, 0.95, 0.05, 0.5])
    gradient = torch.tensor([2.00, -3.0, 1e-30, -1e-30, 1.0, -1.0, 0.0])
    linf_step_(adversarial, images, gradient, STEP_SIZE, EPSILON)
    expected = torch.tensor([0.53, 0.47, 0.60, 0.40, 1.00, 0.00, 0.5])
    assert_elementwise(adversarial, expected)


def test_l2_step_has_the_length_of_the_step_and_stays_in_the_ball() -> None:
    images = torch.full((2, 3, 8, 8), 0.5)
    _, _, gradient = attack_inputs(Case("directions", (2, 3, 8, 8)))
    adversarial = l2_step_(images.clone(), images, gradient, STEP_SIZE, EPSILON)
    lengths = (adversarial - images).flatten(1).norm(dim=1)
    assert_elementwise(lengths, torch.full((2,), STEP_SIZE))
    for _ in range(5):
        l2_step_(adversarial, images, gradient, STEP_SIZE, EPSILON)
    lengths = (adversarial - images).flatten(1).norm(dim=1)
    assert_elementwise(lengths, torch.full((2,), EPSILON))


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linf_step_shows_a_nan_gradient_as_a_nan_pixel(dtype: torch.dtype, device: str) -> None:
    adversarial = torch.full((1, 32), 0.5, device=device)
    gradient = torch.ones(1, 32, dtype=dtype, device=device)
    gradient[0, 11] = torch.nan
    linf_step_(adversarial, adversarial.clone(), gradient, STEP_SIZE, EPSILON)
    assert adversarial.isnan().nonzero().tolist() == [[0, 11]]


@on_every_device
def test_l2_step_shows_a_nan_gradient_as_a_nan_image(device: str) -> None:
    adversarial = torch.full((3, 32), 0.5, device=device)
    gradient = torch.ones(3, 32, device=device)
    gradient[1, 11] = torch.nan
    l2_step_(adversarial, adversarial.clone(), gradient, STEP_SIZE, EPSILON)
    assert adversarial.isnan().all(dim=1).tolist() == [False, True, False]
    assert adversarial.isnan().sum() == 32


@on_every_device
@for_each_step
def test_a_zero_gradient_moves_nothing(step_, device: str) -> None:
    images = torch.rand(2, 32, device=device)
    adversarial = images.clone()
    step_(adversarial, images, torch.zeros_like(images), STEP_SIZE, EPSILON)
    assert_same_bits(adversarial, images)


@on_every_device
def test_l2_step_moves_along_a_gradient_whose_square_underflows(device: str) -> None:
    images = torch.full((1, 16), 0.5, device=device)
    adversarial = images.clone()
    l2_step_(adversarial, images, torch.full_like(images, 1e-25), STEP_SIZE, EPSILON)
    assert_elementwise(adversarial, torch.full((1, 16), 0.5 + STEP_SIZE / 4))


@for_each_step
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_of_other_dtypes_run_the_reference(step_, dtype: torch.dtype) -> None:
    adversarial, images, gradient = attack_inputs(Case("dtypes", (2, 33)))
    adversarial, images = adversarial.to(dtype), images.to(dtype)
    expected = adversarial.clone()
    getattr(reference, step_.__name__)(expected, images, gradient, *scalars())
    assert_same_bits(step_(adversarial, images, gradient, *scalars()), expected)


@for_each_step
def test_the_images_and_the_gradient_are_left_alone(step_) -> None:
    adversarial, images, gradient = attack_inputs(Case("mutation", (2, 1040)))
    before = images.clone(), gradient.clone()
    step_(adversarial, images, gradient, *scalars())
    assert_same_bits(images, before[0])
    assert_same_bits(gradient, before[1])


@for_each_step
def test_floats_and_device_scalars_give_the_same_bits(step_) -> None:
    adversarial, images, gradient = attack_inputs(Case("scalars", (2, 1040)))
    expected = step_(adversarial.clone(), images, gradient, *scalars())
    assert_same_bits(step_(adversarial, images, gradient, STEP_SIZE, EPSILON), expected)


@for_each_step
def test_a_mixture_of_layouts_is_written_back_to_the_original(step_) -> None:
    case = Case("layouts", (2, 3, 8, 10))
    expected = step_(*attack_inputs(case), *scalars())
    adversarial, images, gradient = attack_inputs(case)
    transposed = adversarial.transpose(1, 3).contiguous().transpose(1, 3)
    images = images.contiguous(memory_format=torch.channels_last)
    step_(transposed, images, gradient.expand_as(gradient), *scalars())
    assert_elementwise(transposed, expected)


@for_each_step
def test_results_do_not_depend_on_the_number_of_threads(step_) -> None:
    adversarial, images, gradient = attack_inputs(Case("threads", (3, 3, 67, 101)))
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(step_(adversarial.clone(), images, gradient, *scalars()))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@for_each_step
def test_a_stale_backward_raises(step_) -> None:
    adversarial, images, gradient = attack_inputs(Case("stale", (2, 16)))
    weight = torch.ones(2, 16, requires_grad=True)
    loss = (adversarial * weight).sum()
    step_(adversarial, images, gradient, *scalars())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@for_each_step
def test_a_leaf_that_requires_grad_may_be_stepped(step_) -> None:
    adversarial, images, gradient = attack_inputs(Case("leaf", (2, 16)))
    expected = step_(adversarial.clone(), images, gradient, *scalars())
    step_(adversarial.requires_grad_(), images, gradient, *scalars())
    assert_same_bits(adversarial.detach(), expected)


@for_each_step
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.rand(2, 5)}, r"images must have the shape .*\(2, 4\), got \(2, 5\)"),
        ({"gradient": torch.rand(3, 4)}, r"gradient must have the shape .*\(2, 4\), got \(3, 4\)"),
        ({"images": torch.rand(2, 4).double()}, "images must have the dtype .*float32, got .*64"),
        ({"gradient": torch.ones(2, 4).int()}, "gradient must be floating point, got torch.int32"),
        (
            {"images": torch.empty(2, 4, device="meta")},
            "images must be on the device .*cpu, got meta",
        ),
        ({"epsilon": torch.rand(2)}, r"epsilon must be a float or a 0-d .* of shape \(2,\)"),
        (
            {"step_size": torch.ones((), dtype=torch.float64)},
            "step_size must be .* got torch.float64",
        ),
        (
            {"step_size": torch.ones((), device="meta")},
            "step_size must be on the device cpu, got meta",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(step_, changes, message: str) -> None:
    arguments = {name: torch.rand(2, 4) for name in ("adversarial", "images", "gradient")}
    with pytest.raises(ValueError, match=message):
        step_(**{**arguments, "step_size": STEP_SIZE, "epsilon": EPSILON, **changes})


def test_l2_step_needs_a_batch_dimension() -> None:
    with pytest.raises(ValueError, match=r"adversarial must have shape \[B, ...\], got \(4,\)"):
        l2_step_(torch.rand(4), torch.rand(4), torch.rand(4), STEP_SIZE, EPSILON)


@pytest.mark.parametrize(
    "case", [Case("usual", (2, 3, 5, 7)), VALUES[2]], ids=lambda case: case.name
)
@pytest.mark.parametrize("operation", [attack.linf_step_op, attack.l2_step_op])
def test_opcheck_finds_nothing(operation, case: Case) -> None:
    torch.library.opcheck(operation, (*attack_inputs(case), *scalars()))


@compiled
@for_each_step
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_is_one_graph_and_gives_the_same_bits(step_, backend: str) -> None:
    adversarial, images, gradient = attack_inputs(Case("compiled", (2, 3, 5, 7)))
    expected = step_(adversarial.clone(), images, gradient, *scalars())
    run = torch.compile(step_, fullgraph=True, backend=backend)
    assert_same_bits(run(adversarial, images, gradient, *scalars()), expected)
    assert_same_bits(adversarial, expected)
