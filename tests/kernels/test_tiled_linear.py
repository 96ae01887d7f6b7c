"""Products of some rows, and what is computed with them."""

from contextlib import nullcontext

import pytest
import torch

from kernels import reference
from kernels.launch import FEW_ROWS, beside_another
from kernels.linear import linear
from kernels.linear_add_norm import linear_add_norm
from kernels.linear_silu_mul import linear_silu_mul
from kernels.tiled_linear import MAX_ROWS, tiled_linear, tiled_linear_parts, tiles_suit
from tests.kernels.dtypes import DTYPES
from tests.kernels.paged import DEVICE, assert_as_exact_as_torch, randn

HALF_DTYPES = [dtype for dtype in DTYPES if dtype != torch.float32]
some_rows = pytest.mark.parametrize("rows", [1, FEW_ROWS + 1, 64, 65, MAX_ROWS])
half_dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES)


def last_bit(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """Of the largest result: torch's own sum may happen to come out even closer."""
    return float(exact.abs().max()) * torch.finfo(dtype).eps


@half_dtypes
@some_rows
@pytest.mark.parametrize(("depth", "columns"), [(64, 64), (192, 128), (1024, 64)])
def test_multiplies_as_exactly_as_torch(rows: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, depth, dtype=dtype), randn(columns, depth, seed=1, dtype=dtype)
    exact = x.double() @ weight.double().T
    expected = torch.nn.functional.linear(x, weight)
    floor = last_bit(exact, dtype)
    assert_as_exact_as_torch(tiled_linear(x.to(DEVICE), weight.to(DEVICE)), expected, exact, floor=floor)
    parts = tiled_linear_parts(x.to(DEVICE), weight.to(DEVICE))
    assert parts.shape == (len(parts), rows, columns)
    assert depth % len(parts) == 0
    assert len(parts) == {64: 1, 192: 1, 1024: 8}[depth]
    assert_as_exact_as_torch(parts.sum(0).to(dtype), expected, exact, floor=floor)


@half_dtypes
@some_rows
def test_the_gate_is_applied_as_exactly_as_in_torch(rows: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, 128, dtype=dtype), randn(2 * 64, 128, seed=1, dtype=dtype) * 0.2
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    with beside_another():
        actual = linear_silu_mul(x.to(DEVICE), weight.to(DEVICE))
    expected = reference.linear_silu_mul(x, weight)
    assert_as_exact_as_torch(actual, expected, exact, floor=last_bit(exact, dtype))


@half_dtypes
@some_rows
def test_the_residual_and_its_norm_are_as_exact_as_in_torch(rows: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, 256, dtype=dtype), randn(64, 256, seed=1, dtype=dtype)
    residual, norm_weight = randn(rows, 64, seed=2, dtype=dtype), randn(64, seed=3, dtype=dtype)
    exact_sum = x.double() @ weight.double().T + residual.double()
    exact = reference.rms_norm(exact_sum, norm_weight.double(), 1e-6)
    expected, expected_sum = reference.linear_add_norm(x, weight, residual.clone(), norm_weight, 1e-6)
    with beside_another():
        actual, actual_sum = linear_add_norm(*(t.to(DEVICE) for t in (x, weight, residual, norm_weight)), 1e-6)
    assert_as_exact_as_torch(actual_sum, expected_sum, exact_sum, floor=last_bit(exact_sum, dtype))
    assert_as_exact_as_torch(actual, expected, exact, floor=last_bit(exact, dtype))


@half_dtypes
def test_rounds_where_the_reference_rounds(dtype: torch.dtype) -> None:
    """Each sum has two terms, so it is the same in any order; what is not is where it is rounded."""
    rows, depth = 20, 128
    x = torch.zeros(rows, depth, dtype=dtype)
    x[:, :2] = 1
    residual, norm_weight = randn(rows, 64, seed=2, dtype=dtype), randn(64, seed=3, dtype=dtype)
    weight = randn(128, depth, seed=1, dtype=dtype)
    weight[:, 1] /= 300
    product = torch.nn.functional.linear(x.float(), weight.float())
    assert (product != product.to(dtype)).float().mean() > 0.9
    inputs = x, weight[:64].clone(), residual.clone(), norm_weight
    total = linear_add_norm(*(t.to(DEVICE) for t in inputs), 1e-6)[1]
    assert torch.equal(total.cpu(), product[:, :64].to(dtype) + residual)
    gated = linear_silu_mul(x.to(DEVICE), weight.to(DEVICE)).cpu()
    same = gated == reference.silu_mul(product.to(dtype))
    assert same.float().mean() > 0.98, "the exponential may differ in its last bit"


@pytest.mark.parametrize("beside", [False, True])
def test_a_row_does_not_depend_on_how_many_there_are(beside: bool) -> None:
    """From 17 to 128 rows, and beside another half from 1 on."""
    dtype = torch.float16
    x, weight = randn(MAX_ROWS, 256, dtype=dtype, device=DEVICE), randn(64, 256, seed=1, dtype=dtype, device=DEVICE)
    with beside_another() if beside else nullcontext():
        whole = linear(x, weight)
        for rows in (*((1, FEW_ROWS) if beside else ()), FEW_ROWS + 1, 64, 70):
            assert torch.equal(linear(x[:rows].clone(), weight), whole[:rows])


@half_dtypes
def test_a_nan_row_stays_alone_and_what_lies_behind_the_rows_is_not_read(dtype: torch.dtype) -> None:
    rows = 70
    poisoned = torch.full((MAX_ROWS, 128), torch.nan, dtype=dtype, device=DEVICE)
    poisoned[:rows] = randn(rows, 128, dtype=dtype)
    poisoned[3] = torch.nan
    weight = randn(64, 128, seed=1, dtype=dtype, device=DEVICE)
    for product in (tiled_linear(poisoned[:rows], weight), tiled_linear_parts(poisoned[:rows], weight).sum(0)):
        assert product.isnan().any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "suits"),
    [
        (MAX_ROWS, (64, 128), torch.float16, True),
        (MAX_ROWS + 1, (64, 128), torch.float16, False),
        (0, (64, 128), torch.float16, False),
        (20, (40, 128), torch.float16, False),
        (20, (64, 96), torch.float16, False),
        (20, (64, 128), torch.float32, False),
        (20, (2**13, 2**10), torch.bfloat16, True),
        (20, (2**14, 2**10), torch.bfloat16, False),
    ],
)
def test_what_does_not_suit_is_left_to_the_library(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, suits: bool
) -> None:
    assert tiles_suit(torch.empty(rows, shape[1], dtype=dtype), torch.empty(shape, dtype=dtype)) == suits
