"""The product with the LM head for compute capability 9.0, and what sampling needs to know of all its logits.

Sampling without filters needs, of every block of ids, the largest logit and the sum of the weights; then it reads one
block. Reading the logits again for these costs a third of the product, but here they are still in registers. Programs
take tiles in turn, all tokens of some ids before the next ids, so that the weights are read from memory once; in each,
one warp copies and one or two groups of four warps multiply 64 tokens by all ids of a block.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.draws import Draws
from kernels.gluon_names import copy_in, copy_out, gl, gluon, hopper, round_to, tma, view_as
from kernels.hopper import PANEL, ROWS
from kernels.launch import num_programs
from kernels.sample import Blocks

_PANEL = gl.constexpr(PANEL)
_ROWS = gl.constexpr(ROWS)
mbarrier = hopper.mbarrier
_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHeadTuning:
    groups: int
    """Of warps that multiply, each 64 tokens of its own."""
    block: int
    """Ids of a tile, which share a maximum and a sum."""
    stages: int
    mean_registers: int
    registers: int = 240
    loader_registers: int = 24


FEW = LmHeadTuning(groups=1, block=256, stages=5, mean_registers=168)
MANY = LmHeadTuning(groups=2, block=256, stages=4, mean_registers=168)
MAX_FEW_ROWS = 192
"""Measured in NOTES.md, as are the others."""


def hopper_lm_head(
    x: Tensor, weight: Tensor, draws: Draws, tuning: LmHeadTuning | None = None
) -> tuple[Tensor, Blocks]:
    """Logits [N, V] of x [N, in] and weight [V, in], both contiguous, and their blocks.

    Rows of the logits begin at multiples of 16 bytes; what lies between them is written over.
    """
    (num_tokens, depth), vocab_size = x.shape, len(weight)
    tuning = tuning or (FEW if num_tokens <= MAX_FEW_ROWS else MANY)
    num_blocks = triton.cdiv(vocab_size, tuning.block)
    stride = triton.cdiv(vocab_size, 8) * 8
    logits = torch.empty((num_tokens, stride), dtype=x.dtype, device=x.device)[:, :vocab_size]
    maxima = torch.empty((num_tokens, num_blocks), dtype=x.dtype, device=x.device)
    sums = torch.empty((num_tokens, num_blocks), dtype=torch.float32, device=x.device)
    num_rows = triton.cdiv(num_tokens, tuning.groups * ROWS)
    _lm_head[(min(num_programs(x.device), num_rows * num_blocks),)](
        _tiles(x, tuning.groups * ROWS, PANEL),
        _tiles(weight, tuning.block, PANEL),
        _tiles(logits, ROWS, tuning.block // 2),
        draws.temperature,
        draws.slot,
        maxima,
        sums,
        draws.temperature.stride(0),
        num_tokens,
        vocab_size,
        depth,
        HAS_SLOTS=draws.slot is not None,
        GROUPS=tuning.groups,
        BLOCK=tuning.block,
        STAGES=tuning.stages,
        REGISTERS=tuning.registers,
        LOADER_REGISTERS=tuning.loader_registers,
        num_warps=4,
        maxnreg=tuning.mean_registers,
    )
    return logits, Blocks(tuning.block, maxima, sums)


def _tiles(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], _LAYOUT)


@gluon.jit(do_not_specialize=["temperature_ptr", "temperature_stride", "num_tokens", "vocab_size", "depth"])
def _lm_head(
    xs,
    weights,
    logits,
    temperature_ptr,
    slots_ptr,
    maxima_ptr,
    sums_ptr,
    temperature_stride,
    num_tokens,
    vocab_size,
    depth,
    HAS_SLOTS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    layout: gl.constexpr = xs.layout
    x_tiles = gl.allocate_shared_memory(xs.dtype, [STAGES, GROUPS * _ROWS, _PANEL], layout)
    w_tiles = gl.allocate_shared_memory(xs.dtype, [STAGES, BLOCK, _PANEL], layout)
    out_tiles = gl.allocate_shared_memory(xs.dtype, [GROUPS, _ROWS, BLOCK // 2], layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(free.index(stage), count=GROUPS)
    hopper.fence_async_shared()
    barriers = (filled, free)
    shape = (num_tokens, vocab_size, depth)
    rows = view_as(x_tiles, [GROUPS * STAGES, _ROWS, _PANEL], layout)
    tiles = (rows, w_tiles, logits, out_tiles)
    settings = (temperature_ptr, slots_ptr, temperature_stride)
    into = (maxima_ptr, sums_ptr)
    sizes: gl.constexpr = (HAS_SLOTS, GROUPS, BLOCK, STAGES)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (tiles, barriers, settings, into, shape, sizes, 0)),
                (_multiply, (tiles, barriers, settings, into, shape, sizes, 1)),
                (_load, (xs, weights, x_tiles, w_tiles, barriers, shape, GROUPS, BLOCK, STAGES)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (tiles, barriers, settings, into, shape, sizes, 0)),
                (_load, (xs, weights, x_tiles, w_tiles, barriers, shape, GROUPS, BLOCK, STAGES)),
            ],
            [1],
            [LOADER_REGISTERS],
        )


@gluon.jit
def _load(
    xs, weights, x_tiles, w_tiles, barriers, shape, GROUPS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr
):
    filled, free = barriers
    num_tokens, vocab_size, depth = shape
    num_rows = gl.cdiv(num_tokens, GROUPS * _ROWS)
    count = 0
    for tile in range(gl.program_id(0), num_rows * gl.cdiv(vocab_size, BLOCK), gl.num_programs(0)):
        token = tile % num_rows * (GROUPS * _ROWS)
        first = tile // num_rows * BLOCK
        for k in range(0, depth, _PANEL):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(filled.index(stage), (GROUPS * _ROWS + BLOCK) * _PANEL * 2)
            copy_in(weights, [first, k], filled.index(stage), w_tiles.index(stage))
            copy_in(xs, [token, k], filled.index(stage), x_tiles.index(stage))
            count += 1


@gluon.jit
def _multiply(tiles, barriers, settings, into, shape, sizes: gl.constexpr, GROUP: gl.constexpr):
    """One group's work: of each tile its 64 tokens."""
    GROUPS: gl.constexpr = sizes[1]
    BLOCK: gl.constexpr = sizes[2]
    STAGES: gl.constexpr = sizes[3]
    filled, free = barriers
    num_tokens, vocab_size, depth = shape
    num_rows = gl.cdiv(num_tokens, GROUPS * _ROWS)
    num_blocks = gl.cdiv(vocab_size, BLOCK)
    count = 0
    for tile in range(gl.program_id(0), num_rows * num_blocks, gl.num_programs(0)):
        first_token = tile % num_rows * (GROUPS * _ROWS) + GROUP * _ROWS
        if first_token < num_tokens:
            _finish_block(first_token, tile // num_rows, count, tiles, barriers, settings, into, shape, sizes, GROUP)
        else:
            for k in range(0, depth, _PANEL):
                stage = (count + k // _PANEL) % STAGES
                mbarrier.wait(filled.index(stage), (count + k // _PANEL) // STAGES & 1)
                mbarrier.arrive(free.index(stage))
        count += gl.cdiv(depth, _PANEL)
    tma.store_wait(0)


@gluon.jit
def _finish_block(
    first_token,
    block,
    count,
    tiles,
    barriers,
    settings,
    into,
    shape,
    sizes: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Logits, maxima and sums of 64 tokens and a block of ids; sample.py's _reduce_blocks has the definition."""
    HAS_SLOTS: gl.constexpr = sizes[0]
    BLOCK: gl.constexpr = sizes[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    x_tiles, w_tiles, logits, out_tiles = tiles
    temperature_ptr, slots_ptr, temperature_stride = settings
    maxima_ptr, sums_ptr = into
    num_tokens, vocab_size, depth = shape
    num_blocks = gl.cdiv(vocab_size, BLOCK)
    token = first_token + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    is_token = token < num_tokens
    slot = token.to(gl.int64)
    if HAS_SLOTS:
        slot = gl.load(slots_ptr + token, mask=is_token, other=0)
    temperature = gl.load(temperature_ptr + slot * temperature_stride, mask=is_token, other=1.0)
    product = _product(x_tiles, w_tiles, barriers, count, depth, layout, sizes, GROUP)
    rounded = round_to(product, logits.dtype)
    left, right = rounded.reshape([_ROWS, 2, BLOCK // 2]).permute([0, 2, 1]).split()
    out = out_tiles.index(GROUP)
    tma.store_wait(0)
    out.store(left)
    hopper.fence_async_shared()
    copy_out(logits, [first_token, block * BLOCK], out)

    x = rounded.to(gl.float32)
    if block == num_blocks - 1:
        ids = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
        x = gl.where((ids < vocab_size)[None, :], x, -float("inf"))
    largest = gl.max(x, 1)
    scale = 1.4426950408889634 / gl.where(temperature == 0, 1.0, gl.maximum(temperature, 1e-30))
    base = gl.where(gl.abs(largest) < float("inf"), largest, 0.0)
    total = gl.sum(gl.exp2((x - base[:, None]) * scale[:, None]), 1)
    at = token.to(gl.int64) * num_blocks + block
    gl.store(maxima_ptr + at, largest.to(logits.dtype), mask=is_token)
    gl.store(sums_ptr + at, total, mask=is_token)

    tma.store_wait(0)
    out.store(right)
    hopper.fence_async_shared()
    copy_out(logits, [first_token, block * BLOCK + BLOCK // 2], out)


@gluon.jit
def _product(x_tiles, w_tiles, barriers, count, depth, layout: gl.constexpr, sizes: gl.constexpr, GROUP: gl.constexpr):
    """float32 [64, ids of a block]; the tile's first stage is the `count`-th."""
    GROUPS: gl.constexpr = sizes[1]
    BLOCK: gl.constexpr = sizes[2]
    STAGES: gl.constexpr = sizes[3]
    filled, free = barriers
    product = gl.zeros([_ROWS, BLOCK], gl.float32, layout)
    for k in range(0, depth, _PANEL):
        stage = count % STAGES
        mbarrier.wait(filled.index(stage), count // STAGES & 1)
        x = x_tiles.index(GROUPS * stage + GROUP)
        product = hopper.warpgroup_mma(x, w_tiles.index(stage).permute([1, 0]), product, is_async=True)
        product = hopper.warpgroup_mma_wait(1, [product])
        mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), pred=k > 0)
        count += 1
    product = hopper.warpgroup_mma_wait(0, [product])
    mbarrier.arrive(free.index((count + STAGES - 1) % STAGES))
    return product
