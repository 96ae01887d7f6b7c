import pytest
import torch
import torch.nn.functional as F

from kernels import reference, rms_norm
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, assert_as_exact_as_torch, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 96), (5, 1000), (2, 1024), (2, 5120)])
def test_norms_a_row_as_exactly_as_torch(dtype: torch.dtype, scale: float, rows: int, width: int) -> None:
    x, weight = randn(rows, width, dtype=dtype) * scale, randn(width, seed=1, dtype=dtype)
    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-6)
    actual = rms_norm.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6)
    assert_as_exact_as_torch(actual, reference.rms_norm(x, weight, 1e-6), exact, floor=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_before_it_norms_and_gives_the_sum_back(dtype: torch.dtype) -> None:
    x, residual, weight = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(4, 96), (4, 96), (96,)]))
    expected, expected_sum = reference.add_rms_norm(x, residual, weight, 1e-6)
    exact = F.rms_norm((x + residual).double(), (96,), weight.double(), 1e-6)
    actual, actual_sum = rms_norm.add_rms_norm(*(t.to(DEVICE) for t in (x, residual, weight)), 1e-6)
    assert torch.equal(actual_sum.cpu(), expected_sum)
    assert_as_exact_as_torch(actual, expected, exact, floor=1e-7)


def test_no_rows_are_no_work() -> None:
    empty, weight = torch.empty(0, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    assert rms_norm.rms_norm(empty, weight, 1e-6).shape == (0, 64)
    assert rms_norm.add_rms_norm(empty, empty.clone(), weight, 1e-6)[1].shape == (0, 64)


def test_a_nan_row_stays_alone() -> None:
    x = randn(3, 96, device=DEVICE)
    x[1, 5] = torch.nan
    out = rms_norm.rms_norm(x, torch.ones(96, device=DEVICE), 1e-6)
    assert out.isnan().any(1).tolist() == [False, True, False]
