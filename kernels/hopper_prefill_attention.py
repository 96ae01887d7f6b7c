"""paged_prefill_attention for compute capability 9.0: FlashAttention-3's division of labour over a paged KV cache.

One warp copies queries and keys, another values, straight from the blocks of the cache; two groups of warps attend
with 64 rows each (arXiv 2407.08608). A tile's product with the keys and the tile before's with the values are under
way while its softmax is computed.
"""

from dataclasses import dataclass

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention_work import ITEM_FIELDS
from kernels.gluon_names import copy_in, gl, gluon, hopper, view_as
from kernels.hopper import CONSUMERS, PANEL, ROWS
from kernels.launch import num_programs
from kernels.paged_tiles import LOG2_E

_FIELDS = gl.constexpr(ITEM_FIELDS)
_PANEL = gl.constexpr(PANEL)
_ROWS = gl.constexpr(ROWS)
_NOWHERE = gl.constexpr(2**31 - 1024)
"""A row behind the end of any cache: copying from there gives zeros."""
mbarrier = hopper.mbarrier
_WIDE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_WIDE_3 = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperPrefillTuning:
    """Sizes of the kernel; measured in NOTES.md."""

    tile: int
    """Keys at once."""
    stages: int
    """Tiles of keys, and of values, that shared memory holds."""
    registers: int
    """Of a thread that attends."""
    loader_registers: int
    """Of a thread that copies."""

    @property
    def mean_registers(self) -> int:
        """Of a thread at launch, of three groups of warps; a multiple of 8."""
        return (CONSUMERS * self.registers + self.loader_registers) // (CONSUMERS + 1) // 8 * 8


LONG = HopperPrefillTuning(tile=128, stages=3, registers=240, loader_registers=24)
"""For queries that see many keys: takes all of a multiprocessor."""
SHORT = HopperPrefillTuning(tile=64, stages=3, registers=152, loader_registers=32)
"""For others: 43,008 registers and 128 KiB, which leaves room for two programs of decode attention."""


