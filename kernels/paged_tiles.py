"""What the attention kernels share: reading a tile of keys or values through a block table, and the online softmax.

KV caches are [blocks, K, S, H]. Scores are kept in base 2: softmax(s) = exp2(s * log2(e)) / sum.
"""

import math

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 exactly, not through tf32; 16-bit operands have one way only."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def block_ids(table_ptr, position, end, BLOCK_SIZE: tl.constexpr):
    """Blocks that hold the tokens at `position` [TILE] of a sequence; 0 from `end` on."""
    return tl.load(table_ptr + position // BLOCK_SIZE, mask=position < end, other=0)


@triton.jit
def tile_offsets(blocks, position, head, block_stride, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Offsets [TILE, H] of one head's keys or values in a cache."""
    row = blocks.to(tl.int64) * block_stride + (head * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_SIZE
    return row[:, None] + tl.arange(0, HEAD_SIZE)[None, :]


@triton.jit
def softmax_step(scores, scale, v, best, total, out, PRECISION: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867) over products q k [R, TILE].

    `best`, of scaled scores, and `total` are [R], `out` [R, H]; every row has had at least one finite score by the end
    of the step. The scale (above 0) is applied inside the exponent, where it costs no instruction of its own.
    """
    new_best = tl.maximum(best, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_best[:, None])
    decay = tl.exp2(best - new_best)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision=PRECISION)
    return new_best, total, out
