"""The operations of reference.py as Triton kernels, attention apart; products of many rows are cuBLAS's."""

from kernels.embed import embed
from kernels.linear import linear
from kernels.norm_rotary_store import norm_rotary_store
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.sample import sample
from kernels.silu_mul import silu_mul

__all__ = ["add_rms_norm", "embed", "linear", "norm_rotary_store", "rms_norm", "sample", "silu_mul"]
