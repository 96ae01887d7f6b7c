"""Products of many tokens with a layer's weights for compute capability 9.0, each with what follows it in the layer.

What the following kernel would read again from memory is still in the registers of the product's: the two halves of a
gated MLP, and a head of the fused projection, which is normed, rotated and stored. A program takes tiles of 128 tokens
by 256 columns in turn; one of its warps copies, two groups of four multiply (the division of labour is that of
CUTLASS's warp-specialised kernels).
"""

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gluon_names import barrier, copy_in, copy_out, gl, gluon, hopper, round_to, tma, view_as
from kernels.hopper import COLUMNS, CONSUMERS, PANEL, ROWS
from kernels.launch import num_programs

_STAGES = 4
_REGISTERS, _LOADER_REGISTERS, _MEAN_REGISTERS = 240, 24, 168
_GATED_BAND, _HEADS_BAND = 4, 32
"""Tiles of tokens that programs go through before the next columns, so that what they read is still in the L2."""
_PANEL = gl.constexpr(PANEL)
_ROWS = gl.constexpr(ROWS)
_COLUMNS = gl.constexpr(COLUMNS)
mbarrier = hopper.mbarrier
_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def hopper_linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up [N, width] of x [N, in] times the transpose of contiguous [gate | up, in].

    Rounded where the reference rounds.
    """
    width = len(weight) // 2
    out = torch.empty((len(x), width), dtype=x.dtype, device=x.device)
    num_rows = triton.cdiv(len(x), CONSUMERS * ROWS)
    _silu_mul[_grid(x, num_rows * (width // COLUMNS))](
        _tiles(x, CONSUMERS * ROWS),
        _tiles(weight, COLUMNS),
        _tiles(out, ROWS, COLUMNS),
        num_rows,
        width // COLUMNS,
        x.shape[1],
        BAND=_GATED_BAND,
        STAGES=_STAGES,
        REGISTERS=_REGISTERS,
        LOADER_REGISTERS=_LOADER_REGISTERS,
        num_warps=4,
        maxnreg=_MEAN_REGISTERS,
    )
    return out


def hopper_linear_norm_rotary_store(
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
    """norm_rotary_store of x [T, in] times the transpose of the fused projection's weight: queries [T, Q, 128].

    Heads of 128, caches contiguous. Rounded where the reference rounds.
    """
    num_kv_heads, block_size, head_size = k_cache.shape[1:]
    num_q_heads = len(weight) // head_size - 2 * num_kv_heads
    out = torch.empty((len(x), num_q_heads, head_size), dtype=x.dtype, device=x.device)
    num_rows, num_columns = triton.cdiv(len(x), CONSUMERS * ROWS), len(weight) // (2 * COLUMNS)
    _norm_rotary_store[_grid(x, num_rows * num_columns)](
        _tiles(x, CONSUMERS * ROWS),
        _tiles(weight, COLUMNS),
        out,
        q_weight,
        k_weight,
        rotary,
        positions,
        slots,
        k_cache,
        v_cache,
        num_rows,
        num_columns,
        x.shape[1],
        len(x),
        eps,
        NUM_Q=num_q_heads,
        NUM_KV=num_kv_heads,
        BLOCK_SIZE=block_size,
        BAND=_HEADS_BAND,
        STAGES=_STAGES,
        REGISTERS=_REGISTERS,
        LOADER_REGISTERS=_LOADER_REGISTERS,
        num_warps=4,
        maxnreg=_MEAN_REGISTERS,
    )
    return out


def _grid(x: Tensor, num_tiles: int) -> tuple[int]:
    return (min(num_programs(x.device), num_tiles),)


def _tiles(matrix: Tensor, rows: int, columns: int = PANEL) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], _LAYOUT)


@gluon.jit(do_not_specialize=["num_rows", "num_columns", "depth"])
def _silu_mul(
    xs,
    weights,
    outs,
    num_rows,
    num_columns,
    depth,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    x_tiles, w_tiles, barriers = _ring(xs, weights, STAGES)
    out_tiles = gl.allocate_shared_memory(xs.dtype, [2, _ROWS, _COLUMNS], outs.layout)
    layout: gl.constexpr = xs.layout
    x_halves = view_as(x_tiles, [2 * STAGES, _ROWS, _PANEL], layout)
    shape = (num_rows, num_columns, depth)
    gl.warp_specialize(
        [
            (_multiply_silu_mul, (x_halves, w_tiles, barriers, outs, out_tiles, shape, BAND, STAGES, 0)),
            (_multiply_silu_mul, (x_halves, w_tiles, barriers, outs, out_tiles, shape, BAND, STAGES, 1)),
            (_load, (xs, weights, x_tiles, w_tiles, barriers, shape, _COLUMNS, num_columns * _COLUMNS, BAND, STAGES)),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def _multiply_silu_mul(
    x_halves, w_tiles, barriers, outs, out_tiles, shape, BAND: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr
):
    dtype: gl.constexpr = x_halves.dtype
    num_rows, num_columns, depth = shape
    count = 0
    for tile in range(gl.program_id(0), num_rows * num_columns, gl.num_programs(0)):
        row, column = _place(tile, num_rows, num_columns, BAND)
        gate, up, count = _multiply(x_halves, w_tiles, barriers, count, depth, STAGES, HALF)
        gate = round_to(gate, dtype).to(gl.float32)
        gate = round_to(gate / (1.0 + gl.exp(-gate)), dtype).to(gl.float32)
        tma.store_wait(0)
        out_tiles.index(HALF).store(round_to(gate * round_to(up, dtype).to(gl.float32), dtype))
        hopper.fence_async_shared()
        copy_out(outs, [row * (2 * _ROWS) + HALF * _ROWS, column * _COLUMNS], out_tiles.index(HALF))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "num_columns", "depth", "num_tokens"])
def _norm_rotary_store(
    xs,
    weights,
    q_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rotary_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    num_rows,
    num_columns,
    depth,
    num_tokens,
    eps,
    NUM_Q: gl.constexpr,
    NUM_KV: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    x_tiles, w_tiles, barriers = _ring(xs, weights, STAGES)
    layout: gl.constexpr = xs.layout
    heads = gl.allocate_shared_memory(xs.dtype, [2, _ROWS, _COLUMNS], layout)
    x_halves = view_as(x_tiles, [2 * STAGES, _ROWS, _PANEL], layout)
    panels = view_as(heads, [4, _ROWS, _PANEL], layout)
    shape = (num_rows, num_columns, depth)
    norm = (q_weight_ptr, k_weight_ptr, eps)
    place = (rotary_ptr, positions_ptr, slots_ptr, num_tokens)
    into = (q_ptr, k_cache_ptr, v_cache_ptr)
    sizes: gl.constexpr = (NUM_Q, NUM_KV, BLOCK_SIZE)
    gl.warp_specialize(
        [
            (
                _multiply_heads,
                (x_halves, w_tiles, barriers, heads, panels, norm, place, into, shape, sizes, BAND, STAGES, 0),
            ),
            (
                _multiply_heads,
                (x_halves, w_tiles, barriers, heads, panels, norm, place, into, shape, sizes, BAND, STAGES, 1),
            ),
            (_load, (xs, weights, x_tiles, w_tiles, barriers, shape, 2 * _COLUMNS, _COLUMNS, BAND, STAGES)),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def _multiply_heads(
    x_halves,
    w_tiles,
    barriers,
    heads,
    panels,
    norm,
    place,
    into,
    shape,
    sizes: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
):
    num_rows, num_columns, depth = shape
    count = 0
    for tile in range(gl.program_id(0), num_rows * num_columns, gl.num_programs(0)):
        row, column = _place(tile, num_rows, num_columns, BAND)
        first, second, count = _multiply(x_halves, w_tiles, barriers, count, depth, STAGES, HALF)
        token = row * (2 * _ROWS) + HALF * _ROWS
        _finish_head(first, 2 * column, token, heads, panels, norm, place, into, sizes, HALF)
        _finish_head(second, 2 * column + 1, token, heads, panels, norm, place, into, sizes, HALF)


@gluon.jit
def _finish_head(product, head, first_token, heads, panels, norm, place, into, sizes: gl.constexpr, HALF: gl.constexpr):
    """Norm, rotation and store of one head of 64 tokens. Through shared memory: rotation pairs columns 64 apart."""
    NUM_Q: gl.constexpr = sizes[0]
    NUM_KV: gl.constexpr = sizes[1]
    BLOCK_SIZE: gl.constexpr = sizes[2]
    dtype: gl.constexpr = heads.dtype
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_weight_ptr, k_weight_ptr, eps = norm
    rotary_ptr, positions_ptr, slots_ptr, num_tokens = place
    q_ptr, k_cache_ptr, v_cache_ptr = into
    value = product.to(dtype)
    is_turned = head < NUM_Q + NUM_KV
    if is_turned:
        wide = value.to(gl.float32)
        scale = gl.rsqrt(gl.sum(wide * wide, 1) / _COLUMNS + eps)
        weight_ptr = q_weight_ptr if head < NUM_Q else k_weight_ptr
        weight = gl.load(weight_ptr + gl.arange(0, _COLUMNS, gl.SliceLayout(0, product.type.layout))).to(gl.float32)
        value = ((wide * scale[:, None]).to(dtype).to(gl.float32) * weight[None, :]).to(dtype)
    barrier()  # all have read what was here before
    heads.index(HALF).store(value)
    barrier()
    first = panels.index(2 * HALF).load(layout)
    second = panels.index(2 * HALF + 1).load(layout)
    token = first_token + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, _PANEL, gl.SliceLayout(0, layout))[None, :]
    is_token = token < num_tokens
    if is_turned:
        position = gl.load(positions_ptr + token, mask=is_token, other=0)
        cos = gl.load(rotary_ptr + (position * _COLUMNS)[:, None] + column)
        sin = gl.load(rotary_ptr + (position * _COLUMNS)[:, None] + _PANEL + column)
        first_wide = first.to(gl.float32)
        second_wide = second.to(gl.float32)
        first = (first_wide * cos - second_wide * sin).to(dtype)
        second = (second_wide * cos + first_wide * sin).to(dtype)
    if head < NUM_Q:
        at = q_ptr + (token.to(gl.int64) * (NUM_Q * _COLUMNS) + head * _COLUMNS)[:, None] + column
        gl.store(at, first, mask=is_token[:, None])
        gl.store(at + _PANEL, second, mask=is_token[:, None])
    else:
        slot = gl.load(slots_ptr + token, mask=is_token, other=-1)
        kv_head = (head - NUM_Q) % NUM_KV
        cache_ptr = k_cache_ptr if is_turned else v_cache_ptr
        row = (slot // BLOCK_SIZE * NUM_KV + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        at = cache_ptr + (row * _COLUMNS)[:, None] + column
        gl.store(at, first, mask=(slot >= 0)[:, None])
        gl.store(at + _PANEL, second, mask=(slot >= 0)[:, None])


@gluon.jit
def _ring(xs, weights, STAGES: gl.constexpr):
    """Tiles of x, two of the weights for each, and the barriers (filled, free) of each stage."""
    x_tiles = gl.allocate_shared_memory(xs.dtype, [STAGES, 2 * _ROWS, _PANEL], xs.layout)
    w_tiles = gl.allocate_shared_memory(xs.dtype, [2 * STAGES, _COLUMNS, _PANEL], weights.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    hopper.fence_async_shared()
    return x_tiles, w_tiles, (filled, free)


@gluon.jit
def _place(tile, num_rows, num_columns, BAND: gl.constexpr):
    """Row and column of a tile: BAND rows of tiles column by column, then the next ones."""
    band = tile // (BAND * num_columns)
    height = gl.minimum(num_rows - band * BAND, BAND)
    within = tile % (BAND * num_columns)
    return band * BAND + within % height, within // height


@gluon.jit
def _load(
    xs,
    weights,
    x_tiles,
    w_tiles,
    barriers,
    shape,
    STEP: gl.constexpr,
    second,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copies, for each tile, x and rows STEP times its column of the weights and `second` rows behind these."""
    filled, free = barriers
    num_rows, num_columns, depth = shape
    count = 0
    for tile in range(gl.program_id(0), num_rows * num_columns, gl.num_programs(0)):
        row, column = _place(tile, num_rows, num_columns, BAND)
        for k in range(0, depth, _PANEL):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(filled.index(stage), (2 * _ROWS + 2 * _COLUMNS) * _PANEL * 2)
            copy_in(xs, [row * (2 * _ROWS), k], filled.index(stage), x_tiles.index(stage))
            copy_in(weights, [column * STEP, k], filled.index(stage), w_tiles.index(2 * stage))
            copy_in(weights, [column * STEP + second, k], filled.index(stage), w_tiles.index(2 * stage + 1))
            count += 1


@gluon.jit
def _multiply(x_halves, w_tiles, barriers, count, depth, STAGES: gl.constexpr, HALF: gl.constexpr):
    """Both products [64, 128] of a tile's half of the tokens, and the new `count` of stages."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _COLUMNS, 16])
    filled, free = barriers
    first = gl.zeros([_ROWS, _COLUMNS], gl.float32, layout)
    second = gl.zeros([_ROWS, _COLUMNS], gl.float32, layout)
    for k in range(0, depth, _PANEL):
        stage = count % STAGES
        mbarrier.wait(filled.index(stage), count // STAGES & 1)
        x = x_halves.index(2 * stage + HALF)
        next_first = hopper.warpgroup_mma(x, w_tiles.index(2 * stage).permute([1, 0]), first, is_async=True)
        next_second = hopper.warpgroup_mma(x, w_tiles.index(2 * stage + 1).permute([1, 0]), second, is_async=True)
        first, second = hopper.warpgroup_mma_wait(2, [next_first, next_second])
        mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), pred=k > 0)
        count += 1
    first, second = hopper.warpgroup_mma_wait(0, [first, second])
    mbarrier.arrive(free.index((count + STAGES - 1) % STAGES))
    return first, second, count
