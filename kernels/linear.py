"""Products with a weight matrix, of any rows: ours for few rows and for some, cuBLAS's for the rest.

Those of few rows cost what reading the weights costs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FEW_ROWS, dependent_launch, overlap_next, runs_beside, wait_for_previous
from kernels.tiled_linear import tiled_linear, tiles_suit

MAX_COLUMNS = 16384
"""Beyond this, cuBLAS is as fast or faster for few rows; measured in NOTES.md."""
_CHUNK = 1024
_MAX_DEPTH = 4 * _CHUNK


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTuning:
    columns: int = 16
    """Of the output, for each program."""
    num_warps: int = 4
    """Each sums a slice of its own of the depth."""


def linear(x: Tensor, weight: Tensor, tuning: LinearTuning | None = None) -> Tensor:
    """[N, in] times the transpose of [out, in], both contiguous."""
    num_rows, depth = x.shape
    columns = weight.shape[0]
    if (num_rows > FEW_ROWS or runs_beside()) and tiles_suit(x, weight):
        return tiled_linear(x, weight)
    if not 0 < num_rows <= FEW_ROWS or columns > MAX_COLUMNS or depth % _CHUNK or depth > _MAX_DEPTH:
        return F.linear(x, weight)
    if x.dtype == torch.float32:
        return F.linear(x, weight)
    tuning = tuning or LinearTuning()
    out = torch.empty((num_rows, columns), dtype=x.dtype, device=x.device)
    _linear[(triton.cdiv(columns, tuning.columns),)](
        x,
        weight,
        out,
        num_rows,
        columns,
        NUM_CHUNKS=depth // _CHUNK,
        WIDTH=_CHUNK // tuning.num_warps,
        SLICES=tuning.num_warps,
        ROWS=16,
        COLUMNS=tuning.columns,
        num_warps=tuning.num_warps,
        **dependent_launch(x.device),
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    columns,
    NUM_CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """All weights of a program are on their way, to registers, before it waits for x and while it does.

    A batched product lets every warp multiply a slice of the depth; the slices' sums are added in one order.
    """
    overlap_next(PDL)
    CHUNK: tl.constexpr = SLICES * WIDTH
    DEPTH: tl.constexpr = NUM_CHUNKS * CHUNK
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = tl.arange(0, SLICES)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    weight_at = weight_ptr + column[None, :, None].to(tl.int64) * DEPTH + within
    weight_mask = column[None, :, None] < columns
    x_at = x_ptr + row[None, :, None] * DEPTH + within
    x_mask = row[None, :, None] < num_rows
    weight = tl.load(weight_at, mask=weight_mask, other=0.0)
    if NUM_CHUNKS > 1:
        weight_1 = tl.load(weight_at + CHUNK, mask=weight_mask, other=0.0)
    if NUM_CHUNKS > 2:
        weight_2 = tl.load(weight_at + 2 * CHUNK, mask=weight_mask, other=0.0)
    if NUM_CHUNKS > 3:
        weight_3 = tl.load(weight_at + 3 * CHUNK, mask=weight_mask, other=0.0)
    wait_for_previous(PDL)
    total = tl.dot(tl.load(x_at, mask=x_mask, other=0.0), tl.permute(weight, (0, 2, 1)))
    if NUM_CHUNKS > 1:
        x = tl.load(x_at + CHUNK, mask=x_mask, other=0.0)
        total = tl.dot(x, tl.permute(weight_1, (0, 2, 1)), total)
    if NUM_CHUNKS > 2:
        x = tl.load(x_at + 2 * CHUNK, mask=x_mask, other=0.0)
        total = tl.dot(x, tl.permute(weight_2, (0, 2, 1)), total)
    if NUM_CHUNKS > 3:
        x = tl.load(x_at + 3 * CHUNK, mask=x_mask, other=0.0)
        total = tl.dot(x, tl.permute(weight_3, (0, 2, 1)), total)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + row[:, None] * columns + column[None, :]
    tl.store(out_at, out, mask=(row[:, None] < num_rows) & (column[None, :] < columns))
