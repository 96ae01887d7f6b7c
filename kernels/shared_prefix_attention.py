"""Attention of sequences that share their leading blocks over that prefix, which is read once for all of them.

The first level of Hydragen (arXiv 2402.05099) and of cascade inference: queries of many sequences meet the shared keys
in one matrix product; merge_partials joins the result with each sequence's own tokens, exactly.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_work import ITEM_FIELDS, DecodeWork
from kernels.launch import dependent_launch, num_programs, overlap_next, wait_for_previous
from kernels.paged_tiles import LOG2_E, block_ids, dot_precision, softmax_step, tile_offsets

_FIELDS = tl.constexpr(ITEM_FIELDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTuning:
    rows: int = 128
    """Queries of one KV head that a program takes: members times queries of a group."""
    tile: int = 64
    num_warps: int = 8
    num_stages: int = 3


def prefix_tuning(dtype: torch.dtype, head_size: int) -> PrefixTuning:
    if dtype == torch.float32 or head_size > 128:
        return PrefixTuning(rows=32, tile=32, num_warps=4, num_stages=2)
    return PrefixTuning()


def members_per_item(dtype: torch.dtype, head_size: int, group: int) -> int:
    """Most members of one prefix item, of `group` queries for each KV head."""
    return max(prefix_tuning(dtype, head_size).rows // group, 1)


def shared_prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    work: DecodeWork,
    scale: float,
    tuning: PrefixTuning | None = None,
) -> None:
    """Fill the partials of `work`'s prefix items from queries [B, Q, H]; see paged_decode_attention for the rest."""
    assert k_cache.stride() == v_cache.stride()
    num_q_heads, head_size = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    tuning = tuning or prefix_tuning(q.dtype, head_size)
    _prefix[(num_programs(q.device),)](
        q,
        k_cache,
        v_cache,
        work.partial_out,
        work.partial_lse,
        block_tables,
        work.prefix_items,
        work.num_prefix_items,
        work.members,
        work.member_partials,
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
        **dependent_launch(q.device),
    )


@triton.jit(do_not_specialize=["table_stride"])
def _prefix(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    tables_ptr,
    items_ptr,
    num_items_ptr,
    members_ptr,
    member_partials_ptr,
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
    overlap_next(PDL)
    NUM_Q: tl.constexpr = NUM_KV * GROUP
    tile_row = tl.arange(0, ROWS)
    column = tl.arange(0, HEAD_SIZE)
    num_work = tl.load(num_items_ptr) * NUM_KV
    wait_for_previous(PDL)
    for index in tl.range(tl.program_id(0), num_work, tl.num_programs(0)):
        item_ptr = items_ptr + (index // NUM_KV) * _FIELDS
        head = index % NUM_KV
        table_ptr = tables_ptr + tl.load(item_ptr).to(tl.int64) * table_stride
        first_member = tl.load(item_ptr + 1)
        num_members = tl.load(item_ptr + 2)
        start = tl.load(item_ptr + 3)
        end = tl.load(item_ptr + 4)
        chunk = tl.load(item_ptr + 5)
        mask = tile_row // GROUP < num_members
        member = first_member + tile_row // GROUP
        row = tl.load(members_ptr + member, mask=mask, other=0).to(tl.int64)
        partial = tl.load(member_partials_ptr + member, mask=mask, other=0).to(tl.int64) + chunk
        q_head = head * GROUP + tile_row % GROUP
        q_at = (row * q_stride + q_head * HEAD_SIZE)[:, None] + column[None, :]
        q = tl.load(q_ptr + q_at, mask=mask[:, None], other=0.0)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, HEAD_SIZE], tl.float32)
        blocks = block_ids(table_ptr, start + tl.arange(0, TILE), end, BLOCK_SIZE)
        for first in tl.range(start, end, TILE, num_stages=STAGES):
            position = first + tl.arange(0, TILE)
            live = position < end
            at = tile_offsets(blocks, position, head, block_stride, BLOCK_SIZE, HEAD_SIZE)
            k = tl.load(k_ptr + at, mask=live[:, None], other=0.0)
            v = tl.load(v_ptr + at, mask=live[:, None], other=0.0)
            blocks = block_ids(table_ptr, position + TILE, end, BLOCK_SIZE)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores = tl.where(live[None, :], scores, float("-inf"))
            best, total, out = softmax_step(scores, scale, v, best, total, out, PRECISION)
        out = out / total[:, None]
        out_at = ((partial * NUM_Q + q_head) * HEAD_SIZE)[:, None] + column[None, :]
        tl.store(partial_out_ptr + out_at, out, mask=mask[:, None])
        tl.store(partial_lse_ptr + partial * NUM_Q + q_head, best + tl.log2(total), mask=mask)
