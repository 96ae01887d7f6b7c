"""Causal attention of packed queries over the paged KV cache: whole prompts, chunks of prompts, and prefix hits."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_work import ITEM_FIELDS, PrefillWork
from kernels.launch import STANDS_ALONE, dependent_launch, num_programs, overlap_next, wait_for_previous
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
    programs_per_sm: int = 1
    registers: int | None = 168
    """Of a thread, at most."""
    dependent: bool = True
    """Whether it takes part in programmatic dependent launch."""


def prefill_tuning(dtype: torch.dtype, head_size: int) -> PrefillTuning:
    if dtype == torch.float32 or head_size > 128:
        return PrefillTuning(rows=32, tile=32, num_warps=4, num_stages=2, registers=None)
    return PrefillTuning()


def tokens_per_item(dtype: torch.dtype, head_size: int, group: int) -> int:
    """Most queries of one item, of `group` heads for each KV head."""
    return max(prefill_tuning(dtype, head_size).rows // group, 1)


def paged_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    work: PrefillWork,
    layer: int,
    scale: float,
    out: Tensor,
    tuning: PrefillTuning | None = None,
) -> None:
    """Write to contiguous `out` [T, Q, H] the attention of packed queries [T, Q, H]; each sees keys up to its own.

    Queries are contiguous but for the first dimension. Caches are [blocks, K, S, H], `block_tables` int32 [table rows,
    W]. An item of `work` has at most tokens_per_item queries; output of queries that none names is not written.
    """
    assert k_cache.stride() == v_cache.stride()
    num_q_heads, head_size = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    tuning = tuning or prefill_tuning(q.dtype, head_size)
    _prefill[(num_programs(q.device) * tuning.programs_per_sm,)](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        work.items,
        work.bounds[2:],
        work.counters[layer:],
        scale * LOG2_E,
        q.stride(0),
        block_tables.stride(0),
        k_cache.stride(0),
        NUM_KV=num_kv_heads,
        GROUP=group,
        ROWS=max(tuning.rows, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        TILE=tuning.tile,
        STAGES=tuning.num_stages,
        PRECISION=dot_precision(q.dtype),
        num_warps=tuning.num_warps,
        maxnreg=tuning.registers,
        **(dependent_launch(q.device) if tuning.dependent else STANDS_ALONE),
    )


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tables_ptr,
    items_ptr,
    num_items_ptr,
    counter_ptr,
    scale,
    q_stride,
    table_stride,
    block_stride,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of each item and KV head first the keys that every query of the tile sees, then those at the diagonal."""
    overlap_next(PDL)
    NUM_Q: tl.constexpr = NUM_KV * GROUP
    column = tl.arange(0, HEAD_SIZE)
    tile_row = tl.arange(0, ROWS)
    token = tile_row // GROUP
    num_work = tl.load(num_items_ptr) * NUM_KV
    programs = tl.num_programs(0)
    # Dealt out and drawn as in paged_decode_attention.py.
    index = tl.program_id(0)
    next_index = 2 * programs - 1 - index
    first_query, num_queries, slot, first_position = _item(items_ptr, index, num_work, NUM_KV)
    tile = tl.arange(0, TILE)
    blocks = block_ids(tables_ptr + slot.to(tl.int64) * table_stride, tile, first_position + num_queries, BLOCK_SIZE)
    wait_for_previous(PDL)
    while index < num_work:
        drawn = tl.atomic_add(counter_ptr, 1) + 2 * programs
        next_query, next_queries, next_slot, next_position = _item(items_ptr, next_index, num_work, NUM_KV)
        head = index % NUM_KV
        table_ptr = tables_ptr + slot.to(tl.int64) * table_stride
        end = first_position + num_queries
        mask = (token < num_queries)[:, None]
        q_head = head * GROUP + tile_row % GROUP
        query = (first_query + token).to(tl.int64)
        q = tl.load(q_ptr + (query * q_stride + q_head * HEAD_SIZE)[:, None] + column[None, :], mask=mask, other=0.0)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, HEAD_SIZE], tl.float32)
        for first in tl.range(0, end, TILE, num_stages=STAGES):
            position = first + tile
            at = tile_offsets(blocks, position, head, block_stride, BLOCK_SIZE, HEAD_SIZE)
            k = tl.load(k_ptr + at)
            v = tl.load(v_ptr + at, mask=(position < end)[:, None], other=0.0)
            blocks = block_ids(table_ptr, position + TILE, end, BLOCK_SIZE)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if first + TILE > first_position:  # at the diagonal
                scores = tl.where(position[None, :] <= first_position + token[:, None], scores, float("-inf"))
            best, total, out = softmax_step(scores, scale, v, best, total, out, PRECISION)
        next_table_ptr = tables_ptr + next_slot.to(tl.int64) * table_stride
        blocks = block_ids(next_table_ptr, tile, next_position + next_queries, BLOCK_SIZE)
        out_at = ((query * NUM_Q + q_head) * HEAD_SIZE)[:, None] + column[None, :]
        tl.store(out_ptr + out_at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
        index, next_index = next_index, drawn
        first_query, num_queries, slot, first_position = next_query, next_queries, next_slot, next_position


@triton.jit
def _item(items_ptr, index, num_work, NUM_KV: tl.constexpr):
    """First query, queries, row of the tables, position of the first query."""
    live = index < num_work
    item_ptr = items_ptr + (index // NUM_KV) * _FIELDS
    first_query = tl.load(item_ptr, mask=live, other=0)
    num_queries = tl.load(item_ptr + 1, mask=live, other=0)
    slot = tl.load(item_ptr + 2, mask=live, other=0)
    first_position = tl.load(item_ptr + 3, mask=live, other=0)
    return first_query, num_queries, slot, first_position
