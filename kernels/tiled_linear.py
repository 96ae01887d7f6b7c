"""Products of a step's rows with a small weight matrix, in tiles: for 17 to 128 rows, and where a step runs in halves.

Such a product costs latency, not bytes or operations: all of a program's first tiles are on their way at once, the
depth is split where there are too few columns to fill the device, and what follows is part of the kernel (SiLU) or of
the next one (the sum of the splits). Shared memory for one program beside two of decode attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import every_kernel_dependent, overlap_next, wait_for_previous
from kernels.paged_tiles import dot_precision

MAX_ROWS = 128
MAX_WEIGHT_BYTES = 2**24
"""Beyond that many rows cuBLAS is as fast or faster (NOTES.md); weights larger than Qwen3-0.6B's are not measured."""
ROWS, DEPTH = 64, 64
"""Of a tile of x."""
COLUMNS, GATED_COLUMNS = 64, 32
_STAGES = 4
_MAX_PROGRAMS = 160


def weight_suits(columns: int, depth: int, dtype: torch.dtype) -> bool:
    """Whether products with a weight [columns, depth] are ones for this file."""
    is_small = dtype in (torch.bfloat16, torch.float16) and columns * depth * dtype.itemsize <= MAX_WEIGHT_BYTES
    return is_small and columns % COLUMNS == 0 and depth % DEPTH == 0


def tiles_suit(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x [N, in] with weight [out, in] is one for this file."""
    return 0 < len(x) <= MAX_ROWS and weight_suits(*weight.shape, x.dtype)


def tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """[N, in] times the transpose of [out, in], both contiguous."""
    out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    _product(x, weight, out, 1)
    return out


def tiled_linear_parts(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [parts, N, out]: the same product, of the depth in parts, whose sum it is."""
    columns, depth = weight.shape
    parts = 8
    while parts > 1 and (columns // COLUMNS * parts > _MAX_PROGRAMS or depth % (DEPTH * parts)):
        parts //= 2
    out = torch.empty((parts, len(x), columns), dtype=torch.float32, device=x.device)
    _product(x, weight, out, parts)
    return out


def tiled_linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up of the product with contiguous [gate | up, in]; rounded where the reference rounds."""
    columns = len(weight) // 2
    out = torch.empty((len(x), columns), dtype=x.dtype, device=x.device)
    _gated_product[(columns // GATED_COLUMNS, triton.cdiv(len(x), ROWS))](
        x,
        weight,
        out,
        len(x),
        columns,
        DEPTH=x.shape[1],
        ROWS=ROWS,
        COLUMNS=GATED_COLUMNS,
        STEP=DEPTH,
        STAGES=_STAGES,
        PRECISION=dot_precision(x.dtype),
        num_warps=4,
        **every_kernel_dependent(x.device),
    )
    return out


def _product(x: Tensor, weight: Tensor, out: Tensor, parts: int) -> None:
    columns, depth = weight.shape
    _tiled_product[(columns // COLUMNS, triton.cdiv(len(x), ROWS), parts)](
        x,
        weight,
        out,
        len(x),
        columns,
        DEPTH=depth,
        PART=depth // parts,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        STEP=DEPTH,
        STAGES=_STAGES,
        PRECISION=dot_precision(x.dtype),
        num_warps=4,
        **every_kernel_dependent(x.device),
    )


@triton.jit(do_not_specialize=["num_rows"])
def _tiled_product(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    columns,
    DEPTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of one part's product a program; the parts' stand one behind the other."""
    overlap_next(PDL)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    within = part * PART + tl.arange(0, STEP)
    x_at = x_ptr + row[:, None] * DEPTH + within[None, :]
    weight_at = weight_ptr + column[:, None].to(tl.int64) * DEPTH + within[None, :]
    row_mask = (row < num_rows)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    wait_for_previous(PDL)
    for i in tl.range(0, PART, STEP, num_stages=STAGES):
        x = tl.load(x_at + i, mask=row_mask, other=0.0)
        weight = tl.load(weight_at + i)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
    out_at = out_ptr + (part * num_rows + row)[:, None] * columns + column[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_product(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    columns,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """The same tile of gate and of up a program."""
    overlap_next(PDL)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, STEP)
    x_at = x_ptr + row[:, None] * DEPTH + within[None, :]
    gate_at = weight_ptr + column[:, None].to(tl.int64) * DEPTH + within[None, :]
    up_at = gate_at + columns.to(tl.int64) * DEPTH
    row_mask = (row < num_rows)[:, None]
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    wait_for_previous(PDL)
    for i in tl.range(0, DEPTH, STEP, num_stages=STAGES):
        x = tl.load(x_at + i, mask=row_mask, other=0.0)
        gate_weight = tl.load(gate_at + i)
        up_weight = tl.load(up_at + i)
        gate = tl.dot(x, tl.trans(gate_weight), gate, input_precision=PRECISION)
        up = tl.dot(x, tl.trans(up_weight), up, input_precision=PRECISION)
    dtype = out_ptr.dtype.element_ty
    wide = gate.to(dtype).to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
    out_at = out_ptr + row[:, None] * columns + column[None, :]
    tl.store(out_at, (activated * up.to(dtype).to(tl.float32)).to(dtype), mask=row_mask)
