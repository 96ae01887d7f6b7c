"""The first product of a gated MLP, with its activation."""

from torch import Tensor

from kernels import hopper
from kernels.launch import runs_beside
from kernels.linear import FEW_ROWS, linear
from kernels.silu_mul import silu_mul
from kernels.tiled_linear import tiled_linear_silu_mul, tiles_suit


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up [N, width] of x [N, in] times the transpose of contiguous [gate | up, in]."""
    if (len(x) > FEW_ROWS or runs_beside()) and tiles_suit(x, weight):
        return tiled_linear_silu_mul(x, weight)
    if hopper.is_product_of_many(x, weight):
        from kernels.hopper_products import hopper_linear_silu_mul

        return hopper_linear_silu_mul(x, weight)
    return silu_mul(linear(x, weight))
