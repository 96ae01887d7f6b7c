"""A product of many rows that adds the residual itself; of fewer rows: test_tiled_linear.py, test_linear.py."""

import pytest
import torch

from kernels import reference
from kernels.linear_add_norm import MANY_ROWS, linear_add_norm
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, assert_as_exact_as_torch, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [MANY_ROWS - 1, MANY_ROWS, MANY_ROWS + 77])
def test_the_sum_and_its_norm_are_as_exact_as_in_torch(rows: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, 96, dtype=dtype), randn(80, 96, seed=1, dtype=dtype)
    residual, norm_weight = randn(rows, 80, seed=2, dtype=dtype), randn(80, seed=3, dtype=dtype)
    exact_sum = x.double() @ weight.double().T + residual.double()
    exact = reference.rms_norm(exact_sum, norm_weight.double(), 1e-6)
    expected, expected_sum = reference.linear_add_norm(x, weight, residual.clone(), norm_weight, 1e-6)
    ours = residual.to(DEVICE, copy=True)
    actual, actual_sum = linear_add_norm(x.to(DEVICE), weight.to(DEVICE), ours, norm_weight.to(DEVICE), 1e-6)
    assert actual_sum.data_ptr() == ours.data_ptr(), "written over the residual"
    floor = float(exact_sum.abs().max()) * torch.finfo(dtype).eps
    assert_as_exact_as_torch(actual_sum, expected_sum, exact_sum, floor=floor)
    assert_as_exact_as_torch(actual, expected, exact, floor=float(exact.abs().max()) * torch.finfo(dtype).eps)


def test_a_nan_row_stays_alone() -> None:
    x = randn(MANY_ROWS, 96, dtype=torch.float32, device=DEVICE)
    x[7] = torch.nan
    residual, norm_weight = torch.zeros(MANY_ROWS, 80, device=DEVICE), torch.ones(80, device=DEVICE)
    for result in linear_add_norm(x, randn(80, 96, device=DEVICE), residual, norm_weight, 1e-6):
        assert result.isnan().any(1).nonzero().flatten().tolist() == [7]
