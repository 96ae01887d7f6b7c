"""A product that goes into the residual stream, with the norm that follows."""

from torch import Tensor

from kernels.launch import runs_beside
from kernels.linear import FEW_ROWS, linear
from kernels.rms_norm import add_parts_rms_norm, add_rms_norm, rms_norm
from kernels.tiled_linear import tiled_linear_parts, tiles_suit

MANY_ROWS = 512
"""From here the norm costs what its bytes cost, and the product adds the residual: a third less of them."""


def linear_add_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(y), y) of y = x times the transpose of weight + residual [N, out], which is written over."""
    if (len(x) > FEW_ROWS or runs_beside()) and tiles_suit(x, weight):
        return add_parts_rms_norm(tiled_linear_parts(x, weight), residual, norm_weight, eps)
    if len(x) >= MANY_ROWS:
        residual.addmm_(x, weight.t())
        return rms_norm(residual, norm_weight, eps), residual
    return add_rms_norm(linear(x, weight), residual, norm_weight, eps)
