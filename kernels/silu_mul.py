"""The gate of a gated MLP: silu(gate) * up."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import dependent_launch, overlap_next, wait_for_previous

_BLOCK = 1024


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up of contiguous [N, gate | up], in float32, rounded where the reference rounds."""
    width = x.shape[1] // 2
    out = torch.empty((len(x), width), dtype=x.dtype, device=x.device)
    if len(x):
        grid = (len(x), triton.cdiv(width, _BLOCK))
        _silu_mul[grid](x, out, width, BLOCK=_BLOCK, num_warps=4, **dependent_launch(x.device, len(x)))
    return out


@triton.jit
def _silu_mul(x_ptr, out_ptr, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    overlap_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    wait_for_previous(PDL)
    gate = tl.load(x_ptr + row * 2 * width + column, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + column, (activated * up.to(tl.float32)).to(gate.dtype), mask=mask)
