"""Kernels for compute capability 9.0 (H100, H200) in which warps divide the labour: what they are made for.

One warp or two ask for tiles (TMA copies into shared memory), two groups of four warps multiply 64 rows of them each
and do what comes after; they meet at barriers in shared memory. Registers go to those who need them. The scheme is that
of CUTLASS and FlashAttention-3 (arXiv 2407.08608). Nothing of them is imported here: only such a device needs Gluon.
"""

import functools

import torch
from torch import Tensor

from kernels.launch import num_programs

CONSUMERS = 2
"""Groups of four warps that multiply."""
ROWS = 64
"""Of a tile that one of them multiplies."""
PANEL = 64
"""16-bit numbers of a row that lie together in shared memory: the 128 bytes of a swizzle pattern."""
COLUMNS = 128
"""Of one of the two products of a tile."""
LEAST_FILL = 0.85
"""Share of the device that a product's tiles keep busy, on the average of their rounds: below, cuBLAS is faster."""

LEAST_HEAD_ROWS, LEAST_VOCABULARY = 17, 8192
"""Of the LM head's product: below, there is too little to save."""
HALF_EMPTY = range(129, 161)
"""Rows of the LM head's product whose third tile would be at least half empty: cuBLAS is faster."""


def is_product_of_many(x: Tensor, weight: Tensor) -> bool:
    """Whether hopper_products.py has the product of contiguous x [N, in] with a weight [out, in]."""
    columns, depth = weight.shape
    if columns % (2 * COLUMNS) or depth % PANEL or not _runs(x):
        return False
    num_tiles, programs = -(-len(x) // (CONSUMERS * ROWS)) * (columns // (2 * COLUMNS)), num_programs(x.device)
    return num_tiles > 0 and num_tiles >= LEAST_FILL * programs * -(-num_tiles // programs)


def is_lm_head(x: Tensor, weight: Tensor) -> bool:
    """Whether hopper_lm_head.py has the product of contiguous x [N, in] with a contiguous weight [V, in]."""
    vocab_size, depth = weight.shape
    is_large = len(x) >= LEAST_HEAD_ROWS and len(x) not in HALF_EMPTY and vocab_size >= LEAST_VOCABULARY
    return is_large and depth % PANEL == 0 and weight.is_contiguous() and x.is_contiguous() and _runs(x)


def takes_heads(head_size: int) -> bool:
    """Whether the file's product with the fused projection finishes heads of that size: one has all the columns."""
    return head_size == COLUMNS


def is_prefill_attention(q: Tensor, k_cache: Tensor) -> bool:
    """Whether hopper_prefill_attention.py has the attention of q [T, Q, H] over contiguous [blocks, K, S, H]."""
    group, block_size, head_size = q.shape[1] // k_cache.shape[1], k_cache.shape[2], k_cache.shape[3]
    is_group = group <= ROWS and ROWS % group == 0
    is_block = block_size >= 16 and block_size & (block_size - 1) == 0
    return is_group and is_block and head_size in (PANEL, 2 * PANEL) and _runs(q)


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has such kernels for the dtype."""
    return dtype in (torch.bfloat16, torch.float16) and _is_hopper(device)


def _runs(x: Tensor) -> bool:
    return runs_on(x.device, x.dtype)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
