"""The operations of reference.py as Triton kernels, attention apart; products of many rows are cuBLAS's."""

from kernels.embed import embed
from kernels.linear import linear
from kernels.linear_add_norm import linear_add_norm
from kernels.linear_norm_rotary_store import linear_norm_rotary_store
from kernels.linear_sample import linear_sample
from kernels.linear_silu_mul import linear_silu_mul
from kernels.rms_norm import rms_norm

__all__ = [
    "embed",
    "linear",
    "linear_add_norm",
    "linear_norm_rotary_store",
    "linear_sample",
    "linear_silu_mul",
    "rms_norm",
]
