"""The kernels under pytest-benchmark: python -m pytest bench/test_ops.py --benchmark-compare ..."""

import pytest
import torch

from safer_fast.kernels import l2_step_, linf_step_, perturb_, restore_, sum_squares
from tests.support.cases import ATTACK_BENCH, SAM_BENCH, Case, attack_inputs, sam_inputs

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@pytest.mark.parametrize("case", ATTACK_BENCH, ids=lambda case: str(case.gradient_dtype))
@pytest.mark.parametrize("step_", [linf_step_, l2_step_])
def test_step(benchmark, step_, case: Case) -> None:
    benchmark(step_, *attack_inputs(case), torch.tensor(2 / 255), torch.tensor(8 / 255))


@pytest.mark.parametrize("case", SAM_BENCH, ids=lambda case: str(case.gradient_dtype))
def test_sum_squares(benchmark, case: Case) -> None:
    _, _, gradient = sam_inputs(case, torch.bfloat16)
    benchmark(sum_squares, gradient)


@pytest.mark.parametrize("case", SAM_BENCH, ids=lambda case: str(case.gradient_dtype))
def test_perturb(benchmark, case: Case) -> None:
    benchmark(perturb_, *sam_inputs(case, torch.bfloat16), torch.tensor(0.05))


def test_restore(benchmark) -> None:
    compute, master, _ = sam_inputs(SAM_BENCH[0], torch.bfloat16)
    benchmark(restore_, compute, master)
