"""Query and key norm, rotary embedding and the KV cache's write, in one pass over the fused projection."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent_launch, overlap_next, wait_for_previous


def norm_rotary_store(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    rotary: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Queries [T, Q, H] of contiguous `qkv` [T, Q + 2 K, H], normed and rotated, written over the projection's.

    Keys, likewise, and values go into the caches [blocks, K, S, H] at `slots` (int64 [T]; -1 writes nothing).
    `rotary` is float32 [positions, 2, H / 2], `positions` int64 [T].
    """
    num_tokens, num_heads, head_size = qkv.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_q_heads = num_heads - 2 * num_kv_heads
    if num_tokens:
        _norm_rotary_store[(num_tokens, 2)](
            qkv,
            q_weight,
            k_weight,
            rotary,
            positions,
            slots,
            k_cache,
            v_cache,
            eps,
            k_cache.stride(0),
            v_cache.stride(0),
            NUM_Q=num_q_heads,
            NUM_KV=num_kv_heads,
            HALF=head_size // 2,
            BLOCK_SIZE=block_size,
            Q_ROWS=triton.next_power_of_2(num_q_heads),
            KV_ROWS=triton.next_power_of_2(num_kv_heads),
            num_warps=4,
            **dependent_launch(qkv.device),
        )
    return qkv[:, :num_q_heads]


@triton.jit
def _norm_rotary_store(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rotary_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    k_block_stride,
    v_block_stride,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for a token's queries, one for its keys and values."""
    overlap_next(PDL)
    HEAD_SIZE: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    token_ptr = qkv_ptr + token * ((NUM_Q + 2 * NUM_KV) * HEAD_SIZE)
    position = tl.load(positions_ptr + token)
    column = tl.arange(0, HALF)
    cos = tl.load(rotary_ptr + position * HEAD_SIZE + column)[None, :]
    sin = tl.load(rotary_ptr + position * HEAD_SIZE + HALF + column)[None, :]
    if tl.program_id(1) == 0:
        q_head = tl.arange(0, Q_ROWS)[:, None]
        q_at = token_ptr + q_head * HEAD_SIZE + column[None, :]
        q_mask = (q_head < NUM_Q) & (column[None, :] < HALF)
        wait_for_previous(PDL)
        q_first, q_second = _norm_rotate(q_at, q_mask, q_weight_ptr, column, cos, sin, eps, HALF)
        tl.store(q_at, q_first, mask=q_mask)
        tl.store(q_at + HALF, q_second, mask=q_mask)
    else:
        slot = tl.load(slots_ptr + token)
        wait_for_previous(PDL)
        if slot >= 0:
            block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            head = tl.arange(0, KV_ROWS)[:, None]
            mask = (head < NUM_KV) & (column[None, :] < HALF)
            place = (head * BLOCK_SIZE + offset) * HEAD_SIZE + column[None, :]
            k_at = token_ptr + (NUM_Q + head) * HEAD_SIZE + column[None, :]
            k_first, k_second = _norm_rotate(k_at, mask, k_weight_ptr, column, cos, sin, eps, HALF)
            tl.store(k_cache_ptr + block * k_block_stride + place, k_first, mask=mask)
            tl.store(k_cache_ptr + block * k_block_stride + place + HALF, k_second, mask=mask)
            v_at = k_at + NUM_KV * HEAD_SIZE
            v_first = tl.load(v_at, mask=mask, other=0.0)
            v_second = tl.load(v_at + HALF, mask=mask, other=0.0)
            tl.store(v_cache_ptr + block * v_block_stride + place, v_first, mask=mask)
            tl.store(v_cache_ptr + block * v_block_stride + place + HALF, v_second, mask=mask)


@triton.jit
def _norm_rotate(at, mask, weight_ptr, column, cos, sin, eps, HALF: tl.constexpr):
    """Both halves [heads, HALF] of normed, rotated heads; rounded to their dtype where the reference rounds."""
    first = tl.load(at, mask=mask, other=0.0)
    second = tl.load(at + HALF, mask=mask, other=0.0)
    dtype = first.dtype
    first_wide, second_wide = first.to(tl.float32), second.to(tl.float32)
    squares = tl.sum(first_wide * first_wide, 1) + tl.sum(second_wide * second_wide, 1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    first_weight = tl.load(weight_ptr + column)[None, :].to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF + column)[None, :].to(tl.float32)
    first_wide = ((first_wide * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
    second_wide = ((second_wide * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
    return (first_wide * cos - second_wide * sin).to(dtype), (second_wide * cos + first_wide * sin).to(dtype)
