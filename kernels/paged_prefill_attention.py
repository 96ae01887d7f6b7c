"""Causal attention of packed queries over the paged KV cache: whole prompts, chunks of prompts, and prefix hits."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_work import ITEM_FIELDS
from kernels.paged_tiles import LOG2_E, block_ids, dot_precision, softmax_step, tile_offsets

_FIELDS = tl.constexpr(ITEM_FIELDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTuning:
    """Sizes of the kernel; measured in NOTES.md."""

    rows: int = 128
    """Queries of one KV head that a program takes: tokens times queries of a group."""
    tile: int = 64
    """Keys at once."""
    num_warps: int = 8
    num_stages: int = 3


def prefill_tuning(dtype: torch.dtype, head_size: int) -> PrefillTuning:
    if dtype == torch.float32 or head_size > 128:
        return PrefillTuning(rows=32, tile=32, num_warps=4, num_stages=2)
    return PrefillTuning()


def tokens_per_item(dtype: torch.dtype, head_size: int, group: int) -> int:
    """Most queries of one item, of `group` heads for each KV head."""
    return max(prefill_tuning(dtype, head_size).rows // group, 1)


def paged_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    items: Tensor,
    scale: float,
    out: Tensor,
    tuning: PrefillTuning | None = None,
) -> None:
    """Write to contiguous `out` [T, Q, H] the attention of packed queries [T, Q, H]; each sees keys up to its own.

    Queries are contiguous but for the first dimension. Caches are [blocks, K, S, H], `block_tables` int32 [table rows, W]. `items`, int32 [N, ITEM_FIELDS], cover the
    queries: (first query, queries, row of the block tables, position of the first query in its sequence), at most
    tokens_per_item queries each.
    """
    num_q_heads, head_size = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    tuning = tuning or prefill_tuning(q.dtype, head_size)
    _prefill[(num_kv_heads, len(items))](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        items,
        scale * LOG2_E,
        q.stride(0),
        block_tables.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        NUM_KV=num_kv_heads,
        GROUP=group,
        ROWS=max(tuning.rows, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        TILE=tuning.tile,
        STAGES=tuning.num_stages,
        PRECISION=dot_precision(q.dtype),
        num_warps=tuning.num_warps,
    )


@triton.jit(do_not_specialize=["q_stride", "table_stride"])
def _prefill(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tables_ptr,
    items_ptr,
    scale,
    q_stride,
    table_stride,
    k_block_stride,
    v_block_stride,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One item and KV head: first the keys that every query of the tile sees, then those at the diagonal."""
    NUM_Q: tl.constexpr = NUM_KV * GROUP
    head = tl.program_id(0)
    item_ptr = items_ptr + tl.program_id(1) * _FIELDS
    first_query = tl.load(item_ptr)
    num_queries = tl.load(item_ptr + 1)
    table_ptr = tables_ptr + tl.load(item_ptr + 2).to(tl.int64) * table_stride
    first_position = tl.load(item_ptr + 3)
    end = first_position + num_queries
    column = tl.arange(0, HEAD_SIZE)
    tile_row = tl.arange(0, ROWS)
    token = tile_row // GROUP
    mask = (token < num_queries)[:, None]
    q_head = head * GROUP + tile_row % GROUP
    query = (first_query + token).to(tl.int64)
    q = tl.load(q_ptr + (query * q_stride + q_head * HEAD_SIZE)[:, None] + column[None, :], mask=mask, other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, HEAD_SIZE], tl.float32)
    seen_by_all = (first_position + 1) // TILE * TILE
    blocks = block_ids(table_ptr, tl.arange(0, TILE), end, BLOCK_SIZE)
    for first in tl.range(0, seen_by_all, TILE, num_stages=STAGES):
        position = first + tl.arange(0, TILE)
        k = tl.load(k_ptr + tile_offsets(blocks, position, head, k_block_stride, BLOCK_SIZE, HEAD_SIZE))
        v = tl.load(v_ptr + tile_offsets(blocks, position, head, v_block_stride, BLOCK_SIZE, HEAD_SIZE))
        blocks = block_ids(table_ptr, position + TILE, end, BLOCK_SIZE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        best, total, out = softmax_step(scores, v, best, total, out, PRECISION)
    for first in tl.range(seen_by_all, end, TILE, num_stages=STAGES):
        position = first + tl.arange(0, TILE)
        live = (position < end)[:, None]
        k = tl.load(
            k_ptr + tile_offsets(blocks, position, head, k_block_stride, BLOCK_SIZE, HEAD_SIZE), mask=live, other=0.0
        )
        v = tl.load(
            v_ptr + tile_offsets(blocks, position, head, v_block_stride, BLOCK_SIZE, HEAD_SIZE), mask=live, other=0.0
        )
        blocks = block_ids(table_ptr, position + TILE, end, BLOCK_SIZE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(position[None, :] <= first_position + token[:, None], scores, float("-inf"))
        best, total, out = softmax_step(scores, v, best, total, out, PRECISION)
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + ((query * NUM_Q + q_head) * HEAD_SIZE)[:, None] + column[None, :], out, mask=mask)