def hopper_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    items: Tensor,
    bounds: Tensor,
    scale: float,
    out: Tensor,
    tuning: HopperPrefillTuning,
) -> None:
    """As paged_prefill_attention, of the items int32 [capacity, ITEM_FIELDS] from bounds[0] to bounds[1], int32 [2].

    hopper.py says which shapes; caches are contiguous. An item has at most 128 rows: tokens times queries of a group.
    """
    num_q_heads, head_size = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    pieces = max(tuning.tile // block_size, 1)
    rows = k_cache.shape[0] * num_kv_heads * block_size
    piece = [tuning.tile // pieces, PANEL]
    keys, values = (
        TensorDescriptor(cache, [rows, head_size], [head_size, 1], piece, _WIDE) for cache in (k_cache, v_cache)
    )
    queries = TensorDescriptor(q, list(q.shape), list(q.stride()), [ROWS // group, group, PANEL], _WIDE_3)
    _prefill[(num_programs(q.device),)](
        queries,
        keys,
        values,
        out,
        block_tables,
        items,
        bounds,
        scale * LOG2_E,
        block_tables.stride(0),
        NUM_KV=num_kv_heads,
        GROUP=group,
        HALVES=head_size // PANEL,
        BLOCK_SIZE=block_size,
        TILE=tuning.tile,
        PIECES=pieces,
        STAGES=tuning.stages,
        REGISTERS=tuning.registers,
        LOADER_REGISTERS=tuning.loader_registers,
        num_warps=4,
        maxnreg=tuning.mean_registers,
    )


@gluon.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["bounds_ptr"])
def _prefill(
    queries,
    keys,
    values,
    out_ptr,
    tables_ptr,
    items_ptr,
    bounds_ptr,
    scale,
    table_stride,
    NUM_KV: gl.constexpr,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """A ring of tiles is its buffers and, of each stage, the barriers that say that it is filled and that it is free.

    Buffers hold panels of 64 columns, a tile's one behind the other, which copies fill piece by piece: a block, or of a
    larger one what the tile has of it. Products see the same memory as whole tiles.
    """
    HEAD_SIZE: gl.constexpr = HALVES * _PANEL
    dtype: gl.constexpr = keys.dtype
    layout: gl.constexpr = keys.layout
    q_panels = gl.allocate_shared_memory(dtype, [2 * HALVES, _ROWS // GROUP, GROUP, _PANEL], queries.layout)
    k_pieces = gl.allocate_shared_memory(dtype, [STAGES * HALVES * PIECES, TILE // PIECES, _PANEL], keys.layout)
    v_pieces = gl.allocate_shared_memory(dtype, [STAGES * HALVES * PIECES, TILE // PIECES, _PANEL], values.layout)
    q_barriers = _barriers(1)
    k_barriers = _barriers(STAGES)
    v_barriers = _barriers(STAGES)
    hopper.fence_async_shared()
    q_tiles = view_as(q_panels, [2, _ROWS, HEAD_SIZE], layout)
    k_tiles = view_as(k_pieces, [STAGES, TILE, HEAD_SIZE], layout)
    v_tiles = view_as(v_pieces, [STAGES, TILE, HEAD_SIZE], layout)
    v_panels = view_as(v_pieces, [STAGES * HALVES, TILE, _PANEL], layout)
    work = (items_ptr, gl.load(bounds_ptr) * NUM_KV, gl.load(bounds_ptr + 1) * NUM_KV)
    tables = (tables_ptr, table_stride)
    tiles = (q_tiles, k_tiles, v_tiles, v_panels)
    barriers = (q_barriers, k_barriers, v_barriers)
    sizes: gl.constexpr = (NUM_KV, GROUP, HALVES, BLOCK_SIZE, TILE, PIECES, STAGES)
    gl.warp_specialize(
        [
            (_attend, (tiles, barriers, out_ptr, work, scale, sizes, 0)),
            (_attend, (tiles, barriers, out_ptr, work, scale, sizes, 1)),
            (_load_queries_and_keys, (queries, keys, q_panels, k_pieces, q_barriers, k_barriers, work, tables, sizes)),
            (_load_values, (values, v_pieces, v_barriers, work, tables, sizes)),
        ],
        [4, 1, 1],
        [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def _barriers(STAGES: gl.constexpr):
    """(filled, free) of each stage: the loader says the one, both groups of warps that attend the other."""
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    return filled, free


@gluon.jit
def _place(turn):
    """Of this program's unit of work in its `turn`: dealt out in order and in reverse, since the longest come first."""
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def _load_queries_and_keys(queries, keys, q_panels, pieces, q_barriers, barriers, work, tables, sizes: gl.constexpr):
    NUM_KV: gl.constexpr = sizes[0]
    GROUP: gl.constexpr = sizes[1]
    HALVES: gl.constexpr = sizes[2]
    items_ptr, begin, until = work
    q_filled, q_free = q_barriers
    count = 0
    turn = 0
    unit = begin + _place(turn)
    while unit < until:
        item_ptr = items_ptr + unit // NUM_KV * _FIELDS
        head = unit % NUM_KV
        first_query = gl.load(item_ptr)
        mbarrier.wait(q_free.index(0), (turn & 1) ^ 1)
        mbarrier.expect(q_filled.index(0), 2 * _ROWS * HALVES * _PANEL * 2)
        for group in gl.static_range(2):
            for half in gl.static_range(HALVES):
                at = [first_query + group * (_ROWS // GROUP), head * GROUP, half * _PANEL]
                copy_in(queries, at, q_filled.index(0), q_panels.index(group * HALVES + half))
        count = _load_row(keys, pieces, barriers, count, item_ptr, head, tables, sizes)
        turn += 1
        unit = begin + _place(turn)


@gluon.jit
def _load_values(values, pieces, barriers, work, tables, sizes: gl.constexpr):
    NUM_KV: gl.constexpr = sizes[0]
    items_ptr, begin, until = work
    count = 0
    turn = 0
    unit = begin + _place(turn)
    while unit < until:
        item_ptr = items_ptr + unit // NUM_KV * _FIELDS
        count = _load_row(values, pieces, barriers, count, item_ptr, unit % NUM_KV, tables, sizes)
        turn += 1
        unit = begin + _place(turn)


@gluon.jit
def _load_row(cache, pieces, barriers, count, item_ptr, head, tables, sizes: gl.constexpr):
    """Copies one head's keys or values that an item sees; blocks behind its end as zeros. The new `count` of tiles."""
    NUM_KV: gl.constexpr = sizes[0]
    HALVES: gl.constexpr = sizes[2]
    BLOCK_SIZE: gl.constexpr = sizes[3]
    TILE: gl.constexpr = sizes[4]
    PIECES: gl.constexpr = sizes[5]
    STAGES: gl.constexpr = sizes[6]
    filled, free = barriers
    tables_ptr, table_stride = tables
    end = gl.load(item_ptr + 3) + gl.load(item_ptr + 1)
    table_ptr = tables_ptr + gl.load(item_ptr + 2).to(gl.int64) * table_stride
    for first in range(0, end, TILE):
        stage = count % STAGES
        mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
        mbarrier.expect(filled.index(stage), TILE * HALVES * _PANEL * 2)
        for piece in gl.static_range(PIECES):
            position = first + piece * (TILE // PIECES)
            block = gl.load(table_ptr + position // BLOCK_SIZE, mask=position < end, other=-1)
            row = gl.where(block < 0, _NOWHERE, (block * NUM_KV + head) * BLOCK_SIZE + position % BLOCK_SIZE)
            for half in gl.static_range(HALVES):
                copy_in(
                    cache,
                    [row, half * _PANEL],
                    filled.index(stage),
                    pieces.index((stage * HALVES + half) * PIECES + piece),
                )
        count += 1
    return count


@gluon.jit
def _attend(tiles, barriers, out_ptr, work, scale, sizes: gl.constexpr, HALF_OF_ROWS: gl.constexpr):
    """The first or the second 64 rows of each item; see softmax_step in paged_tiles.py for the arithmetic."""
    NUM_KV: gl.constexpr = sizes[0]
    GROUP: gl.constexpr = sizes[1]
    HEAD_SIZE: gl.constexpr = sizes[2] * _PANEL
    TILE: gl.constexpr = sizes[4]
    PIECES: gl.constexpr = sizes[5]
    STAGES: gl.constexpr = sizes[6]
    TOKENS: gl.constexpr = _ROWS // GROUP
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    q_tiles, k_tiles, v_tiles, v_panels = tiles
    q_filled, q_free = barriers[0]
    k_filled, k_free = barriers[1]
    v_filled, v_free = barriers[2]
    dtype: gl.constexpr = q_tiles.dtype
    q = q_tiles.index(HALF_OF_ROWS)
    items_ptr, begin, until = work
    row = gl.arange(0, _ROWS, row_layout)
    column = gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, out_layout))
    no_scores = gl.zeros([_ROWS, TILE], gl.float32, score_layout)
    count = 0
    turn = 0
    unit = begin + _place(turn)
    while unit < until:
        item_ptr = items_ptr + unit // NUM_KV * _FIELDS
        head = unit % NUM_KV
        first_query = gl.load(item_ptr)
        num_queries = gl.load(item_ptr + 1)
        first_position = gl.load(item_ptr + 3)
        end = first_position + num_queries
        seen_by_first = first_position + HALF_OF_ROWS * TOKENS + 1
        mbarrier.wait(q_filled.index(0), turn & 1)
        stage = count % STAGES
        mbarrier.wait(k_filled.index(stage), count // STAGES & 1)
        k = k_tiles.index(stage).permute([1, 0])
        scores = hopper.warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
        scores = hopper.warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_free.index(stage))
        if seen_by_first < TILE:
            scores = _mask(scores, 0, seen_by_first, GROUP, TILE, score_layout)
        best = gl.max(scores, 1) * scale
        weights = gl.exp2(scores * scale - best[:, None])
        total = gl.sum(weights, 1)
        weights = gl.convert_layout(weights.to(dtype), weight_layout)
        out = gl.zeros([_ROWS, HEAD_SIZE], gl.float32, out_layout)
        for first in range(TILE, end, TILE):
            before, phase_before = stage, count // STAGES & 1
            count += 1
            stage = count % STAGES
            mbarrier.wait(k_filled.index(stage), count // STAGES & 1)
            k = k_tiles.index(stage).permute([1, 0])
            scores = hopper.warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_filled.index(before), phase_before)
            next_out = hopper.warpgroup_mma(weights, v_tiles.index(before), out, is_async=True)
            scores = hopper.warpgroup_mma_wait(1, [scores])
            mbarrier.arrive(k_free.index(stage))
            if first + TILE > seen_by_first:
                scores = _mask(scores, first, seen_by_first, GROUP, TILE, score_layout)
            new_best = gl.maximum(best, gl.max(scores, 1) * scale)
            next_weights = gl.exp2(scores * scale - new_best[:, None])
            decay = gl.exp2(best - new_best)
            total = total * decay + gl.sum(next_weights, 1)
            best = new_best
            # The registers of the weights are the product's until it has ended.
            out, weights = hopper.warpgroup_mma_wait(0, [next_out, weights])
            mbarrier.arrive(v_free.index(before))
            out = out * gl.convert_layout(decay, row_layout)[:, None]
            weights = gl.convert_layout(next_weights.to(dtype), weight_layout)
        mbarrier.arrive(q_free.index(0))
        mbarrier.wait(v_filled.index(stage), count // STAGES & 1)
        if end % (TILE // PIECES) != 0:
            _zero_from(v_panels, stage, (end - 1) % TILE + 1, HEAD_SIZE // _PANEL, TILE)
        next_out = hopper.warpgroup_mma(weights, v_tiles.index(stage), out, is_async=True)
        out, weights = hopper.warpgroup_mma_wait(0, [next_out, weights])
        mbarrier.arrive(v_free.index(stage))
        count += 1
        out = out / gl.convert_layout(total, row_layout)[:, None]
        token = HALF_OF_ROWS * TOKENS + row // GROUP
        at = ((first_query + token).to(gl.int64) * (NUM_KV * GROUP) + head * GROUP + row % GROUP) * HEAD_SIZE
        mask = (token < num_queries)[:, None]
        gl.store(out_ptr + at[:, None] + column[None, :], out.to(dtype), mask=mask)
        turn += 1
        unit = begin + _place(turn)


@gluon.jit
def _mask(scores, first, seen_by_first, GROUP: gl.constexpr, TILE: gl.constexpr, layout: gl.constexpr):
    """Without those of keys behind a row's own token."""
    position = first + gl.arange(0, TILE, gl.SliceLayout(0, layout))
    seen = seen_by_first + gl.arange(0, _ROWS, gl.SliceLayout(1, layout)) // GROUP
    return gl.where(position[None, :] < seen[:, None], scores, float("-inf"))


@gluon.jit
def _zero_from(panels, stage, row, HALVES: gl.constexpr, TILE: gl.constexpr):
    """Zeros for values from `row` of a tile on: what nobody has written may be anything, and NaN times 0 is NaN.

    Both groups of warps do it before their products, so what one writes while the other's product reads are the bytes
    that are there already.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    is_written = (gl.arange(0, TILE, gl.SliceLayout(1, layout)) < row)[:, None]
    for half in gl.static_range(HALVES):
        panel = panels.index(stage * HALVES + half)
        values = panel.load(layout)
        panel.store(gl.where(is_written, values, gl.zeros_like(values)))
    hopper.fence_async_shared()
