"""Embeddings of a step's tokens, of which some are known only on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def embed(ids: Tensor, weight: Tensor, last_tokens: Tensor) -> Tensor:
    """Rows of contiguous weight [V, D] for ids, int64 [T]; an id below 0 stands for last_tokens[-1 - id], int32."""
    width = weight.shape[1]
    out = torch.empty((len(ids), width), dtype=weight.dtype, device=weight.device)
    # Never overlaps what comes before it: that may write block tables, which later kernels read before they wait.
    _embed[(len(ids), triton.cdiv(width, _BLOCK))](ids, weight, last_tokens, out, width, BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def _embed(ids_ptr, weight_ptr, last_tokens_ptr, out_ptr, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(ids_ptr + token)
    if index < 0:
        index = tl.load(last_tokens_ptr - 1 - index).to(tl.int64)
    row = tl.load(weight_ptr + index * width + column, mask=column < width)
    tl.store(out_ptr + token * width + column, row, mask=column < width)
