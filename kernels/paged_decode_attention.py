"""Attention of one query a sequence over the paged KV cache, cut into chunks of each sequence's tokens (split KV).

Programs stay on the device for the whole launch and draw chunks, longest first, from a counter: so a batch of unequal
lengths keeps every multiprocessor busy, and a CUDA graph's fixed grid serves any batch. What it can reach is the speed
at which K and V are read once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_work import ITEM_FIELDS, DecodeWork
from kernels.launch import STANDS_ALONE, dependent_launch, num_programs, overlap_next, runs_beside, wait_for_previous
from kernels.paged_tiles import LOG2_E, block_ids, dot_precision, softmax_step, tile_offsets

_FIELDS = tl.constexpr(ITEM_FIELDS)
PARTS = 16
"""Partials of a row that are added up at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTuning:
    """Sizes of the kernel; measured in NOTES.md."""

    tile: int = 32
    """Tokens whose keys and values are read at once."""
    num_warps: int = 2
    num_stages: int = 3
    programs_per_sm: int = 6

    max_registers: int = 255
    dependent: bool = True
    """Whether it takes part in programmatic dependent launch."""

    @property
    def registers(self) -> int:
        """Of a thread, at most, for that many programs to be resident."""
        return min(65536 // (32 * self.num_warps * self.programs_per_sm) // 8 * 8, self.max_registers)


PROGRAMS_BESIDE = 2
"""On a multiprocessor, of a half that runs beside another: the other's matrix products fit there too."""


def decode_tuning(dtype: torch.dtype, head_size: int, num_rows: int) -> DecodeTuning:
    """What was measured fastest for steps of so many rows."""
    if dtype == torch.float32 or head_size > 128:
        return DecodeTuning(num_warps=4, num_stages=2, programs_per_sm=2)
    if runs_beside():
        return DecodeTuning(tile=64, num_warps=4, programs_per_sm=PROGRAMS_BESIDE)
    if num_rows <= 256:
        return DecodeTuning(tile=64, num_warps=4, programs_per_sm=3)
    return DecodeTuning()


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    work: DecodeWork,
    layer: int,
    scale: float,
    out: Tensor,
    tuning: DecodeTuning | None = None,
) -> None:
    """Write to contiguous `out` [B, Q, H] the attention of queries [B, Q, H] over what `work` says.

    Queries are contiguous but for the first dimension. Caches are [blocks, K, S, H], `block_tables` int32 [table rows,
    W]. Rows that `work` does not name are not written. Prefix items must have run (shared_prefix_attention.py).
    """
    assert k_cache.stride() == v_cache.stride()
    num_q_heads, head_size = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    tuning = tuning or decode_tuning(q.dtype, head_size, len(q))
    _decode[(num_programs(q.device) * tuning.programs_per_sm,)](
        q,
        k_cache,
        v_cache,
        out,
        work.partial_out,
        work.partial_lse,
        block_tables,
        work.items,
        work.num_items,
        work.counters[layer:],
        scale * LOG2_E,
        q.stride(0),
        block_tables.stride(0),
        k_cache.stride(0),
        NUM_KV=num_kv_heads,
        GROUP=group,
        GROUP_ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        TILE=tuning.tile,
        STAGES=tuning.num_stages,
        PRECISION=dot_precision(q.dtype),
        HAS_PREFIXES=work.shares_prefixes,
        num_warps=tuning.num_warps,
        maxnreg=tuning.registers if work.shares_prefixes else None,  # without, as few without being told
        **(dependent_launch(q.device) if tuning.dependent else STANDS_ALONE),
    )
    if work.cuts_rows:
        merge_partials(out, work, num_kv_heads)


def merge_partials(out: Tensor, work: DecodeWork, num_kv_heads: int) -> None:
    """Write to out [B, Q, H] the rows that have partials."""
    num_q_heads, head_size = out.shape[1:]
    group = num_q_heads // num_kv_heads
    grid = min(len(out) * num_kv_heads, num_programs(out.device) * 4)
    _merge[(grid,)](
        out,
        work.partial_out,
        work.partial_lse,
        work.merges,
        work.num_merges,
        NUM_KV=num_kv_heads,
        GROUP=group,
        GROUP_ROWS=triton.next_power_of_2(group),
        HEAD_SIZE=head_size,
        PARTS=PARTS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["table_stride"])
