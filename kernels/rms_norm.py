"""RMS normalisation of rows, with or without a residual addition before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent_launch, every_kernel_dependent, overlap_next, wait_for_previous


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of contiguous rows [N, D], computed in float32."""
    out = torch.empty_like(x)
    if len(x):
        _rms_norm[(len(x),)](x, x, weight, out, eps, x.shape[1], **_shape(x), ADD=False, PARTS=0)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) of contiguous rows [N, D]; written over x and residual."""
    if len(x):
        _rms_norm[(len(x),)](x, residual, weight, x, eps, x.shape[1], **_shape(x), ADD=True, PARTS=0)
    return x, residual


def add_parts_rms_norm(parts: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """add_rms_norm of the sum of float32 [parts, N, D], rounded as residual is; written over residual."""
    out = torch.empty_like(residual)
    shape = _shape(residual) | every_kernel_dependent(residual.device)
    num_parts, num_rows, width = parts.shape
    _rms_norm[(num_rows,)](parts, residual, weight, out, eps, width, **shape, ADD=True, PARTS=num_parts)
    return out, residual


def _shape(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[1])
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16), **dependent_launch(x.device, len(x))}


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    width,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program. The row is rounded to its dtype where the reference rounds it."""
    overlap_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    at = row * width + column
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    wait_for_previous(PDL)
    if PARTS:
        total = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(x_ptr + part * (tl.num_programs(0).to(tl.int64) * width) + at, mask=mask, other=0.0)
        x = total.to(out_ptr.dtype.element_ty)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + at, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + at, normed.to(x.dtype), mask=mask)
