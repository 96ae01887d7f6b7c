import pytest
import torch
import torch.nn.functional as F

from kernels import reference, silu_mul
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, assert_as_exact_as_torch, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (3, 1000), (2, 1024), (2, 3072)])
def test_gates_as_exactly_as_torch(dtype: torch.dtype, rows: int, width: int) -> None:
    x = randn(rows, 2 * width, dtype=dtype) * 4
    gate, up = x.double().chunk(2, -1)
    actual = silu_mul.silu_mul(x.to(DEVICE))
    assert_as_exact_as_torch(actual, reference.silu_mul(x), F.silu(gate) * up, floor=1e-7)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
def test_very_negative_gates_give_zero() -> None:
    assert (silu_mul.silu_mul(torch.tensor([[-1e4, -200.0, 1.0, 1.0]], device=DEVICE)) == 0).all()
