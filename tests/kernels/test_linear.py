import pytest
import torch

from kernels.launch import FEW_ROWS
from kernels.linear import linear
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, assert_as_exact_as_torch, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(("depth", "columns"), [(1024, 96), (2048, 40), (3072, 16), (4096, 24), (96, 64)])
def test_multiplies_as_exactly_as_torch(rows: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, depth, dtype=dtype), randn(columns, depth, seed=1, dtype=dtype)
    exact = x.double() @ weight.double().T
    actual = linear(x.to(DEVICE), weight.to(DEVICE))
    # The floor is a last bit of the largest result: torch's own sum may happen to come out even closer.
    floor = float(exact.abs().max()) * torch.finfo(dtype).eps
    assert_as_exact_as_torch(actual, torch.nn.functional.linear(x, weight), exact, floor=floor)


def test_a_nan_row_stays_alone() -> None:
    x = randn(5, 1024, dtype=torch.float16, device=DEVICE)
    x[3, 7] = torch.nan
    out = linear(x, randn(64, 1024, dtype=torch.float16, device=DEVICE))
    assert out.isnan().any(1).tolist() == [False, False, False, True, False]
