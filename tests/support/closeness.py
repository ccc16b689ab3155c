"""The three ways in which results may agree, and the only tolerances in the kernel tests."""

import torch
from torch import Tensor

SUM_TOLERANCE = 1e-5


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Selects, clamps, copies, arithmetic in the same order: equal, NaN where it is expected."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_elementwise(actual: Tensor, expected: Tensor) -> None:
    """Elementwise arithmetic: within torch's defaults for the dtype of `actual`."""
    expected = expected.to(actual.dtype)
    torch.testing.assert_close(actual.cpu(), expected.cpu(), equal_nan=True)


def assert_sum(actual: Tensor, expected: Tensor) -> None:
    """A sum: within 1e-5 of the sum in fp64."""
    assert expected.dtype == torch.float64
    torch.testing.assert_close(
        actual.double().cpu(), expected.cpu(), rtol=SUM_TOLERANCE, atol=0, equal_nan=True
    )
