"""GELU quantised to FP8 against plain PyTorch; test_triton.py runs this on Triton, too."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from safer_fast.kernels import float8, quantise_gelu, quantise_gelu_backward
from safer_fast.kernels.float8 import FORMAT, quantise, reference
from tests.support.cases import named

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
            reason="no CUDA device with FP8",
        ),
    ],
)
on_every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
compiled = pytest.mark.skipif(INTERPRETED, reason="the compiler does not know the interpreter")
SHAPES = [(1, 1), (3, 7), (2, 16), (3, 48), (2, 768), (2, 1024), (1, 1280), (0, 16)]
LARGEST = torch.finfo(FORMAT).max


@pytest.fixture(autouse=True, scope="module")
def triton_serves_the_cpu_when_interpreted() -> None:
    """Make every test of this file run the Triton kernels, too.

    The interpreter cuts FP8 off where it is to be rounded, and knows no NaN there, so that PyTorch
    rounds what the kernels find.
    """
    if INTERPRETED:
        from safer_fast.kernels.float8 import cuda

        def quantised(kernel: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> Any:
            values, scales = kernel(*inputs, torch.float32)
            return values.to(FORMAT), scales

        for op, kernel in (
            (float8.quantise_gelu_op, cuda.quantise_gelu),
            (float8.quantise_gelu_backward_op, cuda.quantise_gelu_backward),
        ):
            op.register_kernel("cpu", partial(quantised, kernel))


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Output gradients, and what enters GELU: from where it is 0 to where it is x."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    gradient, x = (torch.randn(shape, generator=generator) for _ in range(2))
    return (1e-3 * gradient).to(dtype).to(device), (3 * x).to(dtype).to(device)


def cases(device: str) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]]:
    """Outputs of an op, of its reference, and what both are about, in fp64."""
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            with named(shape, dtype):
                gradient, x = inputs(shape, dtype, device)
                exact = x.double().cpu().requires_grad_()
                y = functional.gelu(exact)
                yield quantise_gelu(x), reference.quantise_gelu(x.cpu()), y.detach()
                (slope,) = torch.autograd.grad(y, exact, gradient.double().cpu())
                own = quantise_gelu_backward(gradient, x)
                yield own, reference.quantise_gelu_backward(gradient.cpu(), x.cpu()), slope


@on_every_device
def test_values_and_scales_are_those_of_gelu_in_fp64(device: str) -> None:
    for (values, scales), (other_values, other_scales), exact in cases(device):
        assert (values.dtype, scales.dtype) == (FORMAT, torch.float32)
        assert (values.shape, scales.shape) == (exact.shape, (len(exact), 1))
        values, scales = values.float().cpu(), scales.cpu()
        torch.testing.assert_close(scales, other_scales, rtol=1e-5, atol=0)
        # two roundings of one number are a step apart at most, and few numbers lie in between
        differing = values != other_values.float()
        assert differing.sum() <= 1 + 0.002 * differing.numel()
        if not exact.numel():
            continue
        assert (values.abs().amax(1) == LARGEST).all()
        # half a step of three bits of mantissa, and of the least normal number below it; for
        # negative x the sum 1 + erf is as exact as 1 is in fp32
        error = 2.0**-4 * torch.maximum(exact.abs(), scales.double() * 2.0**-6)
        error += torch.finfo(torch.float32).eps * exact.abs().amax(1, keepdim=True)
        assert ((values.double() * scales - exact).abs() <= error).all()


@on_every_device
@pytest.mark.parametrize("lost", [torch.nan, torch.inf, -torch.inf])
def test_what_is_lost_is_lost_for_its_row_alone(lost: float, device: str) -> None:
    for column in (0, 700):  # in the power of two, and in the rest
        gradient, x = inputs((3, 768), torch.bfloat16, device)
        gradient[1, column] = lost
        values, scales = quantise_gelu_backward(gradient, x)
        assert values[1].float().isnan().all()
        assert scales[1].isnan().all()
        assert values[[0, 2]].float().isfinite().all()
        if lost > 0 or lost != lost:  # gelu(-inf) is NaN, in PyTorch too
            x[1, column] = lost
            values, scales = quantise_gelu(x)
            assert values[1].float().isnan().all()
            assert scales[1].isnan().all()
            assert values[[0, 2]].float().isfinite().all()


@on_every_device
def test_rows_of_zeros_and_of_tiny_numbers_are_finite(device: str) -> None:
    for size in (0.0, 1e-30, 1e-44):
        x = torch.full((2, 48), size, device=device)
        for values, scales in (quantise_gelu(x), quantise_gelu_backward(x, torch.ones_like(x))):
            back = values.double().cpu() * scales.double().cpu()
            assert (scales >= reference.LEAST_SCALE).all()
            torch.testing.assert_close(back, back.new_full((2, 48), back[0, 0].item()))
            assert back[0, 0] <= 1.1 * size


@on_every_device
def test_other_layouts_and_dtypes_are_served(device: str) -> None:
    gradient, x = inputs((48, 32), torch.float32, device)
    for own, plain in (
        (quantise_gelu(x.t()), quantise_gelu(x.t().contiguous())),
        (quantise_gelu(x.double()), reference.quantise_gelu(x)),
        (
            quantise_gelu_backward(gradient.t(), x.t()),
            quantise_gelu_backward(gradient.t().contiguous(), x.t().contiguous()),
        ),
    ):
        torch.testing.assert_close(own[0].float(), plain[0].float(), rtol=0.13, atol=1)
        torch.testing.assert_close(own[1], plain[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantise_gelu(torch.ones(3)), r"x must have shape \[M, K\] .* got \(3,\)"),
        (lambda: quantise_gelu(torch.ones(3, 0)), r"x must have shape \[M, K\] .* got \(3, 0\)"),
        (lambda: quantise_gelu(torch.ones(3, 2, dtype=torch.int)), "x must be floating point"),
        (
            lambda: quantise_gelu_backward(torch.ones(3, 4), torch.ones(3, 2)),
            r"gradient must have the shape of x, \(3, 2\), got \(3, 4\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@compiled
@on_every_device
def test_the_operators_keep_the_rules_of_pytorch(device: str) -> None:
    gradient, x = inputs((3, 48), torch.bfloat16, device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(float8.quantise_gelu_op, (x,), test_utils=checks)
    torch.library.opcheck(float8.quantise_gelu_backward_op, (gradient, x), test_utils=checks)


@compiled
def test_without_gelu_rows_are_quantised_alike() -> None:
    _, x = inputs((3, 48), torch.bfloat16, "cpu")
    values, scales = quantise(functional.gelu(x.float()))
    own_values, own_scales = quantise_gelu(x)
    assert torch.equal(values.float(), own_values.float())
    assert torch.equal(scales, own_scales)
