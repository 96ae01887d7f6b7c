"""The fused projection to queries, keys and values, with what is done to these before attention."""

from torch import Tensor

from kernels import hopper
from kernels.linear import linear
from kernels.norm_rotary_store import norm_rotary_store


def linear_norm_rotary_store(
    x: Tensor,
    weight: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    rotary: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """norm_rotary_store of x [T, in] times the transpose of contiguous [(Q + 2 K) H, in]: queries [T, Q, H]."""
    head_size = k_cache.shape[3]
    if hopper.is_product_of_many(x, weight) and hopper.takes_heads(head_size):
        from kernels.hopper_products import hopper_linear_norm_rotary_store as fused

        return fused(x, weight, q_weight, k_weight, eps, rotary, positions, k_cache, v_cache, slots)
    qkv = linear(x, weight).unflatten(-1, (-1, head_size))
    return norm_rotary_store(qkv, q_weight, k_weight, eps, rotary, positions, k_cache, v_cache, slots)