def _decode(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_out_ptr,
    partial_lse_ptr,
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
    GROUP_ROWS: tl.constexpr,  # the matrix unit's 16 rows, of which GROUP are queries
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_PREFIXES: tl.constexpr,
    PDL: tl.constexpr,
):
    NUM_Q: tl.constexpr = NUM_KV * GROUP
    group_row = tl.arange(0, GROUP_ROWS)
    column = tl.arange(0, HEAD_SIZE)
    row_mask = group_row[:, None] < GROUP
    num_work = tl.load(num_items_ptr) * NUM_KV
    programs = tl.num_programs(0)
    # Two rounds are dealt out, the second in reverse, so that who begins with the longest goes on with the shortest;
    # what is left is drawn from the counter. Numbers are known two items ahead and items one: nobody waits for either.
    index = tl.program_id(0)
    next_index = 2 * programs - 1 - index
    row, slot, start, end, partial = _item(items_ptr, index, num_work, NUM_KV)
    blocks = _first_blocks(tables_ptr, slot, table_stride, start, end, TILE, BLOCK_SIZE)
    wait_for_previous(PDL)
    while index < num_work:
        drawn = tl.atomic_add(counter_ptr, 1) + 2 * programs
        next_row, next_slot, next_start, next_end, next_partial = _item(items_ptr, next_index, num_work, NUM_KV)
        head = index % NUM_KV
        table_ptr = tables_ptr + slot.to(tl.int64) * table_stride
        q_head = head * GROUP + group_row
        place = q_head[:, None] * HEAD_SIZE + column[None, :]
        q = tl.load(q_ptr + row.to(tl.int64) * q_stride + place, mask=row_mask, other=0.0)
        best = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
        out = tl.zeros([GROUP_ROWS, HEAD_SIZE], tl.float32)
        if HAS_PREFIXES:
            item_ptr = items_ptr + (index // NUM_KV) * _FIELDS
            before = tl.load(item_ptr + 5)
            for i in tl.range(0, tl.load(item_ptr + 6)):
                at = (before + i).to(tl.int64) * NUM_Q
                lse = tl.load(partial_lse_ptr + at + q_head, mask=group_row < GROUP, other=0.0)
                part = tl.load(partial_out_ptr + at * HEAD_SIZE + place, mask=row_mask, other=0.0)
                best, total, out = _add_partial(best, total, out, lse, part)
        # The block ids of a tile are read while the tile before it is at work: with the ids' read inside its own
        # iteration the pipeline would hold one tile, whatever the number of stages.
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
        blocks = _first_blocks(tables_ptr, next_slot, table_stride, next_start, next_end, TILE, BLOCK_SIZE)
        out = out / total[:, None]
        if partial < 0:
            out_at = row.to(tl.int64) * (NUM_Q * HEAD_SIZE) + place
            tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=row_mask)
        else:
            out_at = partial.to(tl.int64) * (NUM_Q * HEAD_SIZE) + place
            tl.store(partial_out_ptr + out_at, out, mask=row_mask)
            lse = best + tl.log2(total)
            tl.store(partial_lse_ptr + partial.to(tl.int64) * NUM_Q + q_head, lse, mask=group_row < GROUP)
        index, next_index = next_index, drawn
        row, slot, start, end, partial = next_row, next_slot, next_start, next_end, next_partial
    overlap_next(PDL)  # not before: whoever came early would wait in the place of this kernel's programs, or others


@triton.jit
def _first_blocks(tables_ptr, slot, table_stride, start, end, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block ids of an item's first tile."""
    return block_ids(tables_ptr + slot.to(tl.int64) * table_stride, start + tl.arange(0, TILE), end, BLOCK_SIZE)


@triton.jit
def _item(items_ptr, index, num_work, NUM_KV: tl.constexpr):
    """Row of q, row of the tables, first and end token, partial."""
    live = index < num_work
    item_ptr = items_ptr + (index // NUM_KV) * _FIELDS
    row = tl.load(item_ptr, mask=live, other=0)
    slot = tl.load(item_ptr + 1, mask=live, other=0)
    start = tl.load(item_ptr + 2, mask=live, other=0)
    end = tl.load(item_ptr + 3, mask=live, other=0)
    partial = tl.load(item_ptr + 4, mask=live, other=0)
    return row, slot, start, end, partial


@triton.jit
def _add_partial(best, total, out, lse, part):
    """Weigh a partial by its share of the softmax's sum."""
    new_best = tl.maximum(best, lse)
    decay, weight = tl.exp2(best - new_best), tl.exp2(lse - new_best)
    return new_best, total * decay + weight, out * decay[:, None] + part * weight[:, None]


@triton.jit
def _merge(
    out_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    merges_ptr,
    num_merges_ptr,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add up a row's partials in the order of the tokens, PARTS at a time: their reads wait once.

    No part of dependent launch: its programs would be there early, and hold back the decode kernel's (NOTES.md).
    """
    NUM_Q: tl.constexpr = NUM_KV * GROUP
    part = tl.arange(0, PARTS)
    group_row = tl.arange(0, GROUP_ROWS)
    row_mask = group_row < GROUP
    num_work = tl.load(num_merges_ptr) * NUM_KV
    for index in tl.range(tl.program_id(0), num_work, tl.num_programs(0)):
        merge_ptr = merges_ptr + (index // NUM_KV) * 4
        row = tl.load(merge_ptr)
        first = tl.load(merge_ptr + 1)
        count = tl.load(merge_ptr + 2)
        q_head = (index % NUM_KV) * GROUP + group_row
        place = q_head[:, None] * HEAD_SIZE + tl.arange(0, HEAD_SIZE)[None, :]
        best = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
        out = tl.zeros([GROUP_ROWS, HEAD_SIZE], tl.float32)
        for i in tl.range(0, count, PARTS):
            live = (i + part < count)[:, None] & row_mask[None, :]
            at = (first + i + part).to(tl.int64) * NUM_Q
            lse = tl.load(partial_lse_ptr + at[:, None] + q_head[None, :], mask=live, other=float("-inf"))
            value_at = partial_out_ptr + (at * HEAD_SIZE)[:, None, None] + place[None, :, :]
            value = tl.load(value_at, mask=live[:, :, None], other=0.0)
            new_best = tl.maximum(best, tl.where(row_mask, tl.max(lse, 0), 0.0))
            decay, weight = tl.exp2(best - new_best), tl.exp2(lse - new_best[None, :])
            total = total * decay + tl.sum(weight, 0)
            out = out * decay[:, None] + tl.sum(value * weight[:, :, None], 0)
            best = new_best
        out = out / tl.where(row_mask, total, 1.0)[:, None]
        out_at = row.to(tl.int64) * (NUM_Q * HEAD_SIZE) + place
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])
